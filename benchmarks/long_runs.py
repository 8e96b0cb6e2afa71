"""How far rounding carries x, y and z in a million updates: python -m benchmarks.long_runs

GPA stores x and y and recovers z = x + (y - x) / (1 - mu_y), which amplifies the rounding of x and
y by about 1 / (1 - mu_y). Each step adds such an error to z, which is a sum of steps. This measures
the distance to the float64 oracle (oracle.py), which keeps x, y and z apart, for float32, float64
and bfloat16 params, in two settings:

* "given": the base's updates are a fixed sequence of fresh noise, the same for the library and the
  oracle. Nothing pulls z back: this is the drift of the representation alone.
* "feedback": gradients are those of a quadratic at y, with the same noise for both. The curvature
  pulls errors back, as the loss does in training.

Weights are around 1 and a step is about 1/1000 of that, as in a real run. Writes
benchmarks/results/long_runs.json, from which the table and the figure are made.
"""

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from matplotlib.figure import Figure
from rich.console import Console

from benchmarks import quick_file
from benchmarks.oracle import Oracle, sgd
from examples.files import write_whole
from examples.plots import COLOURS
from examples.run_folder import to_store
from gpa_optax import averaging, gpa, iterates


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures how far x, y and z are from the float64 oracle over a million updates."""

    steps: int = 1_000_000
    """Updates of each run."""
    weights: int = 32
    """Entries of the vector that is trained, all alike: their mean square error is reported."""
    dtypes: tuple[str, ...] = ("float32", "float64", "bfloat16")
    """Of the params."""
    settings: tuple[str, ...] = ("given", "feedback")
    """Where the gradients come from."""
    quick: bool = False
    """The short form: 20,000 updates."""
    out: Path = Path("benchmarks/results/long_runs.json")
    """File for the results. Default with --quick: in runs/bench."""


QUICK = {"steps": 20_000}
MU_YS = (0.0, 0.5, 0.7, 0.9, 0.99)
MU_XS: dict[str, Any] = {"0.9967": 0.9967, "uniform": averaging.uniform()}
SEQUENCES = ("x", "y", "z")
PANELS = [("given", "0.9967"), ("feedback", "0.9967"), ("feedback", "uniform")]
LEARNING_RATE = 2.0**-7  # a power of two: it scales gradients without rounding
NOISE = 0.125  # the largest noise of a gradient


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The gradient at step t is curvature * (y - minimizer) + noise[t]."""

    start: np.ndarray
    minimizer: np.ndarray
    curvature: np.ndarray
    noise: np.ndarray
    """(steps, weights), in float32."""

    def gradient(self, t: Any, y: Any, noise: Any) -> Any:
        return self.curvature.astype(y.dtype) * (y - self.minimizer.astype(y.dtype)) + noise[t]


def quadratic(steps: int, weights: int) -> Problem:
    """A problem whose numbers are exact in float32, and whose start is exact in bfloat16 too, so
    that runs of all dtypes start at the same point."""
    rng = np.random.default_rng(0)
    minimizer = rng.choice([-1, 1], weights) * rng.integers(32, 128, weights) / 64
    noise = rng.integers(-1024, 1025, (steps, weights)) * (NOISE / 1024)
    return Problem(
        start=(minimizer + 0.25).astype(np.float32),
        minimizer=minimizer.astype(np.float32),
        curvature=np.geomspace(2.0**-5, 1.0, weights).astype(np.float32),
        noise=noise.astype(np.float32),
    )


def given(steps: int, weights: int) -> Problem:
    """The same weights, with gradients that depend on nothing: normal noise, with all digits."""
    noise = NOISE * np.random.default_rng(1).standard_normal((steps, weights), np.float32)
    flat = np.zeros(weights, np.float32)
    return dataclasses.replace(quadratic(1, weights), curvature=flat, noise=noise)


PROBLEMS = {"given": given, "feedback": quadratic}


def moments(steps: int) -> list[int]:
    """The steps after which distances are taken: ten in each factor of 10."""
    return sorted({*(int(n) for n in np.geomspace(10, steps, 1 + 10 * int(np.log10(steps / 10))))})


def oracle_run(problem: Problem, mu_x: Any, when: Sequence[int]) -> np.ndarray:
    """x, y and z of the oracle: (moment, sequence, mu_y, weight)."""
    mu_y = np.array(MU_YS)[:, None]
    judge = Oracle({"w": np.tile(problem.start, (len(MU_YS), 1))}, sgd)
    weight_of_x = (lambda t: t / (t + 1)) if callable(mu_x) else (lambda t: mu_x)
    found = []
    for t in range(when[-1]):
        gradient = problem.gradient(t, judge.y["w"], problem.noise)
        judge.step({"w": gradient}, LEARNING_RATE, weight_of_x(t), mu_y)
        if t + 1 in when:
            found.append([judge.x["w"], judge.y["w"], judge.z["w"]])
    return np.array(found)


def library_run(problem: Problem, mu_x: Any, when: Sequence[int], dtype: str) -> np.ndarray:
    """The same for the library, converted to float64."""

    def optimizer(mu_y):
        return gpa(optax.sgd(LEARNING_RATE), mu_x, mu_y)

    @functools.partial(jax.vmap, in_axes=(0, 0, None, None))
    def step(mu_y, run, t, noise):
        params, opt_state = run
        # In the precision that the state has: a gradient in bfloat16 would be another error.
        gradient = problem.gradient(t, jnp.asarray(params, wide), noise)
        updates, opt_state = optimizer(mu_y).update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    @jax.jit
    def advance(runs, first, last, noise):
        return jax.lax.fori_loop(first, last, lambda t, runs: step(mu_y, runs, t, noise), runs)

    wide = jnp.promote_types(dtype, jnp.float32)
    mu_y = jnp.array(MU_YS, wide)
    noise = jnp.asarray(problem.noise, wide)
    params = jnp.tile(jnp.asarray(problem.start, dtype), (len(MU_YS), 1))
    runs = params, jax.vmap(lambda mu_y, params: optimizer(mu_y).init(params))(mu_y, params)
    found = []
    for first, last in zip([0, *when], when, strict=False):
        runs = advance(runs, first, last, noise)
        found.append(jax.device_get(jax.vmap(iterates)(runs[1], runs[0])))
    return np.array(found, np.float64)


def measure(config: Config, console: Console) -> dict[str, Any]:
    """For each setting, mu_x, dtype, mu_y and sequence: the distance at each moment, root mean
    square over the weights, relative to that of the oracle's y."""
    when = moments(config.steps)
    distances: dict[str, Any] = {}
    for setting in config.settings:
        problem = PROBLEMS[setting](config.steps, config.weights)
        for mu_x, value in MU_XS.items():
            exact = oracle_run(problem, value, when)
            scale = rms(exact[:, 1])
            for dtype in config.dtypes:
                began = time.perf_counter()
                with jax.enable_x64(dtype == "float64"):
                    found = library_run(problem, value, when, dtype)
                distance = rms(found - exact) / scale[:, None]
                distances.setdefault(setting, {}).setdefault(mu_x, {})[dtype] = {
                    sequence: {
                        f"{mu_y:g}": [float(f"{value:.4g}") for value in distance[:, s, m]]
                        for m, mu_y in enumerate(MU_YS)
                    }
                    for s, sequence in enumerate(SEQUENCES)
                }
                seconds = time.perf_counter() - began
                console.print(f"{setting}, mu_x {mu_x}, {dtype}: {seconds:.0f} s", highlight=False)
    return {"steps": when, "distances": distances}


def rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt(np.mean(values**2, axis=-1))


# Setting, mu_x, dtype, sequence: the columns of the table, which has a line for each mu_y.
COLUMNS = (
    ("feedback", "0.9967", "float32", "y"),
    ("feedback", "0.9967", "float32", "z"),
    ("feedback", "uniform", "float32", "x"),
    ("feedback", "uniform", "float32", "z"),
    ("feedback", "0.9967", "bfloat16", "z"),
    ("feedback", "0.9967", "float64", "z"),
    ("given", "0.9967", "float32", "z"),
    ("given", "uniform", "float32", "z"),
)


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: the distances after the last update."""
    headings = ["mu_y"] + [
        f"{sequence}, {setting}, mu_x {mu_x}, {dtype}" for setting, mu_x, dtype, sequence in COLUMNS
    ]
    lines = []
    for mu_y in (f"{mu_y:g}" for mu_y in MU_YS):
        found = [
            results["distances"][setting][mu_x][dtype][sequence][mu_y][-1]
            for setting, mu_x, dtype, sequence in COLUMNS
        ]
        lines.append([mu_y, *(f"{distance:.0e}" for distance in found)])
    return headings, lines


def figure(results: dict[str, Any]) -> Figure:
    """The distance of z over the updates; dashed, a random walk of the rounding of y that is
    amplified by 1 / (1 - mu_y), as a step that does not depend on the last one would make it."""
    steps, distances = np.array(results["steps"]), results["distances"]
    dtypes = results["config"]["dtypes"]
    drawn = Figure(figsize=(8, 3 * len(PANELS)), layout="constrained")
    rows = drawn.subplots(len(PANELS), len(dtypes), sharex=True, sharey="col", squeeze=False)
    for row, (setting, mu_x) in zip(rows, PANELS, strict=True):
        for axes, dtype in zip(row, dtypes, strict=True):
            # The state of bfloat16 params is float32.
            unit = float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps) / 2
            for mu_y, colour in zip(MU_YS, COLOURS, strict=False):
                found = np.array(distances[setting][mu_x][dtype]["z"][f"{mu_y:g}"])
                shown = np.where(found > 0, found, np.nan)  # exact, in float64 at mu_y = 0
                axes.plot(steps, shown, color=colour, label=f"{mu_y:g}")
                walk = unit * np.sqrt(steps) / (1 - mu_y)
                axes.plot(steps, walk, color=colour, linewidth=0.8, linestyle="--")
            axes.set(xscale="log", yscale="log")
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{setting}, mu_x {mu_x}\n\ndistance of z / size of y")
    for top, bottom, dtype in zip(rows[0], rows[-1], dtypes, strict=True):
        top.set_title(f"{dtype} params")
        bottom.set_xlabel("Updates")
    drawn.legend(
        *rows[0, 0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(MU_YS),
        title="mu_y; dashed: a random walk of rounding errors, times 1 / (1 - mu_y)",
    )
    return drawn


def main() -> int:
    config = tyro.cli(Config, prog="python -m benchmarks.long_runs")
    if config.quick:
        out = quick_file(config.out, Config.out)
        config = dataclasses.replace(config, **QUICK, out=out)
    console = Console()
    results = {**to_store(config), **measure(config, console)}
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(config.out, json.dumps(results, separators=(",", ":")) + "\n")
    console.print(f"All numbers: {config.out}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
