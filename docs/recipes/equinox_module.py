"""Equinox: the optimizer sees the model's arrays, and x is combined with the rest again."""

import equinox as eqx
import jax
import jax.numpy as jnp

from gpa_optax import annealed_adamw, eval_params


def loss(model, batch):
    inputs, targets = batch
    return jnp.mean((jax.vmap(model)(inputs) - targets) ** 2)


def make_batch(key, size=128):
    inputs = jax.random.normal(key, (size, 4))
    return inputs, jnp.sin(inputs.sum(axis=1, keepdims=True))


model = eqx.nn.MLP(4, 1, 64, depth=1, activation=jnp.tanh, key=jax.random.key(0))
steps = 300
optimizer = annealed_adamw(2e-2, steps, warmup_steps=steps // 5)
opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))


@eqx.filter_jit
def train_step(model, opt_state, batch):
    grads = eqx.filter_grad(loss)(model, batch)
    params = eqx.filter(model, eqx.is_inexact_array)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return eqx.apply_updates(model, updates), opt_state


validation = make_batch(jax.random.key(1), 1024)
start = loss(model, validation)
for step in range(steps):
    batch = make_batch(jax.random.fold_in(jax.random.key(2), step))
    model, opt_state = train_step(model, opt_state, batch)
    if (step + 1) % 100 == 0:
        params, static = eqx.partition(model, eqx.is_inexact_array)
        eval_model = eqx.combine(eval_params(opt_state, params), static)
        at_x, at_y = loss(eval_model, validation), loss(model, validation)
        print(f"step {step + 1}: validation loss {at_x:.4f} at x, {at_y:.4f} at y")

assert at_x < 0.1 * start
