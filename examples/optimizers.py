"""The optimizers that the examples compare, each with its answer to: which weights to evaluate?"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import optax

from gpa_optax import averaging, eval_params, gpa_adamw


class Recipe(NamedTuple):
    """An optimizer, and the weights that it offers for evaluation, by name, the best one last."""

    optimizer: optax.GradientTransformation
    candidates: Callable[[optax.OptState, optax.Params], dict[str, optax.Params]]


@dataclasses.dataclass(frozen=True)
class AdamW:
    """AdamW with warmup and a cosine schedule to 0."""

    learning_rate: float = 1.6e-2
    """Peak learning rate."""
    warmup: float = 0.15
    """Part of the run in which the learning rate grows from 0 to its peak."""
    b1: float = 0.9
    """Decay of the first moment."""
    b2: float = 0.95
    """Decay of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices, multiplied by the learning rate."""

    def __post_init__(self):
        check_positive("--adamw.learning-rate", self.learning_rate)
        check_warmup("--adamw.warmup", self.warmup)

    def recipe(self, steps: int) -> Recipe:
        optimizer = optax.adamw(
            cosine(self.learning_rate, self.warmup, steps),
            b1=self.b1,
            b2=self.b2,
            weight_decay=self.weight_decay,
            mask=matrices,
        )
        return Recipe(clipped(optimizer), lambda opt_state, params: {"params": params})


@dataclasses.dataclass(frozen=True)
class GPAAdamW:
    """GPA around AdamW; the averaging window follows the learning rate."""

    learning_rate: float = 1.6e-2
    """Peak learning rate."""
    warmup: float = 0.15
    """Part of the run in which the learning rate grows from 0 to its peak."""
    window: float = 0.05
    """Length of the averaging window at the peak learning rate, as a fraction of the run."""
    mu_y: float = 0.9
    """How far the params lie from z towards the average."""
    b1: float = 0.0
    """Decay of the first moment; 0 keeps none, because mu_y is the momentum."""
    b2: float = 0.95
    """Decay of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices, multiplied by the learning rate."""

    def __post_init__(self):
        check_positive("--gpa-adamw.learning-rate", self.learning_rate)
        check_warmup("--gpa-adamw.warmup", self.warmup)
        check_positive("--gpa-adamw.window", self.window)

    def recipe(self, steps: int) -> Recipe:
        learning_rate = cosine(self.learning_rate, self.warmup, steps)
        mu_x = averaging.from_horizon(max(1, self.window * steps))
        optimizer = gpa_adamw(
            learning_rate,
            mu_x=averaging.annealed(mu_x, learning_rate, peak=self.learning_rate),
            mu_y=self.mu_y,
            b1=self.b1,
            b2=self.b2,
            weight_decay=self.weight_decay,
            mask=matrices,
        )
        return Recipe(
            clipped(optimizer),
            lambda opt_state, params: {"y": params, "x": eval_params(opt_state, params)},
        )


def check_positive(flag: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{flag} must be positive, got {value}.")


def check_warmup(flag: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{flag} must be in [0, 1), got {value}.")


def clipped(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def cosine(peak: float, warmup: float, steps: int) -> optax.Schedule:
    """Linear warmup over a part of the run, then a cosine to 0."""
    warmup_steps = max(1, round(warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, max(steps, warmup_steps + 1))


def matrices(params: optax.Params) -> optax.Params:
    """The leaves that decay: norms and biases do not."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)
