"""BatchNorm: its running statistics belong to y, and are computed again at x before evaluation."""

import jax
import jax.numpy as jnp
from flax import nnx

from gpa_optax import anytime_adamw, eval_params


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 64, rngs=rngs)
        self.first_norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.second = nnx.Linear(64, 64, rngs=rngs)
        self.second_norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.last = nnx.Linear(64, 1, rngs=rngs)

    def __call__(self, inputs):
        hidden = jax.nn.relu(self.first_norm(self.first(inputs)))
        hidden = jax.nn.relu(self.second_norm(self.second(hidden)))
        return self.last(hidden)


def refresh_batch_stats(model, batches):
    """Sets the running statistics of every BatchNorm in `model` to their mean over `batches`."""
    norms = [node for _, node in nnx.iter_graph(model) if isinstance(node, nnx.BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    model.train()
    for count, inputs in enumerate(batches):
        for norm in norms:
            norm.momentum = count / (count + 1)  # of a running mean; the first batch replaces all
        model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()


def loss(model, batch):
    inputs, targets = batch
    return jnp.mean((model(inputs) - targets) ** 2)


def make_batch(key, size=32):
    inputs = jax.random.normal(key, (size, 4))
    return inputs, jnp.sin(inputs.sum(axis=1, keepdims=True))


batches = [make_batch(jax.random.fold_in(jax.random.key(2), step)) for step in range(300)]
validation = make_batch(jax.random.key(1), 1024)

model = Net(nnx.Rngs(0))
# Whose learning rate stays, so that x and y differ at every step.
optimizer = nnx.Optimizer(model, anytime_adamw(6e-2, warmup_steps=60), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, batch):
    optimizer.update(model, nnx.grad(loss)(model, batch))


start = loss(model, validation)
model.train()
for batch in batches:
    train_step(model, optimizer, batch)

eval_model = nnx.clone(model)
nnx.update(eval_model, eval_params(optimizer.opt_state, nnx.state(model, nnx.Param)))


def statistics():
    leaves = jax.tree.leaves(nnx.state(eval_model, nnx.BatchStat))
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])


of_y = statistics()
refresh_batch_stats(eval_model, [inputs for inputs, _ in batches[-20:]])
of_x, at_x = statistics(), loss(eval_model, validation)
refresh_batch_stats(eval_model, [inputs for inputs, _ in batches])  # what 20 batches estimate
exact = statistics()
before, after = jnp.linalg.norm(of_y - exact), jnp.linalg.norm(of_x - exact)
print(f"statistics are off by {before:.2f} as those of y, by {after:.2f} computed again")
print(f"validation loss at x: {start:.3f} before training, {at_x:.3f} after it")
assert after < 0.5 * before
assert at_x < 0.1 * start
