"""Groups of params: one frozen, one with a lower learning rate, one with its own settings."""

import jax
import jax.numpy as jnp
import optax

from gpa_optax import annealed_adamw, eval_params

params = {
    "embedding": jax.random.normal(jax.random.key(0), (8, 16)),
    "body": jax.random.normal(jax.random.key(1), (16, 16)) / 4,
    "head": {"kernel": jnp.zeros((16, 1)), "bias": jnp.zeros(1)},
}
labels = {"embedding": "frozen", "body": "body", "head": "head"}  # a prefix of the params

steps = 300
optimizer = optax.chain(
    optax.clip_by_global_norm(1.0),  # over all groups
    optax.partition(
        {
            "frozen": optax.set_to_zero(),  # keeps no buffers
            "body": annealed_adamw(2e-3, steps, warmup_steps=steps // 5),
            "head": annealed_adamw(2e-2, steps, warmup_steps=steps // 5, weight_decay=0.0),
        },
        labels,
    ),
)


def loss(params, batch):
    tokens, targets = batch
    hidden = jnp.tanh(params["embedding"][tokens] @ params["body"])
    return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"] - targets) ** 2)


@jax.jit
def train_step(params, opt_state, batch):
    updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state, params)
    return optax.apply_updates(params, updates), opt_state


tokens = jnp.arange(8)
batch = (tokens, jnp.sin(tokens)[:, None])
start, embedding, body = loss(params, batch), params["embedding"], params["body"]
opt_state = optimizer.init(params)
for _ in range(steps):
    params, opt_state = train_step(params, opt_state, batch)

x = eval_params(opt_state, params)  # of all groups; frozen leaves come back as they are
print(f"loss: {start:.3f} at the start, {loss(x, batch):.4f} at x")
assert loss(x, batch) < 0.5 * start
assert jnp.array_equal(x["embedding"], embedding)
assert jax.tree.structure(x) == jax.tree.structure(params)
assert not jnp.array_equal(x["body"], body)
