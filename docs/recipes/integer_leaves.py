"""Leaves that no optimizer can move: token ids, flags, random keys. None stands in their place."""

import jax
import jax.numpy as jnp
import optax

from gpa_optax import annealed_adamw, eval_params

model = {
    "kernel": jax.random.normal(jax.random.key(0), (4, 1)),
    "columns": jnp.array([3, 1, 0, 2]),
    "noisy": jnp.array(True),
    "key": jax.random.key(1),
}


def is_trained(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def split(model):
    """Two trees like the model, each with None for the leaves of the other: eqx.partition."""
    trained = jax.tree.map(lambda leaf: leaf if is_trained(leaf) else None, model)
    return trained, jax.tree.map(lambda leaf: None if is_trained(leaf) else leaf, model)


def combine(params, rest):
    """The model again: eqx.combine."""
    return jax.tree.map(
        lambda p, other: other if p is None else p, params, rest, is_leaf=lambda leaf: leaf is None
    )


def loss(params, rest, batch):
    model = combine(params, rest)
    inputs, targets = batch
    noise = 0.1 * model["noisy"] * jax.random.normal(model["key"], inputs.shape)
    return jnp.mean(((inputs + noise)[:, model["columns"]] @ model["kernel"] - targets) ** 2)


inputs = jax.random.normal(jax.random.key(2), (256, 4))
batch = inputs, inputs.sum(axis=1, keepdims=True)
params, rest = split(model)
steps = 300
optimizer = annealed_adamw(2e-2, steps, warmup_steps=steps // 5)
opt_state = optimizer.init(params)


@jax.jit
def train_step(params, opt_state):
    updates, opt_state = optimizer.update(jax.grad(loss)(params, rest, batch), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


start = loss(params, rest, batch)
for _ in range(steps):
    params, opt_state = train_step(params, opt_state)

x = eval_params(opt_state, params)
print(f"loss: {start:.3f} at the start, {loss(x, rest, batch):.3f} at x")
assert loss(x, rest, batch) < 0.1 * start
eval_model = combine(x, rest)
assert jax.tree.structure(eval_model) == jax.tree.structure(model)
assert jnp.array_equal(eval_model["columns"], model["columns"])
