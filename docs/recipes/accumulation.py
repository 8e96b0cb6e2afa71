"""Gradient accumulation: optax.MultiSteps goes around GPA, which then counts updates."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpa_optax import annealed_adamw, eval_params


def loss(params, batch):
    inputs, targets = batch
    return jnp.mean((inputs @ params["kernel"] + params["bias"] - targets) ** 2)


def train(optimizer, batches):
    params = {"kernel": jnp.zeros((4, 1)), "bias": jnp.zeros(1)}
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, opt_state, batch):
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for batch in batches:
        params, opt_state = train_step(params, opt_state, batch)
    return params, opt_state


# Schedules, of the learning rate and of mu_x, count updates of 64 examples.
optimizer = annealed_adamw(0.1, steps=100, warmup_steps=20)

inputs = np.random.default_rng(0).normal(size=(100, 64, 4)).astype(np.float32)
targets = inputs.sum(axis=-1, keepdims=True)
whole = list(zip(inputs, targets, strict=True))
parts = list(zip(inputs.reshape(400, 16, 4), targets.reshape(400, 16, 1), strict=True))

params, opt_state = train(optax.MultiSteps(optimizer, 4), parts)
expected, expected_state = train(optimizer, whole)
x, expected_x = eval_params(opt_state, params), eval_params(expected_state, expected)
difference = max(
    jnp.abs(a - b).max()
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(expected_x), strict=True)
)
print(f"400 micro-batches of 16 and 100 batches of 64 give the same x, to {difference:.1e}")
assert difference < 1e-5
assert int(opt_state.inner_opt_state.count) == int(expected_state.count) == 100
assert loss(x, whole[0]) < 0.5 * loss(jax.tree.map(jnp.zeros_like, x), whole[0])
