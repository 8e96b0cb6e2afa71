# /// script
# requires-python = ">=3.12"
# dependencies = [
#     "marin-levanter==0.2.227.dev40316220070",
#     "optax<0.2.7",
#     # Its requirements leave these open, and pip alone searches long for what goes together.
#     "datasets~=4.8.5",
#     "fsspec==2026.2.0",
#     "gcsfs==2026.2.0",
#     "google-api-core~=2.44.0",
#     "google-cloud-storage~=3.17.0",
#     "s3fs==2026.2.0",
#     "transformers~=5.12.1",
# ]
# ///
"""Levanter: GPA as an `OptimizerConfig` of its registry, and hooks that are called with x."""

import dataclasses
import itertools
import tempfile
from pathlib import Path

import equinox as eqx
import haliax as hax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from levanter.callbacks import compute_validation_loss
from levanter.optim.config import OptimizerConfig
from levanter.tracker.tracker import NoopConfig
from levanter.trainer import Trainer, TrainerConfig

from gpa_optax import anytime_adamw, check_step, eval_params


@OptimizerConfig.register_subclass("anytime_adamw")
@dataclasses.dataclass(frozen=True)
class AnytimeAdamWConfig(OptimizerConfig):
    """`optimizer: {type: anytime_adamw, learning_rate: 2e-3}` in a file, once this is imported."""

    max_grad_norm: float = 1.0

    def build(self, num_train_steps):
        optimizer = anytime_adamw(
            self.learning_rate,
            int(self.warmup * num_train_steps),
            weight_decay=self.weight_decay,
            mask=self.build_weight_decay_mask(),
        )
        return optax.chain(optax.clip_by_global_norm(self.max_grad_norm), optimizer)


def at_x(hook):
    """The hook, called with x in the model: `eval_model` is y otherwise."""

    def call(info):
        state = info.state
        x = eval_params(state.opt_state, state.trainable_model)
        state = dataclasses.replace(state, model=eqx.combine(x, state.model))
        return hook(dataclasses.replace(info, state=state))

    return call


Batch, In, Hidden, Out = hax.make_axes(batch=256, inputs=4, hidden=32, out=1)


def loss(model, batch, key=None):
    difference = model(batch["inputs"]) - batch["targets"]
    return hax.mean(difference * difference), {}


inputs = np.random.default_rng(0).normal(size=(256, 4)).astype(np.float32)
targets = np.sin(inputs.sum(1, keepdims=True))
everything = {
    "inputs": hax.named(jnp.array(inputs), (Batch, In)),
    "targets": hax.named(jnp.array(targets), (Batch, Out)),
}
folder = tempfile.mkdtemp()
config = TrainerConfig(
    id="gpa", num_train_steps=150, train_batch_size=256, tracker=NoopConfig(),
    require_accelerator=False, load_checkpoint=False, log_dir=Path(folder), log_jaxprs=False,
    log_xla_hlo=False,
)  # fmt: skip
config.initialize()
optimizer = AnytimeAdamWConfig(learning_rate=0.02, warmup=0.1).build(config.num_train_steps)
trainer = Trainer(config, optimizer, loss, add_default_hooks=False)
seen, found = [], {}


def keep(info):
    now = info.state.opt_state, info.state.trainable_model
    seen.append(jax.tree.map(jnp.copy, now))


with trainer:
    model = hax.nn.MLP.init(In, Out, Hidden, 2, key=jax.random.key(0))
    state = trainer.initial_state(jax.random.key(1), model=model)
    evaluate = compute_validation_loss(eqx.filter_jit(trainer.loss_fn), [everything])
    trainer.add_hook(lambda info: found.update(y=evaluate(info)), every=50)
    trainer.add_hook(at_x(lambda info: found.update(x=evaluate(info))), every=50)
    trainer.add_hook(keep)
    info = trainer.train(state, [everything] * config.num_train_steps)

    y = info.state.trainable_model
    x = eval_params(info.state.opt_state, y)
    expected = {
        name: float(loss(eqx.combine(params, info.model), everything)[0].array)
        for name, params in (("x", x), ("y", y))
    }
for before, after in itertools.pairwise(seen[16:26]):
    check_step(before, after)
for name in expected:
    assert np.isclose(found[name], expected[name], rtol=1e-4), (found, expected)
assert not np.isclose(found["x"], found["y"], rtol=1e-3), "x and y should differ"
assert found["x"] < 0.2 * np.mean(targets**2), found
print(f"loss of the hook at x {found['x']:.4f}, of one without at_x {found['y']:.4f}")
