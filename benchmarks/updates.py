"""The updates whose cost is measured, and the params that they update.

Used to compile them for other machines (compiled_cost), and to time them on a CPU (update_cost) and
on a GPU (accelerator). This module imports jax, optax and flax, and nothing that a machine with a
GPU may lack.
"""

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from optax import contrib

from examples.llama.model import PRESETS, Llama, LlamaConfig
from examples.optimizers import hidden_matrices
from gpa_optax import gpa, gpa_adamw, gpa_muon, single_worker_diloco

PERIOD = 32  # updates between two synchronizations with slow weights
RATE, DECAY = 1e-3, 0.1
TORCH_ADAMW = {
    "torch's AdamW, foreach": {"foreach": True},
    "torch's AdamW, fused": {"fused": True},
}


class Update(NamedTuple):
    """An optimizer, and what makes params in the form that it needs."""

    optimizer: optax.GradientTransformation
    params: Callable[[Any], Any] = lambda params: params
    between: optax.GradientTransformation | None = None
    """What runs in all updates but each `PERIOD`-th, which needs all arrays."""

    @property
    def periodic(self) -> bool:
        return self.between is not None

    def step(self, params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def arguments(self, shapes: Any, dtype: Any) -> tuple[Any, Any, Any]:
        """Shapes of the params, state and gradients, for params and gradients of a dtype."""
        grads = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
        params = jax.eval_shape(self.params, grads)
        return params, jax.eval_shape(self.optimizer.init, params), grads

    def least_bytes(self, shapes: Any, dtype: Any) -> float:
        """What an update has to move, from the shapes: each array that it needs read once, and each
        new one written once; the mean over a period if not every update needs the same."""
        arguments = self.arguments(shapes, dtype)
        whole = total_bytes(arguments) + total_bytes(jax.eval_shape(self.step, *arguments))
        if self.between is None:
            return whole
        usual = Update(self.between).least_bytes(shapes, dtype)
        return usual + (whole - usual) / PERIOD


def two_copies(params: Any) -> optax.LookaheadParams:
    """Optax's init_synced, which gives one array twice, cannot be donated."""
    return optax.LookaheadParams(fast=params, slow=jax.tree.map(jnp.copy, params))


def updates_of_adamw() -> dict[str, Update]:
    """AdamW, and everything around that same AdamW; the two without its first moment have b1=0."""
    adamw = optax.adamw(RATE, weight_decay=DECAY)
    return {
        "optax.adamw": Update(adamw),
        "gpa(adamw)": Update(gpa(adamw)),
        "gpa_adamw, b1=0": Update(gpa_adamw(RATE, b1=0.0, weight_decay=DECAY)),
        "schedule_free(adamw)": Update(contrib.schedule_free(adamw, RATE)),
        "schedule_free_adamw, b1=0": Update(contrib.schedule_free_adamw(RATE, weight_decay=DECAY)),
        "lookahead(adamw)": Update(optax.lookahead(adamw, PERIOD, 0.5), two_copies, adamw),
        "single_worker_diloco": Update(single_worker_diloco(adamw, PERIOD), between=adamw),
    }


def updates_of_muon() -> dict[str, Update]:
    """Muon for the matrices of the blocks, layer by layer, and AdamW for the rest."""
    return {
        "optax.contrib.muon": Update(
            contrib.muon(RATE, muon_weight_dimension_numbers=hidden_matrices)
        ),
        "gpa_muon": Update(gpa_muon(RATE, muon_weight_dimension_numbers=hidden_matrices)),
    }


def torch_optimizers() -> dict[str, Callable[[list], Any]]:
    """PyTorch's AdamW and that of schedulefree, as far as they are installed."""
    found, settings = {}, {"lr": RATE, "weight_decay": DECAY}
    if importlib.util.find_spec("torch"):
        from torch.optim import AdamW

        for name, form in TORCH_ADAMW.items():
            found[name] = functools.partial(AdamW, **settings, **form)
    if importlib.util.find_spec("schedulefree"):
        from schedulefree import AdamWScheduleFree

        def training(params: list) -> AdamWScheduleFree:
            optimizer = AdamWScheduleFree(params, foreach=True, **settings)
            optimizer.train()
            return optimizer

        found["schedulefree's AdamW"] = training
    return found


def shapes(preset: str | LlamaConfig) -> Any:
    """The params of a Llama, as shapes."""
    config = PRESETS[preset] if isinstance(preset, str) else preset
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def entries(tree: Any) -> int:
    """Entries of all leaves together: the number of a model's parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def total_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
