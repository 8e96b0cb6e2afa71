"""The statistics of the studies, on plain arrays; nothing here knows what was trained.

Losses of several runs are an array of (seeds, evaluations), with one row for each seed, and `steps`
are those of the evaluations, the last of which is the length of the runs. The rows of a contender
and of its baseline are pairs: they have the seed, and so initialization and batches, in common.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

LEVEL = 0.95
RESAMPLES = 2000


class Estimate(NamedTuple):
    """A mean over seeds."""

    mean: float
    low: float
    high: float
    """Ends of the 95 % interval."""
    p: float
    """Two-sided p-value of the hypothesis that the mean is 0."""


def estimate(values: Sequence[float]) -> Estimate:
    """Estimates a mean, such as that of paired differences, by Student's t."""
    if np.ptp(values) == 0:  # such as all 0
        return Estimate(values[0], values[0], values[0], float(values[0] == 0))
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(LEVEL)
    return Estimate(float(np.mean(values)), float(low), float(high), float(test.pvalue))


class Curve(NamedTuple):
    """Losses of several runs, averaged over their seeds."""

    steps: list[float]
    mean: list[float]
    error: list[float]
    """The standard error of the mean."""


def mean_curve(steps: Sequence[float], losses: ArrayLike) -> Curve:
    losses = np.asarray(losses)
    error = losses.std(axis=0, ddof=1) / len(losses) ** 0.5
    return Curve([*steps], losses.mean(axis=0).tolist(), error.tolist())


def prediction_interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float]:
    """Where one new value of the same kind lies, such as the gain in a condition not yet tried.

    mean +- t s sqrt(1 + 1 / n): of normal values, with n - 1 degrees of freedom.
    """
    n = len(values)
    reach = stats.t.ppf(0.5 + level / 2, n - 1) * np.std(values, ddof=1) * np.sqrt(1 + 1 / n)
    return float(np.mean(values) - reach), float(np.mean(values) + reach)


def detectable(differences: Sequence[float], power: float = 0.8) -> float:
    """The mean difference that a paired t-test finds with this power, at p < 0.05, if differences
    vary between seeds as these do."""
    n = len(differences)
    critical = stats.t.ppf(0.5 + LEVEL / 2, n - 1)

    # The other tail is negligible at any power that is of interest.
    shift = optimize.brentq(lambda shift: stats.nct.sf(critical, n - 1, shift) - power, 0.0, 20.0)
    return float(shift * np.std(differences, ddof=1) / np.sqrt(n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: below 0.05 are those that hold for the whole family of tests."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    raised = np.minimum(np.maximum.accumulate(factors * np.asarray(p_values)[order]), 1.0)
    corrected = np.empty(len(p_values))
    corrected[order] = raised
    return corrected.tolist()


def step_at(steps: ArrayLike, curve: ArrayLike, target: float) -> float:
    """From where on a curve stays at the target or below, interpolated between two evaluations.

    It is the first evaluation if the curve is always there, and the last one if only its end is
    there, or not even that.
    """
    steps, curve = np.asarray(steps, float), np.asarray(curve, float)
    above = np.flatnonzero(~(curve <= target))
    if len(above) == 0:
        return float(steps[0])
    last = above[-1]
    if last == len(curve) - 1:
        return float(steps[-1])
    part = (curve[last] - target) / (curve[last] - curve[last + 1])
    return float(steps[last] + part * (steps[last + 1] - steps[last]))


def signed_saving(steps: ArrayLike, contender: ArrayLike, baseline: ArrayLike) -> float:
    """The part of the steps that a contender saves, read off the two mean curves.

    Where it ends at the baseline's last loss or below: the part of the run after it got there for
    good. Where it ends above: minus what the baseline saves to the contender's last loss. So it
    changes its sign when the two are exchanged, and is 0 on average where they are alike.
    """
    ours, theirs = np.mean(contender, axis=0), np.mean(baseline, axis=0)
    length = np.asarray(steps)[-1]
    if ours[-1] <= theirs[-1]:
        return 1 - step_at(steps, ours, theirs[-1]) / length
    return step_at(steps, theirs, ours[-1]) / length - 1


def bootstrap(
    statistic: Callable[..., float],
    *samples: ArrayLike,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile interval of a statistic, over seeds: the same rows of all samples are drawn
    with replacement. With few seeds it is somewhat too short, as all percentile intervals are."""
    samples = [np.asarray(sample) for sample in samples]
    n = len(samples[0])
    draws = np.random.default_rng(seed).integers(0, n, (resamples, n))
    found = [statistic(*(sample[rows] for sample in samples)) for rows in draws]
    low, high = np.quantile(found, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def trend(
    statistic: Callable[[Any, Any], float],
    features: ArrayLike,
    samples: Sequence[tuple[ArrayLike, ArrayLike]],
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[tuple[float, float, float]]:
    """The coefficients of a least-squares fit, each with its percentile interval over seeds.

    Args:
      statistic: of a contender and its baseline, such as a saving.
      features: a row for each condition and a column for each coefficient.
      samples: contender and baseline of each condition; each draws its seeds independently.
    """
    pairs = [(np.asarray(ours), np.asarray(theirs)) for ours, theirs in samples]
    random = np.random.default_rng(seed)

    def fitted(drawn: Sequence[tuple[NDArray, NDArray]]) -> NDArray[np.float64]:
        return np.linalg.lstsq(np.asarray(features, float), [statistic(*pair) for pair in drawn])[0]

    def resampled() -> Iterator[tuple[NDArray, NDArray]]:
        for ours, theirs in pairs:
            rows = random.integers(0, len(ours), len(ours))
            yield ours[rows], theirs[rows]

    found = [fitted([*resampled()]) for _ in range(resamples)]
    ends = np.quantile(found, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return [
        (float(v), float(low), float(high))
        for v, low, high in zip(fitted(pairs), *ends, strict=True)
    ]


def against_itself(
    statistic: Callable[[Any, Any], float],
    baseline: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> NDArray[np.float64]:
    """The statistic of the baseline against itself on other seeds: of two samples, each as large as
    the baseline, drawn from its runs independently and with replacement. They are not paired, so
    this is wider than the noise of a contrast whose runs are."""
    baseline = np.asarray(baseline)
    n = len(baseline)
    draws = np.random.default_rng(seed).integers(0, n, (resamples, 2, n))
    return np.array([statistic(baseline[ours], baseline[theirs]) for ours, theirs in draws])


def exchanged(
    statistic: Callable[[Any, Any], float],
    contender: ArrayLike,
    baseline: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Values of the statistic if contender and baseline do not differ: then it does not matter
    which run of a pair is whose. One for each way of exchanging them, or for `resamples` random
    ways if there are more."""
    contender, baseline = np.asarray(contender), np.asarray(baseline)
    n = len(contender)
    if 2**n <= resamples:
        ways = np.array(list(itertools.product([False, True], repeat=n)))
    else:
        ways = np.random.default_rng(seed).random((resamples, n)) < 0.5
    at = (slice(None), *(None,) * (contender.ndim - 1))
    return np.array(
        [
            statistic(
                np.where(way[at], baseline, contender), np.where(way[at], contender, baseline)
            )
            for way in ways
        ]
    )
