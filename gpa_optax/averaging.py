r"""How fast the average moves: constants and schedules for the ``mu_x`` of `gpa_optax.gpa`.

After the update at step count :math:`t` (from 0), the average is
:math:`x_{t+1} = \mu_x(t)\, x_t + (1 - \mu_x(t))\, z_{t+1}`. The weight :math:`1 - \mu_x(t)` of the
newest iterate decides how many steps the average remembers: about :math:`1 / (1 - \mu_x)`.

`from_diloco` and `from_horizon` give constants; the others give an `AveragingSchedule`, which is an
optax schedule that also knows its weight.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpa_optax._validate import (
    check_at_least,
    check_concrete,
    check_fraction,
    check_learning_rate,
    check_number,
    check_positive,
    check_schedule,
    is_traced,
)

__all__ = [
    "AveragingSchedule",
    "annealed",
    "from_diloco",
    "from_horizon",
    "lr_weighted",
    "polynomial",
    "uniform",
    "warmed_up",
]


_CONSTANT = "Give a constant such as 0.99, or averaging.from_horizon(steps)."


@dataclasses.dataclass(frozen=True)
class AveragingSchedule:
    """A schedule for ``mu_x`` that is given by the weight of the newest iterate, ``1 - mu_x``.

    Close to 1, ``mu_x`` in float32 has few digits left for ``1 - mu_x``: at step 10 million of a
    uniform average the weight 1e-7 would be off by 19 %. `gpa_optax.gpa` therefore takes the weight
    itself. Calling the schedule gives ``mu_x``, for plots and for everything else that takes an
    optax schedule; within `optax.inject_hyperparams` name ``mu_x`` in ``static_args``, so that gpa
    receives the schedule and not its rounded value.

    Attributes:
      weight: ``1 - mu_x`` as a function of the step count (int scalar or array, from 0), traceable.

    Raises:
      TypeError: if ``weight`` is no function of the step count.

    Examples:
      >>> from gpa_optax.averaging import AveragingSchedule, uniform
      >>> print(f"{uniform()(3):.2f} {uniform().weight(3):.2f}")
      0.75 0.25
      >>> halving = AveragingSchedule(lambda count: 0.5 ** (1 + count / 1000))
      >>> print(halving(0), halving(1000))
      0.5 0.75
    """

    weight: Callable[[jax.typing.ArrayLike], jax.typing.ArrayLike]

    def __post_init__(self) -> None:
        example = "lambda count: 1 / (count + 1)"
        if not callable(self.weight):
            raise TypeError(
                f"weight must be a function of the step count, got {self.weight!r}. Give one, such "
                f"as {example}; a constant mu_x needs no AveragingSchedule."
            )
        check_schedule("weight", self.weight, example)

    def __call__(self, count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
        return 1 - self.weight(count)


def from_diloco(inner_steps: float, outer_momentum: float = 0.9) -> float:
    r"""The ``mu_x`` that smooths single-worker DiLoCo: :math:`\mu^{1/H}`.

    Over ``inner_steps`` steps the average decays as much as DiLoCo's outer momentum does in one
    synchronization.

    Args:
      inner_steps: DiLoCo's number of inner steps :math:`H` between synchronizations, at least 1.
      outer_momentum: the momentum :math:`\mu` of DiLoCo's outer optimizer, in [0, 1).

    Returns:
      ``mu_x`` as a float.

    Raises:
      ValueError: if an argument is out of its range.

    Examples:
      >>> from gpa_optax import averaging
      >>> print([round(averaging.from_diloco(h), 4) for h in (1, 4, 8, 16, 32, 64, 128)])
      [0.9, 0.974, 0.9869, 0.9934, 0.9967, 0.9984, 0.9992]

    References:
      Defazio et al., `Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs
      <https://arxiv.org/abs/2512.17131>`_, 2025
    """
    remedy = "Give DiLoCo's steps between syncs, such as 32."
    check_at_least("inner_steps", inner_steps, 1, remedy)
    check_fraction("outer_momentum", outer_momentum, "Give DiLoCo's outer momentum, such as 0.9.")
    return _below_one("inner_steps", inner_steps, outer_momentum ** (1 / inner_steps), remedy)


def from_horizon(steps: float) -> float:
    """The ``mu_x`` of an average that remembers about ``steps`` steps: ``1 - 1 / steps``.

    Args:
      steps: the length of the averaging window, in steps, at least 1. Keep it short against the
        run: at a horizon of 300 a run of 600 steps never forgets its initialization.

    Returns:
      ``mu_x`` as a float.

    Raises:
      ValueError: if ``steps`` is below 1, not finite, or so large that ``mu_x`` rounds to 1.

    Examples:
      >>> from gpa_optax import averaging
      >>> averaging.from_horizon(100)
      0.99
    """
    remedy = "Give the averaging window in steps, such as 100."
    check_at_least("steps", steps, 1, remedy)
    return _below_one("steps", steps, 1 - 1 / steps, remedy)


def _below_one(name: str, value: float, mu_x: float, remedy: str) -> float:
    """`mu_x`; ValueError where `value` is so large that it rounds to 1, which stops the average."""
    if not is_traced(mu_x) and mu_x == 1:
        raise ValueError(f"{name} must be small enough for mu_x < 1, got {value!r}. {remedy}")
    return mu_x


def uniform() -> AveragingSchedule:
    r"""The plain average of all iterates: :math:`\mu_x(t) = t / (t + 1)`.

    With it GPA is Schedule-Free, with beta = ``mu_y`` and a constant learning rate; for a learning
    rate with warmup see `lr_weighted`.

    Examples:
      >>> from gpa_optax import averaging
      >>> print([round(float(averaging.uniform()(t)), 3) for t in range(4)])
      [0.0, 0.5, 0.667, 0.75]

    References:
      Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024
    """
    return AveragingSchedule(_uniform_weight)


def _uniform_weight(count: jax.typing.ArrayLike) -> jax.Array:
    return 1 / (_as_float(count) + 1)


def _numpy_of(value: Any) -> Any:
    """NumPy, with float64, where the values are known, and jax.numpy where they are traced."""
    return jnp if is_traced(value) else np


def _as_float(count: jax.typing.ArrayLike) -> jax.Array:
    return jnp.asarray(count, float)


def polynomial(power: float) -> AveragingSchedule:
    r"""An average that weighs the iterate of step t by :math:`(t + 1)^p`.

    :math:`\mu_x(t) = 1 - (t + 1)^p / \sum_{s=0}^{t} (s + 1)^p`: a power of 0 is `uniform`, a higher
    one forgets the early iterates, remembering about the last :math:`1 / (p + 1)` of the run
    however long it gets. The sum is exact up to a step count of a few times the power and comes
    from the Euler-Maclaurin formula after it, to float32's precision.

    Args:
      power: the exponent :math:`p`, from 0 to 1000.

    Raises:
      TypeError: if ``power`` is traced: a table is computed from it.
      ValueError: if it is out of its range.

    Examples:
      >>> from gpa_optax import averaging
      >>> print([round(float(averaging.polynomial(1).weight(t)), 3) for t in range(4)])
      [1.0, 0.667, 0.5, 0.4]
    """
    remedy = "Give a number from 0, which is a uniform average, to 1000; 1 and 2 are usual."
    check_concrete("power", power, remedy)
    check_at_least("power", power, 0, remedy)
    if power > 1000:
        raise ValueError(f"power must be at most 1000, got {power!r}. {remedy}")
    return _continued(np.ones(1), power)


def _continued(table: Any, power: float) -> AveragingSchedule:
    """First the weights of a table; after it, iterates weigh as (t + 1)^power.

    The weight of iterate n is 1 over the sum of (k / n)^power up to k = n. The table is extended
    until the Euler-Maclaurin formula for that sum is exact to float32: its error is of order
    (power / n)^5 / 30000.
    """

    def euler_maclaurin(n):
        return (
            n / (power + 1)
            + 1 / 2
            + power / 12 / n
            - power * (power - 1) * (power - 2) / 720 / n**3
        )

    inverse, more = 1 / table[-1], []
    for n in range(len(table), max(16, 4 * math.ceil(power))):
        inverse = inverse * (n / (n + 1)) ** power + 1
        more.append(1 / inverse)
    table = _numpy_of(inverse).concatenate([table, _numpy_of(inverse).asarray(more, table.dtype)])
    last = len(table)
    remainder = inverse - euler_maclaurin(last)

    def weight(count: jax.typing.ArrayLike) -> jax.Array:
        n = _as_float(count) + 1
        late = 1 / (euler_maclaurin(n) + remainder * (last / n) ** power)
        early = jnp.asarray(table, n.dtype)[jnp.clip(count, 0, last - 1)]
        return jnp.where(n <= last, early, late)

    return AveragingSchedule(weight)


def warmed_up(mu_x: float) -> AveragingSchedule:
    r"""A constant ``mu_x`` after a uniform start: :math:`\min(t / (t + 1), \mu_x)`.

    The first :math:`1 / (1 - \mu_x)` iterates are averaged uniformly, so that the initialization
    is forgotten at once.

    Args:
      mu_x: the constant, in [0, 1).

    Raises:
      ValueError: if ``mu_x`` is out of its range.

    Examples:
      >>> from gpa_optax import averaging
      >>> print([round(float(averaging.warmed_up(0.6)(t)), 3) for t in range(4)])
      [0.0, 0.5, 0.6, 0.6]
    """
    check_fraction("mu_x", mu_x, _CONSTANT)
    return AveragingSchedule(lambda count: jnp.maximum(_uniform_weight(count), 1 - mu_x))


def annealed(mu_x: float, learning_rate: optax.Schedule, peak: float) -> AveragingSchedule:
    r"""A window that follows the learning rate.

    .. math::

      \mu_x(t) = \min\left(\frac{t}{t + 1},\
        1 - \frac{1}{\max(1,\ \eta(t) / \eta_{\max} / (1 - \mu_x))}\right)

    At the peak learning rate the window is ``1 / (1 - mu_x)`` steps; it shrinks in proportion to
    the learning rate, down to the last iterate alone: where annealing has removed the noise,
    averaging only lags.

    Args:
      mu_x: the constant that holds at the peak, in [0, 1).
      learning_rate: the schedule that the base optimizer uses, a function of the step count.
      peak: its largest value, positive. The schedule is sampled to see whether it is.

    Raises:
      TypeError: if ``learning_rate`` is no schedule.
      ValueError: if ``mu_x`` or ``peak`` is out of its range, or ``learning_rate`` is larger than
        ``peak`` somewhere, or not even half of it anywhere.

    Examples:
      >>> import optax
      >>> from gpa_optax import averaging
      >>> learning_rate = optax.linear_schedule(0.1, 0.0, transition_steps=100)
      >>> mu_x = averaging.annealed(0.95, learning_rate, peak=0.1)
      >>> print([round(float(mu_x(t)), 3) for t in (0, 10, 50, 90, 100)])
      [0.0, 0.909, 0.9, 0.5, 0.0]
    """
    check_fraction("mu_x", mu_x, _CONSTANT)
    if not callable(learning_rate):
        raise TypeError(
            f"learning_rate must be a schedule, got {learning_rate!r}. Give the base optimizer's, "
            "or use averaging.warmed_up(mu_x) if it is constant."
        )
    check_learning_rate("learning_rate", learning_rate)
    remedy = "Give the schedule's largest value."
    check_positive("peak", peak, remedy)
    # The first 256 steps, and then points that are 2 % apart, up to a million.
    rates = _sampled(learning_rate, np.append(np.arange(256), np.geomspace(256, 1e6, 420)))
    if not is_traced(rates) and not is_traced(peak):
        highest = np.max(np.asarray(rates, np.float64))
        if not 0.5 * peak <= highest <= 1.001 * peak:
            raise ValueError(
                f"peak must be the largest value of learning_rate, got {peak!r}, where it reaches "
                f"{highest:.4g}. {remedy}"
            )

    def weight(count: jax.typing.ArrayLike) -> jax.Array:
        window = jnp.asarray(learning_rate(count)) / peak / (1 - mu_x)
        return jnp.maximum(_uniform_weight(count), 1 / jnp.maximum(1, window))

    return AveragingSchedule(weight)


def _sampled(schedule: optax.Schedule, counts: np.ndarray) -> Any:
    """The schedule's values: concrete even under a trace, unless they depend on traced values."""
    with jax.ensure_compile_time_eval():
        return jax.vmap(schedule)(jnp.asarray(counts, jnp.int32))


def lr_weighted(
    learning_rate: optax.ScalarOrSchedule,
    warmup_steps: int,
    power: float = 2,
    *,
    step_power: float = 0,
    start: int = 0,
) -> AveragingSchedule:
    r"""Schedule-Free's average under warmup: iterates weigh as their learning rate.

    .. math::

      w_t = (t + 1)^r \left(\max_{s \le t} \eta(s)\right)^p, \qquad
      \mu_x(t) = 1 - \frac{w_t}{w_c + \dots + w_t} \quad (t \ge c)

    The learning rate is read for the first ``warmup_steps`` + 1 steps, when the schedule is made;
    afterwards the largest of these values counts, so the schedule stays a function of the count.

    ScheduleFree+ has :math:`r` of 0 or 2, and starts the average at one or two times the warmup.

    Args:
      learning_rate: the schedule that the base optimizer uses (or its constant value). Its scale
        does not matter. It may depend on traced values, such as a peak that `jax.vmap` maps over.
      warmup_steps: the number of steps in which it grows, from 0 to 10 million.
      power: the exponent :math:`p`, at least 0. 2 is Schedule-Free's; 0 is a uniform average.
      step_power: the exponent :math:`r`, from 0 to 1000: how much more late iterates weigh.
      start: the step :math:`c` with which the average starts, from 0 to 10 million. Before it
        :math:`\mu_x` is 0, and so x = y = z.

    Raises:
      TypeError: if an argument other than ``learning_rate`` is traced: a table is computed from it.
      ValueError: if an argument is out of its range, or if the learning rate is negative, not
        finite or always 0 during the warmup, or still grows in the step after it.

    Examples:
      >>> import optax
      >>> from gpa_optax import averaging
      >>> learning_rate = optax.warmup_constant_schedule(0.0, 0.1, warmup_steps=4)
      >>> mu_x = averaging.lr_weighted(learning_rate, warmup_steps=4)
      >>> print([round(float(mu_x(t)), 3) for t in range(7)])
      [0.0, 0.0, 0.2, 0.357, 0.467, 0.652, 0.742]
      >>> late = averaging.lr_weighted(learning_rate, warmup_steps=4, step_power=2, start=4)
      >>> print([round(float(late(t)), 3) for t in range(7)])
      [0.0, 0.0, 0.0, 0.0, 0.0, 0.41, 0.555]

    References:
      Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024

      `ScheduleFree+ <https://arxiv.org/abs/2605.19095>`_, 2026
    """
    remedy = "Give the schedule of the base optimizer, or its constant learning rate."
    numbers = {
        "warmup_steps": (warmup_steps, "Give the steps of warmup, or 0."),
        "power": (power, "Give 2 for Schedule-Free, 0 for a uniform average."),
        "step_power": (step_power, "Give 0, or 2 for ScheduleFree+ at long runs."),
        "start": (start, "Give the step at which the average starts, or 0."),
    }
    for name, (value, what) in numbers.items():
        steps = name in ("warmup_steps", "start")
        check_concrete(name, value, "Give a number that does not depend on traced values.")
        check_at_least(name, value, 0, what, whole=steps)
        if (steps and value > 10_000_000) or (name == "step_power" and value > 1000):
            most = "10,000,000" if steps else "1000"  # a table has as many entries
            raise ValueError(f"{name} must be at most {most}, got {value!r}. {what}")
    if callable(learning_rate):
        check_learning_rate("learning_rate", learning_rate)
    elif not is_traced(learning_rate):
        check_number("learning_rate", learning_rate, remedy)

    counts = np.arange(int(warmup_steps) + 2)
    rates = _sampled(learning_rate, counts) if callable(learning_rate) else learning_rate
    traced = is_traced(rates)  # such a rate has no values to check
    xp = _numpy_of(rates)
    rates = xp.broadcast_to(xp.asarray(rates, float), counts.shape)
    rates, after = rates[:-1], rates[-1]
    if not traced and not (np.isfinite(rates).all() and (rates >= 0).all() and rates.max() > 0):
        raise ValueError(
            "learning_rate must be finite, at least 0 and not always 0 in the first "
            f"{warmup_steps} + 1 steps, got values from {rates.min()} to {rates.max()}. {remedy}"
        )
    if not traced and after > rates.max() * (1 + 1e-6):
        raise ValueError(
            f"warmup_steps must be the steps in which learning_rate grows, got {warmup_steps}, "
            f"after which it still grows from {rates.max():.4g} to {after:.4g}. "
            f"{numbers['warmup_steps'][1]}"
        )
    n = np.arange(1, max(int(warmup_steps), int(start)) + 2, dtype=np.float64)
    largest = jax.lax.cummax(jnp.asarray(rates)) if traced else np.maximum.accumulate(rates)
    largest = largest[np.minimum(n, len(rates)).astype(int) - 1]
    weights = (largest / largest[-1]) ** power * (n / n[-1]) ** step_power * (n > start)
    totals = xp.cumsum(weights)
    # Before the first positive weight nothing is averaged: x follows z.
    return _continued(
        xp.where(totals > 0, weights / xp.where(totals > 0, totals, 1), 1), step_power
    )
