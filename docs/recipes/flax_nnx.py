"""Flax NNX: the model trains at y, and a clone of it is given x for evaluation."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from gpa_optax import annealed_adamw, eval_params


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 64, rngs=rngs)
        self.last = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.last(jnp.tanh(self.first(inputs)))


def loss(model, batch):
    inputs, targets = batch
    return jnp.mean((model(inputs) - targets) ** 2)


def make_batch(key, size=128):
    inputs = jax.random.normal(key, (size, 4))
    return inputs, jnp.sin(inputs.sum(axis=1, keepdims=True))


model = MLP(nnx.Rngs(0))
steps = 300
transformation = optax.chain(
    optax.clip_by_global_norm(1.0), annealed_adamw(2e-2, steps, warmup_steps=steps // 5)
)
optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)


@functools.partial(nnx.jit, donate_argnums=(0, 1))
def train_step(model, optimizer, batch):
    optimizer.update(model, nnx.grad(loss)(model, batch))


validation = make_batch(jax.random.key(1), 1024)
start = loss(model, validation)
for step in range(steps):
    train_step(model, optimizer, make_batch(jax.random.fold_in(jax.random.key(2), step)))
    if (step + 1) % 100 == 0:
        # The same filter as wrt; again for each evaluation, since the next step donates the arrays.
        x = eval_params(optimizer.opt_state, nnx.state(model, nnx.Param))
        eval_model = nnx.clone(model)
        nnx.update(eval_model, x)
        at_x, at_y = loss(eval_model, validation), loss(model, validation)
        print(f"step {step + 1}: validation loss {at_x:.4f} at x, {at_y:.4f} at y")

assert at_x < 0.1 * start
