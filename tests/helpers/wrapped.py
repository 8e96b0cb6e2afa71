"""GPA in every wrapper of optax, and every base that it is put around."""

import jax
import jax.numpy as jnp
import optax
import pytest

from gpa_optax import gpa, single_worker_diloco
from helpers.needs import marked, needs_optax

MU_X, MU_Y, LR = 0.9, 0.6, 0.1


def make(lr=LR, **arguments):
    return gpa(optax.adam(lr), MU_X, MU_Y, **arguments)


def gradient(t, params):
    return jax.tree.map(lambda p: 0.5 * p + jnp.sin(t + 1.0), params)


def everything(params):
    return jax.tree.map(lambda p: True, params)


# Wrappers that pass everything through: around GPA they must change nothing at all.
AROUND = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("first", optax.identity()), ("gpa", tx)),
    "nested chains": lambda tx: optax.chain(optax.chain(optax.chain(tx))),
    "masked": lambda tx: optax.masked(tx, everything),
    "partition": lambda tx: optax.partition(
        {"all": tx}, lambda p: jax.tree.map(lambda _: "all", p)
    ),
    "multi_transform": lambda tx: optax.multi_transform({"all": tx}, "all"),
    "selective_transform": lambda tx: optax.selective_transform(tx, freeze_mask=False),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "skip_not_finite": lambda tx: optax.MultiSteps(
        tx, 1, should_skip_update_fn=optax.skip_not_finite
    ).gradient_transformation(),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step, **_: step >= 0
    ),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, lambda step, **_: step >= 0),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(gpa)(optax.adam(LR), MU_X, MU_Y),
    "flatten": optax.flatten,
    "split_real_and_imaginary": optax.contrib.split_real_and_imaginary,
    "snapshot": lambda tx: optax.chain(optax.snapshot("g", lambda u: u), tx),
    "monitor": lambda tx: optax.chain(optax.monitor({"norm": optax.tree.norm}), tx),
    "zero_nans": lambda tx: optax.chain(optax.zero_nans(), tx),
}


in_every_wrapper = pytest.mark.parametrize(
    "name", marked(needs_optax("0.2.7", "optax.monitor"), AROUND, "monitor")
)

# Everything that optax offers as an optimizer, and GPA's own neighbours.
BASES = {
    "sgd": optax.sgd(LR),
    "adam": optax.adam(LR),
    "adamw": optax.adamw(LR),
    "lion": optax.lion(0.01),
    "adafactor": optax.adafactor(LR),
    "lamb": optax.lamb(LR),
    "muon": optax.contrib.muon(0.02),
    "rmsprop": optax.rmsprop(0.01),
    "adagrad": optax.adagrad(LR),
    "novograd": optax.novograd(0.01),
    "noisy_sgd": optax.noisy_sgd(LR),
    "chain": optax.chain(optax.clip(1.0), optax.trace(0.9), optax.scale_by_learning_rate(0.01)),
    "masked decay": optax.adamw(LR, mask=lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)),
    "injected": optax.inject_hyperparams(optax.adamw)(LR),
    "multisteps": optax.MultiSteps(optax.adam(LR), 2).gradient_transformation(),
    "apply_if_finite": optax.apply_if_finite(optax.adam(LR), 3),
    "partition": optax.partition(
        {"sgd": optax.sgd(LR), "adam": optax.adam(LR)}, {"a": "adam", "b": "sgd"}
    ),
    "prodigy": optax.contrib.prodigy(1.0),
    "schedule_free": optax.contrib.schedule_free_adamw(0.01),
    "diloco": single_worker_diloco(optax.adam(LR), 4),
    "sam": optax.contrib.sam(optax.adam(LR), optax.sgd(0.05), sync_period=3),
}
