"""What each ingredient of GPA's recipe contributes by itself, on the workload `text`.

python -m benchmarks.ingredients                # resumes all of it, for hours

python -m benchmarks.ingredients map

* **ingredients**: GPA at its setting of `benchmarks.steps_to_target`, with one or two things
  changed, on four seeds of that study's finals, so that the runs of one seed are pairs. One variant
  changes nothing that matters, and so shows the noise of the measurement.
* **map**: the loss at the end over mu_x and mu_y, with the same base and a constant learning rate,
  where averaging alone decides what is left of the noise; one seed.
"""

import dataclasses
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from benchmarks.runs import pursue, stored, table
from benchmarks.statistics import Estimate, estimate
from benchmarks.steps_to_target import (
    TRIAL_SEED,
    config,
    interval,
    trials,
)
from benchmarks.store import Store, results_of, settled
from examples.config import OneRun
from examples.settings import Settings

WORKLOAD = "text"
SEEDS = range(4)
ANNEALED = {"average": "annealed", "window": 0.05}
# GPA's setting: a constant learning rate after a long warmup, Schedule-Free's average, b1=0 and
# mu_y=0.9, decay at z. Each variant: a multiple of its learning rate (None: AdamW's), and what else
# differs. Where the learning rate decays its peak is half as high, nearer to what is best then.
VARIANTS: dict[str, tuple[float | None, dict[str, Any]]] = {
    "learning rate higher by 0.1 % (noise)": (1.001, {}),
    "half the learning rate": (0.5, {}),
    "line to 0, annealed window": (0.5, {"schedule": "linear", **ANNEALED}),
    "line to 0, window constant": (0.5, {"schedule": "linear", **ANNEALED, "average": "constant"}),
    "cosine, annealed window": (0.5, {"schedule": "cosine", **ANNEALED}),
    "wsd, annealed window": (0.5, {"schedule": "wsd", **ANNEALED}),
    "wsd, Schedule-Free's average": (1.0, {"schedule": "wsd"}),
    "window of 5 %, warmed up": (1.0, {"average": "warmed-up", "window": 0.05}),
    "window of 20 %, warmed up": (1.0, {"average": "warmed-up", "window": 0.2}),
    "uniform average, also of the warmup": (1.0, {"average": "polynomial"}),
    "warmup of 10 %": (1.0, {"warmup": 0.1}),
    "mu_y = 0.8": (1.0, {"mu_y": 0.8}),
    "mu_y = 0.95": (1.0, {"mu_y": 0.95}),
    "mu_y from 0 to 0.9 in the first fifth": (1.0, {"mu_y_warmup": 0.2}),
    "weight decay at y": (1.0, {"base_params": "y"}),
    "b1 = 0.9, mu_y = 0.5": (None, {"b1": 0.9, "mu_y": 0.5}),
    "b1 = 0.9, mu_y = 0.7": (None, {"b1": 0.9, "mu_y": 0.7}),
}
MU_YS = (0.0, 0.5, 0.7, 0.9)
HORIZONS = (2, 10, 100, 300)  # steps that the average remembers; the last is mu_x = 0.9967


def gpa_settings(store: Store) -> Settings:
    best, *_ = trials(WORKLOAD, "gpa-adamw", store)
    return best.settings


def changed(settings: Settings, seed: int, **change: Any) -> OneRun:
    return config(WORKLOAD, "gpa-adamw", dataclasses.replace(settings, **change), seed)


def ingredients(store: Store, seeds: Sequence[int] = SEEDS) -> dict[str, list[OneRun]]:
    """The runs of GPA's setting and of each variant."""
    settings = gpa_settings(store)
    base, *_ = trials(WORKLOAD, "adamw", store)
    runs = {"": [changed(settings, seed) for seed in seeds]}
    for name, (multiple, change) in VARIANTS.items():
        rate = base.settings.learning_rate
        if multiple is not None:
            rate = multiple * settings.learning_rate
        runs[name] = [changed(settings, seed, learning_rate=rate, **change) for seed in seeds]
    results_of(store, (run for variant in runs.values() for run in variant))
    return runs


def mu_map(store: Store) -> dict[tuple[float | None, float], OneRun]:
    """A run for each (window in steps, mu_y). A window of None is Schedule-Free's average; a window
    of 1 is the base alone."""
    settings = gpa_settings(store)
    constant = dataclasses.replace(settings, schedule="constant", average="warmed-up")
    runs = {
        (horizon, mu_y): changed(constant, TRIAL_SEED, mu_y=mu_y, mu_x=1 - 1 / horizon)
        for horizon, mu_y in itertools.product(HORIZONS, MU_YS)
    }
    runs |= {
        (None, mu_y): changed(constant, TRIAL_SEED, mu_y=mu_y, average="lr-weighted")
        for mu_y in MU_YS
    }
    runs[1, 0.0] = changed(constant, TRIAL_SEED, mu_y=0.0, mu_x=0.0)
    results_of(store, runs.values())
    return runs


def effects(store: Store, seeds: Sequence[int] = SEEDS) -> dict[str, tuple[float, Estimate | None]]:
    """Mean loss at the end of each variant, and how much higher it is than GPA's setting's."""
    runs = settled(ingredients, store, seeds)
    if runs is None:
        return {}
    losses = {name: np.array([store[run].loss for run in same]) for name, same in runs.items()}
    return {
        name: (float(same.mean()), estimate(same - losses[""]) if name else None)
        for name, same in losses.items()
    }


def effects_table(found: dict[str, tuple[float, Estimate | None]]) -> list[list[str]]:
    """A line for each variant: its loss at the end, and by how much that is higher."""
    return [
        [name or "GPA's setting", f"{loss:.4f}", interval(effect) if effect else ""]
        for name, (loss, effect) in found.items()
    ]


HEADINGS = ("", "loss at the end", "higher by")
STUDIES = {"ingredients": ingredients, "map": mu_map}


@dataclasses.dataclass(frozen=True)
class Config:
    """Resumes the studies where they were, and prints what they say so far."""

    studies: Annotated[tuple[Literal["ingredients", "map"], ...], tyro.conf.Positional] = tuple(
        STUDIES
    )
    """What to do."""
    workers: int = len(os.sched_getaffinity(0))
    """Runs at a time, each on a core of its own."""


def main() -> int:
    flags = tyro.cli(Config, prog="python -m benchmarks.ingredients", description=__doc__)
    console, store = Console(), stored()
    for name in flags.studies:
        pursue(store, flags.workers, STUDIES[name], store)
    console.print(table(HEADINGS, effects_table(effects(store))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
