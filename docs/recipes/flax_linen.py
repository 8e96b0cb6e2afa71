"""Flax Linen, with a TrainState."""

import jax
import jax.numpy as jnp
from flax import linen
from flax.training.train_state import TrainState

from gpa_optax import annealed_adamw, eval_params


class MLP(linen.Module):
    @linen.compact
    def __call__(self, inputs):
        return linen.Dense(1)(jnp.tanh(linen.Dense(64)(inputs)))


def make_batch(key, size=128):
    inputs = jax.random.normal(key, (size, 4))
    return inputs, jnp.sin(inputs.sum(axis=1, keepdims=True))


model = MLP()
params = model.init(jax.random.key(0), jnp.zeros((1, 4)))["params"]
steps = 300
state = TrainState.create(
    apply_fn=model.apply,
    params=params,
    tx=annealed_adamw(2e-2, steps, warmup_steps=steps // 5),
)


def loss(params, batch):
    inputs, targets = batch
    return jnp.mean((model.apply({"params": params}, inputs) - targets) ** 2)


@jax.jit
def train_step(state, batch):
    return state.apply_gradients(grads=jax.grad(loss)(state.params, batch))


validation = make_batch(jax.random.key(1), 1024)
start = loss(state.params, validation)
for step in range(steps):
    state = train_step(state, make_batch(jax.random.fold_in(jax.random.key(2), step)))
    if (step + 1) % 100 == 0:
        x = eval_params(state.opt_state, state.params)
        at_x, at_y = loss(x, validation), loss(state.params, validation)
        print(f"step {step + 1}: validation loss {at_x:.4f} at x, {at_y:.4f} at y")

assert at_x < 0.1 * start
