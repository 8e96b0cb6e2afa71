# /// script
# requires-python = ">=3.11"
# dependencies = ["google-tunix~=0.1.7", "optax"]
# ///
"""Tunix: hooks lend x to the model while it is evaluated, and give y back."""

import itertools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.sft.hooks import TrainingHooks
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

from gpa_optax import anytime_adamw, check_step, eval_params

PARAMS = nnx.Param  # nnx.LoRAParam for a model that has LoRA: what Tunix' optimizer trains


def x_of(trainer):
    """A copy, because the next step donates the optimizer's state."""
    params = nnx.state(trainer.model, PARAMS)
    return jax.tree.map(jnp.copy, eval_params(trainer.optimizer.opt_state, params))


class EvaluateAtX(TrainingHooks):
    """Tunix calls `on_eval_step_start` for each batch, and `on_eval_step_end` once, after all.

    Not in `on_train_end`: the last checkpoint is written after it, and has to hold y.
    """

    def __init__(self):
        self.y, self.seen, self.losses = None, [], []

    def on_eval_step_start(self, trainer):
        if self.y is None:
            self.y = jax.tree.map(jnp.copy, nnx.state(trainer.model, PARAMS))
            nnx.update(trainer.model, x_of(trainer))

    def on_eval_step_end(self, trainer, eval_loss):
        nnx.update(trainer.model, self.y)
        self.y = None
        self.losses.append(float(eval_loss))

    def on_train_step_start(self, trainer):
        now = trainer.optimizer.opt_state, nnx.state(trainer.model, PARAMS)
        self.seen.append(jax.tree.map(jnp.copy, now))

    def on_train_start(self, trainer): ...
    def on_train_end(self, trainer): ...
    def on_train_step_end(self, trainer, train_step, train_loss): ...


class MLP(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(4, 32, rngs=rngs), nnx.Linear(32, 1, rngs=rngs)

    def __call__(self, inputs):
        return self.out(nnx.tanh(self.hidden(inputs)))


def loss(model, inputs, targets):
    return jnp.mean((model(inputs) - targets) ** 2)


rng = np.random.default_rng(0)
inputs = rng.normal(size=(256, 4)).astype(np.float32)
everything = {"inputs": inputs, "targets": np.sin(inputs.sum(1, keepdims=True))}
steps = 120
batches = [
    {name: array[rows] for name, array in everything.items()}
    for rows in rng.integers(0, 256, size=(steps, 64))
]
model, hooks = MLP(nnx.Rngs(0)), EvaluateAtX()
optimizer = anytime_adamw(0.02, warmup_steps=10)
config = TrainingConfig(
    eval_every_n_steps=steps, max_steps=steps, checkpoint_root_directory=tempfile.mkdtemp()
)
trainer = PeftTrainer(model, optimizer, config)
trainer = trainer.with_loss_fn(loss)
trainer.with_training_hooks(hooks)
trainer.train(batches, [everything])

for before, after in itertools.pairwise(hooks.seen[11:]):
    check_step(before, after)

# The model trains on from y; x is for evaluation, and for export when training is over.
at_y = float(loss(model, **everything))
nnx.update(model, x_of(trainer))
at_x = float(loss(model, **everything))

# The last checkpoint holds y, and x beside it: a trainer that resumes from it has both.
resumed = PeftTrainer(MLP(nnx.Rngs(1)), optimizer, config)
assert np.isclose(loss(resumed.model, **everything), at_y, rtol=1e-4)
nnx.update(resumed.model, x_of(resumed))
assert np.isclose(loss(resumed.model, **everything), at_x, rtol=1e-4)

assert np.isclose(hooks.losses[-1], at_x, rtol=1e-4), (hooks.losses, at_x)
assert not np.isclose(at_x, at_y, rtol=1e-3), "x and y should differ"
assert at_x < 0.2 * np.mean(everything["targets"] ** 2), at_x
print(f"loss of Tunix' last evaluation {hooks.losses[-1]:.4f}, at x {at_x:.4f}, at y {at_y:.4f}")
