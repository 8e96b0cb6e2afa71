"""Does GPA's recipe hold without tuning? Where AdamW was tuned, and on other text, a larger model
and a longer run.

python -m benchmarks.transfer

The recipe is README.md's: twice AdamW's learning rate, constant after a warmup of a fifth of the
run, Schedule-Free's average, b1=0, mu_y=0.9, AdamW's weight decay. On the workloads of
`benchmarks.steps_to_target` it is run on the seeds of the finals, against AdamW's. On each further
condition AdamW's learning rate is tuned again: half, once and twice that of `text`, on one seed,
and further where the best is the last of them. GPA gets twice what was best. Then both are run on
four other seeds, paired.
"""

import ast
import dataclasses
import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import tyro
from rich.console import Console

from benchmarks import QUICK, steps_to_target
from benchmarks.runs import pursue, stored, table
from benchmarks.steps_to_target import (
    HEADINGS,
    TRIAL_SEED,
    WORKLOADS,
    Row,
    cells,
    outcome,
    trials,
)
from benchmarks.store import Store, results_of, settled, together
from examples.config import OneRun
from examples.files import write_whole
from examples.llama.config import TrainLlama
from examples.llama.data import TextData
from examples.llama.model import LlamaConfig
from examples.settings import Name, Settings, default_settings

TUNED = "text"
SEEDS = range(100, 104)
PACKAGES = ("numpy", "scipy", "sklearn")
DOCSTRINGS = QUICK / "docstrings.jsonl"
TEXT = WORKLOADS[TUNED].config
CONDITIONS: dict[str, TrainLlama] = {
    "other text: docstrings of NumPy, SciPy and scikit-learn": dataclasses.replace(
        TEXT, data=TextData(str(DOCSTRINGS))
    ),
    "a Llama of 0.25M parameters": dataclasses.replace(
        TEXT, model=LlamaConfig(512, dim=96, layers=2, heads=4, kv_heads=2, hidden=256, unroll=2)
    ),
    "2,000 steps": dataclasses.replace(TEXT, steps=2000),
}


def docstrings(packages: tuple[str, ...] = PACKAGES) -> Iterator[str]:
    """The docstrings of each module: English, with some mathematics and examples in it."""
    for package in packages:
        for path in sorted(Path(importlib.util.find_spec(package).origin).parent.rglob("*.py")):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
            texts = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
            if text := "\n\n".join(filter(None, texts)):
                yield text


def recipe(base: Settings) -> Settings:
    """GPA's settings for a run in which `base` is good for AdamW: the trainer's defaults."""
    settings = default_settings("gpa-adamw", base.learning_rate, base.warmup, small=True)
    return dataclasses.replace(settings, weight_decay=base.weight_decay)


def tuned(condition: TrainLlama, store: Store) -> Settings:
    """AdamW's setting on a condition."""
    best, *_ = trials(TUNED, "adamw", store)
    base = best.settings

    def attempt(rate: float) -> TrainLlama:
        settings = dataclasses.replace(base, learning_rate=rate)
        return dataclasses.replace(condition, optimizer="adamw", settings=settings, seed=TRIAL_SEED)

    rates = [factor * base.learning_rate for factor in (0.5, 1.0, 2.0)]
    while True:
        results_of(store, map(attempt, rates))
        best = min(rates, key=lambda rate: store[attempt(rate)].loss)
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(2 * best)
        else:
            return attempt(best).settings


def both(
    condition: OneRun, base: Settings, seeds: Sequence[int], store: Store
) -> dict[Name, list[OneRun]]:
    """The runs of AdamW and of GPA on a condition."""
    settings: dict[Name, Settings] = {"adamw": base, "gpa-adamw": recipe(base)}
    runs = {
        name: [
            dataclasses.replace(condition, optimizer=name, settings=its, seed=seed)
            for seed in seeds
        ]
        for name, its in settings.items()
    }
    results_of(store, (run for same in runs.values() for run in same))
    return runs


def on_workload(name: str, store: Store) -> dict[Name, list[OneRun]]:
    base, *_ = trials(name, "adamw", store)
    return both(WORKLOADS[name].config, base.settings, steps_to_target.SEEDS, store)


def on_condition(name: str, store: Store) -> dict[Name, list[OneRun]]:
    base = tuned(CONDITIONS[name], store)
    return both(CONDITIONS[name], base, SEEDS, store)


def studies(store: Store) -> dict[str, Callable[[], dict[Name, list[OneRun]]]]:
    found = {
        f"the workload {name}": functools.partial(on_workload, name, store) for name in WORKLOADS
    }
    return found | {name: functools.partial(on_condition, name, store) for name in CONDITIONS}


def rows(store: Store) -> dict[str, list[Row]]:
    """The outcome of each condition whose runs are all stored: AdamW, then GPA."""
    found = {}
    for name, study in studies(store).items():
        runs = settled(study)
        if runs is not None:
            found[name] = [
                outcome(contender, same, runs["adamw"], (), store)
                for contender, same in runs.items()
            ]
    return found


def lines(found: dict[str, list[Row]]) -> Iterator[list[str]]:
    """The lines of the table, with the learning rates, and without the strict reading."""
    for name, pair in found.items():
        for row in pair:
            rate = f"{row.settings.learning_rate:.2g}"
            yield [name if row is pair[0] else "", rate, *cells(row)[:-1]]


COLUMNS = ("", "learning rate", *HEADINGS[:-1])


@dataclasses.dataclass(frozen=True)
class Config:
    """Resumes the study where it was, and prints what it says so far."""

    workers: int = len(os.sched_getaffinity(0))
    """Runs at a time, each on a core of its own."""


def main() -> int:
    flags = tyro.cli(Config, prog="python -m benchmarks.transfer", description=__doc__)
    console, store = Console(), stored()
    DOCSTRINGS.parent.mkdir(parents=True, exist_ok=True)
    write_whole(DOCSTRINGS, "".join(json.dumps({"text": t}) + "\n" for t in docstrings()))
    pursue(store, flags.workers, together, studies(store))
    console.print(table(COLUMNS, lines(rows(store))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
