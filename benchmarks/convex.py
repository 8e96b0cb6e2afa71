"""GPA's x on convex problems, against what its base gives: python -m benchmarks.convex

The paper proves that GPA keeps the guarantee of its base optimizer where the loss is convex. Why it
can: with a = mu_x / (1 - mu_x), convexity gives at every step

    F(x_t) - F* + a (F(x_t) - F(x_{t-1})) <= <grad F(y_t), z_t - x*>

and the right-hand sides sum to the base's regret, whatever mu_y. A uniform average has a = t - 1:
the left-hand sides telescope to T (F(x_T) - F*), a bound on the last x. With a constant mu_x the
bound is on the mean of F(x_t) over the run, and a (F(x_0) - F*) / T comes on top, which does not
vanish where the window is a fixed part of the run.

Measured here is F - F* at the end of runs of T steps, for logistic regression on real data and for
least squares, with SGD as the base. Learning rates come from one grid: the best of each method for
each T, chosen on seeds of their own, and the rate of the theory, the same for all. All methods see
the same batches. Everything is in float64. Writes benchmarks/results/convex.json, from which the
table and the figure are made.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.datasets import load_digits

from benchmarks import quick_file
from examples.files import write_whole
from examples.plots import COLOURS
from examples.run_folder import to_store
from gpa_optax import averaging, eval_params, gpa


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures F - F* of GPA's x, and of SGD's last and averaged iterate, over the horizon T."""

    horizons: tuple[int, ...] = (64, 256, 1024, 4096, 16384)
    """Lengths T of the runs, in steps."""
    rates: tuple[float, ...] = tuple(2.0**k for k in range(-7, 6))
    """The grid of learning rates."""
    tuning_seeds: int = 6
    """Seeds on which the learning rates are chosen."""
    seeds: int = 12
    """Seeds of the results, different from those."""
    batch_size: int = 8
    """Samples of a gradient, drawn with replacement."""
    quick: bool = False
    """The short form: short horizons, a coarser grid, fewer seeds."""
    out: Path = Path("benchmarks/results/convex.json")
    """File for the results. Default with --quick: in runs/bench."""


QUICK = {
    "horizons": (16, 64, 256),
    "rates": tuple(4.0**k for k in range(-3, 3)),
    "tuning_seeds": 2,
    "seeds": 6,
}


Horizon = jax.typing.ArrayLike
AVERAGES: dict[str, Callable[[Horizon], optax.ScalarOrSchedule]] = {
    "uniform": lambda T: averaging.uniform(),
    "polynomial(3)": lambda T: averaging.polynomial(3),
    "1 - 20/T": lambda T: averaging.from_horizon(T / 20),
    "1 - 5/T": lambda T: averaging.from_horizon(T / 5),
    "1 - 1/T": lambda T: averaging.from_horizon(T),
    "1 - 1/sqrt(T)": lambda T: averaging.from_horizon(jnp.sqrt(T)),
    "warmed_up(1 - 5/T)": lambda T: averaging.warmed_up(averaging.from_horizon(T / 5)),
    "0.9": lambda T: 0.9,
    "0.99": lambda T: 0.99,
    "0.9967": lambda T: 0.9967,
}
METHODS = (
    *(("uniform", mu_y) for mu_y in (0.0, 0.5, 0.9, 0.98)),
    *((name, mu_y) for name in ("1 - 20/T", "1 - 5/T", "1 - 1/T") for mu_y in (0.0, 0.9)),
    ("1 - 1/sqrt(T)", 0.9),
    ("warmed_up(1 - 5/T)", 0.9),
    *(("polynomial(3)", mu_y) for mu_y in (0.0, 0.9)),
    *(("0.99", mu_y) for mu_y in (0.0, 0.9)),
    ("0.9", 0.9),
    ("0.99", 0.99),
    ("0.9967", 0.7),
)
# The learning rate at step t, as a part of the first one.
DECAYS: dict[str, Callable[[Any, Horizon], jax.typing.ArrayLike]] = {
    "constant": lambda t, T: 1.0,
    "1/sqrt(t)": lambda t, T: (t + 1.0) ** -0.5,
    "linear": lambda t, T: 1 - t / T,
}
ITERATES = ("last", "averaged")


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """A convex loss with its minimizer; runs start at 0."""

    minimizer: jax.Array
    sample: Callable[[jax.Array], Any]
    """A random key -> a batch."""
    loss: Callable[[jax.Array, Any], jax.Array]
    """Weights, batch -> an unbiased estimate of F."""
    gap: Callable[[jax.Array], jax.Array]
    """Weights -> F - F*."""

    def scales(self) -> dict[str, float]:
        """What the theory's learning rate, D / (G sqrt(T)), is computed from."""
        start = jnp.zeros_like(self.minimizer)
        grads = jax.vmap(lambda key: jax.grad(self.loss)(start, self.sample(key)))(
            jax.random.split(jax.random.key(1), 4096)
        )
        return {
            "dimension": len(start),
            "D": float(jnp.linalg.norm(self.minimizer)),
            "G": float(jnp.sqrt(jnp.mean(jnp.sum(grads**2, axis=1)))),
            "gap at the start": float(self.gap(start)),
        }


def logistic_regression(batch_size: int, ridge: float = 1e-4) -> Problem:
    """Odd digits from even ones, in scikit-learn's 1,797 images of 8 x 8 standardized pixels.

    The ridge is there because two pixels are inked in few images, all of one class: without it they
    would move the minimizer to infinity. It is small against 1 / (learning rate * T) in nearly all
    runs, which therefore do not see strong convexity.
    """
    pixels, digits = load_digits(return_X_y=True)
    pixels = pixels[:, pixels.std(axis=0) > 0]
    pixels = (pixels - pixels.mean(axis=0)) / pixels.std(axis=0)
    features = jnp.asarray(np.column_stack([pixels, np.ones(len(pixels))]))
    signs = jnp.asarray(np.where(digits % 2, 1.0, -1.0))

    def loss(w, batch):
        features, signs = batch
        return jnp.mean(jax.nn.softplus(-signs * (features @ w))) + ridge / 2 * w @ w

    def sample(key):
        rows = jax.random.randint(key, (batch_size,), 0, len(signs))
        return features[rows], signs[rows]

    minimizer = newton(lambda w: loss(w, (features, signs)), jnp.zeros(features.shape[1]))
    least = loss(minimizer, (features, signs))
    return Problem(minimizer, sample, loss, lambda w: loss(w, (features, signs)) - least)


def newton(loss: Callable[[jax.Array], jax.Array], w: jax.Array) -> jax.Array:
    """The minimizer, to the precision of float64."""
    gradient, hessian = jax.jit(jax.grad(loss)), jax.jit(jax.hessian(loss))
    for _ in range(100):
        if jnp.linalg.norm(gradient(w)) < 1e-14:
            return w
        w = w - jnp.linalg.solve(hessian(w), gradient(w))
    raise ArithmeticError(f"Newton's method stopped at a gradient of {gradient(w)}.")


def least_squares(batch_size: int, dimension: int = 64) -> Problem:
    """Fresh Gaussian samples at every step: features with variances 1 / i^2 for i = 1 to 64, true
    weights all 1, labels with noise of variance 1. F - F* is known in closed form."""
    variances = 1 / jnp.arange(1.0, dimension + 1) ** 2
    weights = jnp.ones(dimension)

    def sample(key):
        features, noise = jax.random.split(key)
        features = jax.random.normal(features, (batch_size, dimension)) * jnp.sqrt(variances)
        return features, features @ weights + jax.random.normal(noise, (batch_size,))

    def loss(w, batch):
        features, labels = batch
        return jnp.mean((features @ w - labels) ** 2) / 2

    return Problem(weights, sample, loss, lambda w: variances @ (w - weights) ** 2 / 2)


PROBLEMS = {"logistic regression": logistic_regression, "least squares": least_squares}


def label(average: str, mu_y: float) -> str:
    return f"{average}, {mu_y:g}"


def optimizers(learning_rate: optax.Schedule, T: Horizon) -> dict[str, Any]:
    """Each method's optimizer, and how its evaluated iterate is read."""
    sgd = optax.sgd(learning_rate)
    averaged = {
        label(name, mu_y): (gpa(sgd, AVERAGES[name](T), mu_y), eval_params)
        for name, mu_y in METHODS
    }
    return {"SGD": (sgd, lambda opt_state, params: params)} | averaged


@functools.partial(jax.jit, static_argnums=0)
def train(problem: Problem, T: int, rates: jax.Array, keys: jax.Array) -> dict[str, jax.Array]:
    """Runs all methods for T steps, with `rates` (decay x rate) and `keys`, one for each seed.

    Returns:
      For each method F - F*, (iterate, seed, decay, rate): of the iterate that it evaluates, which
      for GPA is x, after the last step, and of the mean of that iterate over all steps.
    """
    decays = jnp.repeat(jnp.arange(len(DECAYS)), rates.shape[1])

    def methods(rate, decay):
        def learning_rate(t):
            return rate * jnp.stack([jnp.asarray(f(t, T), float) for f in DECAYS.values()])[decay]

        return optimizers(learning_rate, T)

    def begin(rate, decay):
        w = jnp.zeros_like(problem.minimizer)
        return {name: (w, o.init(w), w) for name, (o, _) in methods(rate, decay).items()}

    def step(rate, decay, runs, t, batch):
        after = {}
        for name, (optimizer, evaluated) in methods(rate, decay).items():
            params, opt_state, mean = runs[name]
            grads = jax.grad(problem.loss)(params, batch)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            mean = mean + (evaluated(opt_state, params) - mean) / (t + 1)
            after[name] = params, opt_state, mean
        return after

    def all_rates(key, runs, t):
        batch = problem.sample(jax.random.fold_in(key, t))
        return jax.vmap(step, (0, 0, 0, None, None))(rates.ravel(), decays, runs, t, batch)

    def gaps(rate, decay, runs):
        return {
            name: jnp.stack(
                [problem.gap(w) for w in (evaluated(*runs[name][1::-1]), runs[name][2])]
            )
            for name, (_, evaluated) in methods(rate, decay).items()
        }

    runs = jax.vmap(begin)(rates.ravel(), decays)
    runs = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(keys), *leaf.shape)), runs)
    # A loop with a traced length: one compilation serves all horizons.
    runs = jax.lax.fori_loop(
        0, T, lambda t, runs: jax.vmap(all_rates, (0, 0, None))(keys, runs, t), runs
    )
    found = jax.vmap(jax.vmap(gaps), (None, None, 0))(rates.ravel(), decays, runs)
    return {
        name: jnp.moveaxis(gap, 2, 0).reshape(2, len(keys), *rates.shape)
        for name, gap in found.items()
    }


def measure(problem: Problem, config: Config, console: Console) -> dict[str, Any]:
    """For each decay, method and iterate: the mean gap over the grid, (T, rate), the chosen rates,
    and the gap of each seed, (T, seed), at the chosen rate and at the theory's."""
    scales = problem.scales()
    keys = jax.random.split(jax.random.key(0), config.tuning_seeds + config.seeds)
    found = []
    for T in config.horizons:
        start = time.perf_counter()
        first = scales["D"] / scales["G"]
        theory = [first if decay == "1/sqrt(t)" else first / T**0.5 for decay in DECAYS]
        rates = jnp.asarray([[*config.rates, rate] for rate in theory])
        gaps = jax.device_get(train(problem, T, rates, keys))
        found.append({name: np.where(np.isfinite(gap), gap, np.inf) for name, gap in gaps.items()})
        console.print(f"T = {T}: {time.perf_counter() - start:.0f} s", highlight=False)
    runs: dict[str, Any] = {}
    for d, decay in enumerate(DECAYS):
        for method in ["SGD", *(label(*method) for method in METHODS)]:
            for i, iterate in enumerate(ITERATES):
                gaps = np.stack([gap[method][i, :, d] for gap in found])  # T x seed x rate
                tuning, gaps = np.split(gaps, [config.tuning_seeds], axis=1)
                best = tuning[..., :-1].mean(axis=1).argmin(axis=-1)
                runs.setdefault(decay, {}).setdefault(method, {})[iterate] = {
                    "grid": rounded(gaps[..., :-1].mean(axis=1)),
                    "rate": [config.rates[k] for k in best],
                    "tuned": rounded(gaps[np.arange(len(best)), :, best]),
                    "theory": rounded(gaps[..., -1]),
                }
    return {"scales": scales, "runs": runs}


def rounded(values: np.ndarray) -> list[list[float | None]]:
    """None where a run diverged, for which JSON has no number."""
    return [[v if np.isfinite(v) else None for v in digits(row)] for row in values]


def digits(values: Iterable[float]) -> list[float]:
    """The values with five digits, so that the file is short."""
    return [float(f"{value:.5g}") for value in values]


def interval(values: np.ndarray) -> np.ndarray:
    """Mean and 95 % interval, by Student's t."""
    mean, error = values.mean(), scipy.stats.sem(values)
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * error
    return np.array([mean, mean - half, mean + half])


def ratios(gaps: list, base: list) -> list[list[float] | None]:
    """Geometric mean, with its interval, of the ratio seed by seed, for each T."""
    return [
        None if None in [*a, *b] else digits(np.exp(interval(np.log(a) - np.log(b))))
        for a, b in zip(gaps, base, strict=True)
    ]


def slope(gaps: list, horizons: list[int]) -> list[float] | None:
    """Slope of the gap over T on log axes: fitted for each seed, then mean and interval."""
    if any(None in row for row in gaps):
        return None
    return digits(interval(np.polyfit(np.log(horizons), np.log(gaps), 1)[0]))


def baseline(decay: str) -> str:
    """The iterate of SGD for which theory has its guarantee."""
    return "last" if decay == "linear" else "averaged"


def summarize(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Slopes, and ratios to SGD's gap on the same seeds, each at its own best rate ("tuned") or
    both at the theory's: to SGD with the same decay, and to the last iterate under linear decay.
    "edge": horizons at which the best rate is the grid's first or last."""
    horizons, rates = results["config"]["horizons"], results["config"]["rates"]
    edges = rates[0], rates[-1]
    summary = []
    for name, problem in results["problems"].items():
        linear = problem["runs"]["linear"]["SGD"]["last"]
        for decay, methods in problem["runs"].items():
            base = methods["SGD"][baseline(decay)]
            for method, iterates in methods.items():
                for iterate, run in iterates.items():
                    entry = {"problem": name, "decay": decay, "method": method, "iterate": iterate}
                    entry["edge"] = [
                        T for T, rate in zip(horizons, run["rate"], strict=True) if rate in edges
                    ]
                    for kind in ("tuned", "theory"):
                        entry[f"{kind} slope"] = slope(run[kind], horizons)
                        entry[f"{kind} ratio"] = ratios(run[kind], base[kind])
                        entry[f"{kind} ratio to linear"] = ratios(run[kind], linear[kind])
                    summary.append(entry)
    return summary


def table(results: dict[str, Any]) -> str:
    """The findings at the longest horizon, as markdown. All ratios are below 1 where x is better;
    a star marks a learning rate at the edge of the grid."""
    T = results["config"]["horizons"][-1]
    found = {(s["problem"], s["decay"], s["method"], s["iterate"]): s for s in results["summary"]}
    lines = []
    for problem, measured in results["problems"].items():
        runs = measured["runs"]
        lines += [
            f"**{problem.capitalize()}**, T = {T:,}",
            "",
            "| mu_x, mu_y | F - F* | slope | to SGD's average | to SGD, linear decay "
            "| 1/sqrt(t): to SGD's average | linear decay: to SGD's last "
            "| D/(G sqrt(T)): to SGD's average |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for method in runs["constant"]:
            for iterate in ITERATES if method == "SGD" else ITERATES[:1]:
                constant, inverse_root, linear = (
                    found[problem, decay, method, iterate] for decay in DECAYS
                )
                gap = runs["constant"][method][iterate]["tuned"][-1]
                cells = [
                    f"SGD, {iterate}" if method == "SGD" else method,
                    "diverged" if None in gap else f"{np.mean(gap):.2e}",
                    f"{constant['tuned slope'][0]:.2f}" if constant["tuned slope"] else "-",
                    shown(constant["tuned ratio"][-1]),
                    shown(constant["tuned ratio to linear"][-1]),
                    shown(inverse_root["tuned ratio"][-1]) + " *" * (T in inverse_root["edge"]),
                    shown(linear["tuned ratio"][-1]),
                    shown(constant["theory ratio"][-1]),
                ]
                lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def shown(ratio: list[float] | None) -> str:
    return "diverged" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


# Legend (of GPA: mu_x, mu_y), decay, method, iterate, line.
CURVES = (
    ("SGD, last iterate", "constant", "SGD", "last", {"color": "0.55", "linestyle": "--"}),
    ("SGD, average", "constant", "SGD", "averaged", {"color": "black"}),
    ("SGD, linear decay", "linear", "SGD", "last", {"color": "black", "linestyle": ":"}),
    ("GPA: uniform, 0.5", "constant", "uniform, 0.5", "last", {"color": COLOURS[0], "marker": "o"}),
    ("GPA: uniform, 0.9", "constant", "uniform, 0.9", "last", {"color": COLOURS[5], "marker": "v"}),
    ("GPA: 1 - 5/T, 0", "constant", "1 - 5/T, 0", "last", {"color": COLOURS[2], "marker": "s"}),
    ("GPA: 0.9967, 0.7", "constant", "0.9967, 0.7", "last", {"color": COLOURS[3], "marker": "D"}),
    ("GPA: 1 - 1/T, 0", "constant", "1 - 1/T, 0", "last", {"color": COLOURS[1], "marker": "^"}),
)


def figure(results: dict[str, Any]) -> Figure:
    """F - F* over T at the tuned rates: mean and 95 % interval over the seeds."""
    horizons = results["config"]["horizons"]
    drawn = Figure(figsize=(8, 5), layout="constrained")
    panels = drawn.subplots(1, len(results["problems"]), squeeze=False)[0]
    for axes, (problem, measured) in zip(panels, results["problems"].items(), strict=True):
        for name, decay, method, iterate, line in CURVES:
            gaps = measured["runs"][decay][method][iterate]["tuned"]
            mean, low, high = np.transpose([interval(np.asarray(row)) for row in gaps])
            axes.plot(horizons, mean, label=name, markersize=4, linewidth=1.6, **line)
            axes.fill_between(horizons, low, high, color=line["color"], alpha=0.12, linewidth=0)
        axes.set(xscale="log", yscale="log", xlabel="T (steps)", title=problem.capitalize())
        axes.set_xticks(horizons, [f"{T:,}" for T in horizons])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("F - F* after T steps")
    drawn.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
        title="Learning rate tuned for each T, constant unless noted. GPA's x: mu_x, mu_y",
    )
    return drawn


def main() -> int:
    config = tyro.cli(Config, prog="python -m benchmarks.convex")
    if config.quick:
        out = quick_file(config.out, Config.out)
        config = dataclasses.replace(config, **QUICK, out=out)
    console = Console()
    results: dict[str, Any] = {**to_store(config), "problems": {}}
    with jax.enable_x64(True):
        for name, make in PROBLEMS.items():
            console.print(f"{name.capitalize()}:")
            results["problems"][name] = measure(make(config.batch_size), config, console)
    results["summary"] = summarize(results)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(config.out, json.dumps(results, separators=(",", ":")) + "\n")
    console.print(table(results), highlight=False, soft_wrap=True)
    console.print(f"All numbers: {config.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
