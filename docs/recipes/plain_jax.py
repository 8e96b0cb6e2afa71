"""A training loop in plain JAX: params are a dict, and nothing but optax is used."""

import functools

import jax
import jax.numpy as jnp
import optax

from gpa_optax import annealed_adamw, eval_params


def apply(params, inputs):
    hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"])
    return hidden @ params["last"]["kernel"] + params["last"]["bias"]


def loss(params, batch):
    inputs, targets = batch
    return jnp.mean((apply(params, inputs) - targets) ** 2)


def make_batch(key, size=128):
    inputs = jax.random.normal(key, (size, 4))
    noise = 0.1 * jax.random.normal(key, (size, 1))
    return inputs, jnp.sin(inputs.sum(axis=1, keepdims=True)) + noise


keys = jax.random.split(jax.random.key(0), 2)
params = {
    "first": {"kernel": jax.random.normal(keys[0], (4, 64)) / 2, "bias": jnp.zeros(64)},
    "last": {"kernel": jax.random.normal(keys[1], (64, 1)) / 8, "bias": jnp.zeros(1)},
}
steps = 300
# Twice the learning rate that is good for AdamW here, and a fifth of the run as warmup.
optimizer = optax.chain(
    optax.clip_by_global_norm(1.0), annealed_adamw(2e-2, steps, warmup_steps=steps // 5)
)
opt_state = optimizer.init(params)


@functools.partial(jax.jit, donate_argnums=(0, 1))  # updates params and state in place
def train_step(params, opt_state, batch):
    grads = jax.grad(loss)(params, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


validation = make_batch(jax.random.key(1), 1024)
start = loss(params, validation)
for step in range(steps):
    batch = make_batch(jax.random.fold_in(jax.random.key(2), step))
    params, opt_state = train_step(params, opt_state, batch)
    if (step + 1) % 100 == 0:
        x = eval_params(opt_state, params)  # evaluate, export and serve these, not params
        at_x, at_y = loss(x, validation), loss(params, validation)
        print(f"step {step + 1}: validation loss {at_x:.4f} at x, {at_y:.4f} at y")

assert at_x < 0.1 * start
