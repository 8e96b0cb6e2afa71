"""Fine-tuning: load weights, then init the optimizer; freeze the body while the head is new."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpa_optax import annealed_adamw, eval_params, iterates


def features(body, inputs):
    return jnp.tanh(jnp.tanh(inputs @ body["first"]) @ body["second"])


def loss(params, batch):
    inputs, targets = batch
    return jnp.mean((features(params["body"], inputs) @ params["head"] - targets) ** 2)


def train(params, optimizer, batch, steps):
    opt_state = optimizer.init(params)

    @jax.jit
    def train_step(params, opt_state):
        updates, opt_state = optimizer.update(jax.grad(loss)(params, batch), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(steps):
        params, opt_state = train_step(params, opt_state)
    return params, opt_state


keys = jax.random.split(jax.random.key(0), 4)
inputs = jax.random.normal(keys[0], (256, 8))
params = {
    "body": {
        "first": jax.random.normal(keys[1], (8, 32)) / 3,
        "second": jax.random.normal(keys[2], (32, 32)) / 6,
    },
    "head": jnp.zeros((32, 1)),
}

# Pre-training, whose averaged weights are what is published.
pretraining = (inputs, jnp.sin(inputs[:, :1] + inputs[:, 1:2]))
params, opt_state = train(params, annealed_adamw(2e-2, 300, 60), pretraining, 300)
with tempfile.TemporaryDirectory() as folder:
    published = Path(folder, "body.npz")
    np.savez(published, **eval_params(opt_state, params)["body"])
    body = {name: jnp.asarray(array) for name, array in np.load(published).items()}

# A new head on the loaded body. First the head alone: frozen leaves have no x and no moments.
task = (inputs, jnp.cos(inputs[:, :1] + inputs[:, 1:2]))
params = {"body": body, "head": jnp.zeros((32, 1))}
start = loss(params, task)
head_only = optax.partition(
    {"train": annealed_adamw(2e-2, 200, 40), "freeze": optax.set_to_zero()},
    {"body": "freeze", "head": "train"},
)
params, opt_state = train(params, head_only, task, 200)
params = eval_params(opt_state, params)  # start again from the average
after_head = loss(params, task)
assert all(jnp.array_equal(params["body"][name], body[name]) for name in body)

# Then all of it, with a lower learning rate and a short warmup. These params are not what the last
# optimizer left behind, so the new one starts with init, where x = y = z = params.
optimizer = annealed_adamw(2e-3, 200, 10)
for iterate in iterates(optimizer.init(params), params):
    assert all(map(jnp.array_equal, jax.tree.leaves(iterate), jax.tree.leaves(params)))
params, opt_state = train(params, optimizer, task, 200)
x = eval_params(opt_state, params)
print(f"loss: {start:.3f} with a new head, {after_head:.3f} trained, {loss(x, task):.3f} in all")
assert loss(x, task) < after_head < start
