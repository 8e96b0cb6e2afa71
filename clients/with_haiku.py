# /// script
# requires-python = ">=3.11"
# dependencies = ["dm-haiku~=0.0.17", "optax"]
# ///
"""Haiku: params are a dict of dicts, and BatchNorm's statistics belong to y until computed anew."""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from gpa_optax import anytime_adamw, check_step, eval_params


@hk.transform_with_state
def network(inputs, is_training):
    hidden = hk.nets.MLP([32], activate_final=True)(inputs)
    norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
    return hk.Linear(1)(norm(hidden, is_training))[:, 0]


inputs = jax.random.normal(jax.random.key(0), (512, 4))
targets = jnp.sin(inputs.sum(1))
optimizer = optax.chain(optax.clip_by_global_norm(1.0), anytime_adamw(0.02, warmup_steps=10))


def loss(params, state, inputs, targets, is_training):
    outputs, state = network.apply(params, state, None, inputs, is_training)
    return jnp.mean((outputs - targets) ** 2), state


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def step(params, state, opt_state, inputs, targets):
    grads, state = jax.grad(loss, has_aux=True)(params, state, inputs, targets, True)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), state, opt_state


@jax.jit
def evaluate(params, state):
    return loss(params, state, inputs, targets, False)[0]


params, state = network.init(jax.random.key(1), inputs, True)
opt_state = optimizer.init(params)
for t in range(300):
    rows = jax.random.choice(jax.random.key(t), len(inputs), (64,))
    before = jax.tree.map(jnp.copy, (opt_state, params))
    params, state, opt_state = step(params, state, opt_state, inputs[rows], targets[rows])
    if t % 50 == 49:
        check_step(before, (opt_state, params))

x = eval_params(opt_state, params)
anew = state
for _ in range(50):
    _, anew = loss(x, anew, inputs, targets, True)
assert jax.tree.structure(x) == jax.tree.structure(params)
at_x, at_y = float(evaluate(x, anew)), float(evaluate(params, state))
assert not jnp.allclose(x["linear"]["w"], params["linear"]["w"], rtol=1e-2), "x and y should differ"
assert at_x < 0.1 * jnp.mean(targets**2), at_x
print(f"loss at x {at_x:.4f}, at y {at_y:.4f}; x with y's statistics {evaluate(x, state):.4f}")
