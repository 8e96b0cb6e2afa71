"""Does GPA's recipe hold where it was not tuned? On other text, a larger model, a longer run.

python -m benchmarks.transfer

The recipe is GPA's setting on the workload `text` of `benchmarks.steps_to_target`, with its
learning rate as a multiple of AdamW's best one there. On each condition AdamW's learning rate is
tuned anew: half, once and twice that of `text`, on one seed, and further where the best is the last
of them. GPA is not tuned: it gets the multiple of what was best for AdamW. Then both are run on
four other seeds, paired.
"""

import ast
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import QUICK
from benchmarks.runs import Store, Study, pursue, settled, together
from benchmarks.steps_to_target import (
    HEADINGS,
    RESULTS,
    TRIAL_SEED,
    WORKLOADS,
    Row,
    cells,
    outcome,
    trials,
)
from examples.llama.data import TextData
from examples.llama.model import LlamaConfig
from examples.llama.train import TrainLlama
from examples.reporting import write_whole

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


def tuned(condition: TrainLlama, store: Store) -> Study:
    """AdamW's setting on a condition, and GPA's: the recipe."""
    base, *_ = yield from trials(TUNED, "adamw", store)
    recipe, *_ = yield from trials(TUNED, "gpa-adamw", store)
    multiple = recipe.settings.learning_rate / base.settings.learning_rate

    def attempt(rate: float) -> TrainLlama:
        settings = dataclasses.replace(base.settings, learning_rate=rate)
        return dataclasses.replace(condition, optimizer="adamw", settings=settings, seed=TRIAL_SEED)

    rates = [factor * base.settings.learning_rate for factor in (0.5, 1.0, 2.0)]
    while True:
        yield [attempt(rate) for rate in rates]
        best = min(rates, key=lambda rate: store[attempt(rate)].loss)
        if best == rates[0]:
            rates.insert(0, best / 2)
        elif best == rates[-1]:
            rates.append(2 * best)
        else:
            break
    return {
        "adamw": attempt(best).settings,
        "gpa-adamw": dataclasses.replace(recipe.settings, learning_rate=multiple * best),
    }


def on(condition: TrainLlama, store: Store) -> Study:
    """The runs of both on a condition."""
    settings = yield from tuned(condition, store)
    runs = {
        name: [
            dataclasses.replace(condition, optimizer=name, settings=its, seed=seed)
            for seed in SEEDS
        ]
        for name, its in settings.items()
    }
    yield [run for same in runs.values() for run in same]
    return runs


def transfers(store: Store) -> Study:
    return (yield from together({name: on(CONDITIONS[name], store) for name in CONDITIONS}))


def rows(store: Store) -> dict[str, list[Row]]:
    """What came of each condition whose runs are all there: AdamW, then GPA."""
    found = {}
    for name, condition in CONDITIONS.items():
        runs = settled(on(condition, store), store)
        if runs is not None:
            found[name] = [
                outcome(contender, same, runs["adamw"], (), store)
                for contender, same in runs.items()
            ]
    return found


def lines(found: dict[str, list[Row]]) -> Iterator[list[str]]:
    """Those of the table, with the learning rates, and without the strict reading."""
    for name, both in found.items():
        for row in both:
            rate = f"{row.settings.learning_rate:.2g}"
            yield [name if row is both[0] else "", rate, *cells(row)[:-1]]


COLUMNS = ("", "learning rate", *HEADINGS[:-1])


@dataclasses.dataclass(frozen=True)
class Config:
    """Goes on with the study where it was, and prints what it says so far."""

    workers: int = len(os.sched_getaffinity(0))
    """Runs at a time, each on a core of its own."""


def main() -> int:
    flags = tyro.cli(Config, prog="python -m benchmarks.transfer", description=__doc__)
    console, store = Console(), Store(RESULTS)
    DOCSTRINGS.parent.mkdir(parents=True, exist_ok=True)
    write_whole(DOCSTRINGS, "".join(json.dumps({"text": t}) + "\n" for t in docstrings()))
    pursue(transfers(store), store, flags.workers, console)
    table = Table(*COLUMNS, box=box.SIMPLE_HEAD)
    for line in lines(rows(store)):
        table.add_row(*line)
    console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
