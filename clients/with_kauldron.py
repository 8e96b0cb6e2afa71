# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "kauldron~=1.4.4",
#     "optax",
#     # Its requirements leave these open, and pip alone searches long for what goes together.
#     "google-api-core~=2.44.0",
#     "google-cloud-aiplatform~=2.7.0",
#     "google-cloud-bigquery~=3.47.0",
#     "google-cloud-storage~=3.17.0",
#     "grpcio-status~=1.85.3",
#     "protobuf~=6.33.0",
# ]
# ///
"""Kauldron: an `InitTransform` gives an evaluator x; without one its params are y."""

import dataclasses
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from kauldron import kd, kontext

from gpa_optax import anytime_adamw, check_step, eval_params

inputs = np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32)
data = {"inputs": inputs, "targets": np.sin(inputs.sum(1, keepdims=True))}


class MLP(nn.Module):
    inputs: kontext.Key = kontext.REQUIRED

    @nn.compact
    def __call__(self, inputs):
        return nn.Dense(1)(nn.tanh(nn.Dense(32)(inputs)))


@dataclasses.dataclass(frozen=True)
class UseX(kd.ckpts.InitTransform):
    """Evaluates at x. The evaluator needs the optimizer's state: no `discard_opt`.

    Under `jit`, because Kauldron's loop refuses scalars of Python outside of it, as are used before
    the first update.
    """

    def transform(self, state):
        return state.replace(params=jax.jit(eval_params)(state.opt_state, state.params))


steps = 150
model = MLP(inputs="batch.inputs")
all_data = kd.data.InMemoryPipeline(loader=lambda: data, batch_size=256, num_epochs=1)
evaluations = {"at_x": UseX(), "at_y": kd.ckpts.NoopTransform()}
trainer = kd.train.Trainer(
    workdir=tempfile.mkdtemp(),
    train_ds=kd.data.InMemoryPipeline(loader=lambda: data, batch_size=64, shuffle=True),
    model=model,
    num_train_steps=steps,
    train_losses={"l2": kd.losses.L2(preds="preds", targets="batch.targets")},
    optimizer=anytime_adamw(0.02, warmup_steps=10),
    evals={
        name: kd.evals.Evaluator(
            run=kd.evals.EveryNSteps(50), ds=all_data, init_transform=transform
        )
        for name, transform in evaluations.items()
    },
    writer=None,
)
state, _ = trainer.train()


def loss(params):
    outputs = model.apply({"params": params}, data["inputs"])
    return float(jnp.mean((outputs - data["targets"]) ** 2))


x, y = eval_params(state.opt_state, state.params), state.params
at_x, at_y = (
    float(trainer.evals[name].evaluate(state, steps).compute(flatten=False).loss_values["l2"])
    for name in evaluations
)
assert np.isclose(at_x, loss(x), rtol=1e-4), (at_x, loss(x))
assert np.isclose(at_y, loss(y), rtol=1e-4), (at_y, loss(y))
assert not np.isclose(at_x, at_y, rtol=1e-3), "x and y should differ"
assert at_x < 0.2 * np.mean(data["targets"] ** 2), at_x

# A step more, which donates the state.
before = jax.tree.map(jnp.copy, (state.opt_state, state.params))
state, _ = trainer.trainstep.step(state, next(iter(trainer.train_ds)))
check_step(before, (state.opt_state, state.params))
print(f"loss of the evaluator at x {at_x:.4f}, of one without UseX {at_y:.4f}")
