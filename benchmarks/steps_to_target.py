"""How many steps does an optimizer need to reach the loss at which well-tuned AdamW ends?

python -m benchmarks.steps_to_target                     # resumes all studies, for hours

python -m benchmarks.steps_to_target finals --workloads text

python -m benchmarks.steps_to_target --quick             # a small form of all of it, in minutes

The protocol; pages/steps_to_target.md says what was changed in it during the study, and when:

* **Workloads.** `text`: a Llama of 0.125M parameters on Python's standard library, 1,000 steps of
  32 sequences of 64 tokens. `images`: a ViT of 0.09M parameters on Fashion-MNIST, 1,500 steps of 64
  images. `images-large`: the same ViT and about as many images, 200 steps of 512.
* **Trials.** Each optimizer has eight on one seed: four learning rates; a fifth one, between the
  best and its better neighbour, or beyond the best if that is the largest or smallest; and at the
  best learning rate the other weight decay, the other value of the optimizer's own knob, and both.
  The trial with the lowest loss at the end is the optimizer's setting. A base optimizer (AdamW,
  Muon) has three more: its eight are with a cosine to 0; then, at the best of them, with a cosine
  to 10 %, with a line to 0, and constant and then a line to 0. What is around a base is tuned with
  the schedule that suits the base best; Schedule-Free and GPA around AdamW have none. GPA is there
  a second time, annealed, with the base's schedule and eight trials of its own.
* **Finals.** Each optimizer at its setting on fresh seeds. A seed decides the initialization and
  the order of the data, so that the runs of one seed are pairs.
* **Steps to the target.** The target is the loss at the end of the baseline's run with the same
  seed. As in the paper: the first step at which the run is at the target, interpolated between
  evaluations. A run that never gets there counts as one that needed all steps, so a saving is never
  negative; the loss at the end tells whether there is a difference. The strict reading: the
  shortest run, with its whole schedule, that ends at the target, interpolated between runs of 70,
  80, 90 and 100 % of the steps. It is made for the optimizers whose interval of the difference to
  the baseline's loss at the end is below 0.
* **Statistics.** Means over seeds, 95 % intervals of Student's t, two-sided paired t-tests.

Each run is made once, and is stored in benchmarks/results/steps_to_target when it ends: a study
that was stopped resumes where it was. `python -m benchmarks.report` makes the tables and figures.
"""

import dataclasses
import functools
import itertools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, cast

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import QUICK
from benchmarks.runs import RUNS, Result, pursue, stored, table, train_config
from benchmarks.statistics import Estimate, estimate
from benchmarks.store import Store, make, results_of, settled, together
from benchmarks.workloads import SMALL_LLAMA, SMALL_VIT
from examples.config import OneRun
from examples.llama.config import TrainLlama
from examples.settings import Name, Settings, label, split
from examples.vit.config import TrainViT
from examples.vit.data import ImageData

TRIAL_SEED = 1000
SEEDS = range(6)
SHORTER = (0.7, 0.8, 0.9)
WEIGHT_DECAYS = (0.1, 0.3)
# The four schedules of a base optimizer; the first is the one of its first eight trials.
SCHEDULES = (
    {"schedule": "cosine"},
    {"schedule": "cosine", "final": 0.1},
    {"schedule": "linear"},
    {"schedule": "wsd"},
)


# An optimizer; or an optimizer, a comma, and a variant of it that is tuned by itself.
Contender = str


class Method(NamedTuple):
    """What an optimizer's trials start from, and the other value of its own knob."""

    start: Settings
    other: dict[str, Any]


class Workload(NamedTuple):
    """What is trained, for how long, and which learning rates are tried."""

    config: OneRun
    learning_rates: tuple[float, ...]
    contenders: tuple[Contender, ...]


ADAMW: tuple[Contender, ...] = (
    "adamw",
    "gpa-adamw",
    "gpa-adamw, annealed",
    "schedule-free-adamw",
    "diloco-adamw",
    "ema-adamw",
)
IMAGES = TrainViT(
    steps=1500,
    batch_size=64,
    validation_examples=2000,
    data=ImageData("fashion-mnist", augment="none"),  # two epochs overfit nothing
    model=SMALL_VIT,
)
WORKLOADS = {
    "text": Workload(
        TrainLlama(
            steps=1000,
            batch_size=32,
            length=64,
            validation_examples=512,
            model=SMALL_LLAMA,
        ),
        (4e-3, 8e-3, 1.6e-2, 3.2e-2),
        (*ADAMW, "muon", "gpa-muon"),
    ),
    "images": Workload(IMAGES, (2e-3, 4e-3, 8e-3, 1.6e-2), ADAMW),
    "images-large": Workload(
        dataclasses.replace(IMAGES, steps=200, batch_size=512),
        (4e-3, 8e-3, 1.6e-2, 3.2e-2),
        ADAMW,
    ),
}

# Learning rates are set by each trial. Schedule-Free has no schedule, and its base no momentum, as
# in its authors' code. GPA starts from the same average, after a longer warmup; annealed, from the
# base's schedule and a window that follows it. Muon orthogonalizes its momentum: without one,
# single gradients. The EMA is the plain one, which does not know the learning rate. The warmup is
# the knob of those that have no other that matters as much.
LONGER = {"warmup": 0.2}
METHODS = {
    "": Method(Settings(warmup=0.1), LONGER),
    "gpa": Method(
        Settings(warmup=0.2, b1=0.0, mu_y=0.9, schedule="constant", average="lr-weighted"),
        {"mu_y": 0.8},
    ),
    "gpa, annealed": Method(Settings(warmup=0.2, b1=0.0, mu_y=0.9, window=0.05), {"window": 0.1}),
    "gpa-muon": Method(Settings(warmup=0.1, mu_y=0.5, window=0.05), LONGER),
    "schedule-free": Method(Settings(warmup=0.1, b1=0.0, mu_y=0.9, schedule="constant"), LONGER),
    "diloco": Method(
        Settings(warmup=0.1, sync_period=16, outer_learning_rate=0.7), {"outer_learning_rate": 0.4}
    ),
    "ema": Method(Settings(warmup=0.1, window=0.02, average="warmed-up"), {"window": 0.05}),
}


def parts(contender: Contender) -> tuple[str, str]:
    """("gpa, annealed", "adamw") of "gpa-adamw, annealed", ("", "adamw") of "adamw"."""
    name, comma, variant = contender.partition(",")
    around, base = split(cast(Name, name))
    return around + comma + variant, base


def title(contender: Contender) -> str:
    name, comma, variant = contender.partition(",")
    return label(cast(Name, name)) + comma + variant


def method(contender: Contender) -> Method:
    return METHODS.get(contender) or METHODS[parts(contender)[0]]


def config(
    workload: str, contender: Contender, settings: Settings, seed: int, length: float = 1.0
) -> OneRun:
    whole = WORKLOADS[workload].config
    return dataclasses.replace(
        whole,
        optimizer=contender.partition(",")[0],
        settings=settings,
        seed=seed,
        steps=round(length * whole.steps),
    )


def trials(workload: str, name: Contender, store: Store) -> list[OneRun]:
    """Tunes an optimizer; returns its trials, the best first."""
    start, other = method(name)
    around, base = parts(name)
    if around and start.schedule != "constant":
        tuned, *_ = trials(workload, base, store)
        schedule, final = tuned.settings.schedule, tuned.settings.final
        start = dataclasses.replace(start, schedule=schedule, final=final)
    tried: list[OneRun] = []

    def attempt(*changes: dict[str, Any]) -> None:
        settings = tried[0].settings if tried else start
        configs = [
            config(workload, name, dataclasses.replace(settings, **change), TRIAL_SEED)
            for change in changes
        ]
        results_of(store, configs)
        tried.extend(configs)
        tried.sort(key=lambda config: store[config].loss)

    grid = WORKLOADS[workload].learning_rates
    attempt(*({"learning_rate": rate} for rate in grid))
    best = tried[0].settings.learning_rate
    at = grid.index(best)
    if at in (0, len(grid) - 1):
        between = best * best / grid[1 if at == 0 else -2]
    else:
        neighbours = {trial.settings.learning_rate: store[trial].loss for trial in tried}
        better = min(grid[at - 1], grid[at + 1], key=neighbours.__getitem__)
        between = (best * better) ** 0.5
    attempt({"learning_rate": between})
    decay = {"weight_decay": WEIGHT_DECAYS[1]}
    attempt(decay, other, decay | other)
    if not around:
        attempt(*SCHEDULES[1:])
    return tried


def finals(workload: str, store: Store, seeds: Sequence[int] = SEEDS) -> dict[str, list[OneRun]]:
    """Each optimizer at its setting, on fresh seeds."""
    names = WORKLOADS[workload].contenders
    bases = dict.fromkeys(parts(name)[1] for name in names)
    families = {
        base: functools.partial(
            family, workload, [n for n in names if parts(n)[1] == base], store, seeds
        )
        for base in bases
    }
    found = together(families)
    return {name: found[parts(name)[1]][name] for name in names}


def family(
    workload: str, names: Sequence[Contender], store: Store, seeds: Sequence[int]
) -> dict[str, list[OneRun]]:
    """The finals of one base, which need not wait for the trials of another."""
    tuned = together({name: functools.partial(trials, workload, name, store) for name in names})
    configs = {
        name: [config(workload, name, tuned[name][0].settings, seed) for seed in seeds]
        for name in names
    }
    results_of(store, (run for runs in configs.values() for run in runs))
    return configs


def shorter(
    workload: str, store: Store, seeds: Sequence[int] = SEEDS
) -> dict[str, list[list[OneRun]]]:
    """Shorter runs, with their whole schedules, of the challengers that end below the target."""
    whole = finals(workload, store, seeds)

    def ends_lower(name: Contender) -> bool:
        baseline = whole[parts(name)[1]]
        losses = zip(whole[name], baseline, strict=True)
        return estimate([store[run].loss - store[base].loss for run, base in losses]).high < 0

    configs = {
        name: [
            [config(workload, name, run.settings, run.seed, length) for length in SHORTER]
            for run in runs
        ]
        for name, runs in whole.items()
        if parts(name)[0] and ends_lower(name)
    }
    results_of(store, (run for runs in configs.values() for lengths in runs for run in lengths))
    return configs


def first_passage(result: Result, target: float) -> float | None:
    """The first step at which a run is at the target, interpolated between two evaluations."""
    before = None
    for now in zip(result.curve["step"], result.curve["loss"], strict=True):
        if now[1] <= target:
            return now[0] if before is None else crossing(before, now, target)
        before = now
    return None


def crossing(before: tuple[float, float], now: tuple[float, float], target: float) -> float:
    """Where the line through two points (position, loss) is at the target."""
    (position, loss), (next_position, next_loss) = before, now
    return position + (next_position - position) * (loss - target) / (loss - next_loss)


def saved_as_in_the_paper(result: Result, target: float) -> float:
    step = first_passage(result, target)
    return 0.0 if step is None else 1 - step / result.config.steps


def saved_strictly(results: Sequence[Result], whole: Result, target: float) -> float:
    """How much shorter than the whole run one may be and still end at the target, read off runs of
    growing length: at most as much as the shortest that was made, and 0 if the whole run does not
    end at the target."""
    points = [(result.config.steps, result.loss) for result in (*results, whole)]
    if whole.loss > target:
        return 0.0
    needed = points[-1][0]
    for before, now in reversed(list(itertools.pairwise(points))):
        if before[1] > target:
            needed = crossing(before, now, target)
            break
        needed = before[0]
    return 1 - needed / whole.config.steps


class Row(NamedTuple):
    """What an optimizer did on a workload."""

    name: Contender
    settings: Settings
    losses: list[float]
    """At the end, one of each seed."""
    difference: Estimate
    """Between these and the baseline's."""
    reached: int
    """Seeds with which it was at the target at some step."""
    saved: Estimate
    """Part of the steps that it saved, as in the paper."""
    saved_strictly: Estimate | None
    """The same by shorter runs; None if they were not made."""


def rows(workload: str, store: Store, seeds: Sequence[int] = SEEDS) -> list[Row]:
    """The outcome on a workload, the baseline of each base first; empty while runs are missing."""
    whole = settled(finals, workload, store, seeds)
    if whole is None:
        return []
    short = settled(shorter, workload, store, seeds) or {}
    return [
        outcome(name, runs, whole[parts(name)[1]], short.get(name, []), store)
        for name, runs in whole.items()
    ]


def outcome(
    name: Contender,
    runs: Sequence[OneRun],
    baseline: Sequence[OneRun],
    short: Sequence[Sequence[OneRun]],
    store: Store,
) -> Row:
    """What a contender's runs did against the baseline's with the same seeds."""
    results = [store[run] for run in runs]
    targets = [store[run].loss for run in baseline]
    pairs = list(zip(results, targets, strict=True))
    strict = [
        saved_strictly([store[run] for run in lengths], result, target)
        for lengths, (result, target) in zip(short, pairs, strict=False)
    ]
    return Row(
        name,
        runs[0].settings,
        [result.loss for result in results],
        estimate([result.loss - target for result, target in pairs]),
        sum(first_passage(result, target) is not None for result, target in pairs),
        estimate([saved_as_in_the_paper(result, target) for result, target in pairs]),
        estimate(strict) if strict else None,
    )


HEADINGS = (
    "",
    "loss at the end",
    "against the baseline",
    "steps saved",
    "steps saved, strictly",
)


def cells(row: Row) -> list[str]:
    """A line of the table."""
    loss = f"{np.mean(row.losses):.4f} ± {np.std(row.losses, ddof=1):.4f}"
    if not parts(row.name)[0]:
        return [title(row.name), loss, "", "", ""]
    return [
        title(row.name),
        loss,
        interval(row.difference),
        percent(row.saved) if row.reached else "never there",
        percent(row.saved_strictly) if row.saved_strictly else "",
    ]


def interval(difference: Estimate) -> str:
    mean, low, high, p = difference
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f}), p = {p:.1g}"


def percent(saved: Estimate) -> str:
    return f"{saved.mean:.1%} ({saved.low:.1%} to {saved.high:.1%})"


def on_console(workload: str, rows: Sequence[Row]) -> Table | str:
    if not rows:
        return f"{workload}: not all runs are there yet."
    return table(HEADINGS, map(cells, rows), f"{workload}, {len(rows[0].losses)} seeds")


STUDIES = {"finals": finals, "shorter": shorter}


def again(workload: str, store: Store) -> list[OneRun]:
    """The finals' first runs of AdamW and GPA, to be repeated; none while finals are missing."""
    whole = settled(finals, workload, store)
    return [whole["adamw"][0], whole["gpa-adamw"][0]] if whole else []


@dataclasses.dataclass(frozen=True)
class Config:
    """Resumes the studies where they were, and prints what they say so far."""

    studies: Annotated[tuple[Literal["finals", "shorter"], ...], tyro.conf.Positional] = (
        "finals",
        "shorter",
    )
    """finals: tuning, then all optimizers on fresh seeds. shorter: the strict reading."""
    workloads: tuple[Literal["text", "images", "images-large"], ...] = tuple(WORKLOADS)
    """What to train."""
    seeds: int = len(SEEDS)
    """Fresh seeds; more of them add to what is there."""
    workers: int = len(os.sched_getaffinity(0))
    """Runs at a time, each on a core of its own."""
    quick: bool = False
    """Only repeat the finals' first runs of AdamW and GPA, in a folder of their own, and show them
    beside the stored ones."""


def main() -> int:
    flags = tyro.cli(Config, prog="python -m benchmarks.steps_to_target", description=__doc__)
    console, store = Console(), stored()
    if flags.quick:
        anew = Store(QUICK / "runs.jsonl", kind=RUNS)
        runs = []
        for workload in flags.workloads:
            found = again(workload, store)
            runs += found
            if not found:
                console.print(f"Left out: the finals of {workload} are not all stored yet.")
        make(anew, runs, flags.workers, train_config, niceness=0)
        lines = (
            (
                f"{title(run.optimizer)}, {run.steps} steps of {run.batch_size}",
                f"{anew[run].loss:.4f}",
                f"{store[run].loss:.4f}",
            )
            for run in runs
        )
        console.print(table(("", "loss at the end", "stored"), lines))
        return 0
    for workload in flags.workloads:
        for name in flags.studies:
            pursue(store, flags.workers, STUDIES[name], workload, store, range(flags.seeds))
        console.print(on_console(workload, rows(workload, store, range(flags.seeds))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
