"""Training runs of a study: each is stored once, under what decides its result.

A run is a configuration of the examples' trainer (`examples.train.OneRun`), of which it uses the
model, the data, the optimizer and the compiled step; what is left out is what costs time in a run
of a minute: checkpoints, metrics of every step, the display.
"""

import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import processor
from benchmarks.ensemble import evaluations
from examples import train
from examples.commands import keep_memory
from examples.config import OneRun, decisive, from_json, to_json
from examples.files import write_whole
from examples.llama.config import TrainLlama
from examples.run_folder import versions
from examples.sharding import make_mesh, place
from examples.vit.config import TrainViT
from examples.workload import Batch, Data

PROCESS = (0, 1)  # the first of one
KINDS = {"llama": TrainLlama, "vit": TrainViT}


@dataclasses.dataclass(frozen=True)
class Result:
    """One run and its curve."""

    config: OneRun
    curve: Mapping[str, list[float]]
    """Steps, and losses (in nats) and other metrics on the validation data after them, at x."""

    @property
    def loss(self) -> float:
        """At the end; infinite if the run diverged."""
        done, loss = self.curve["step"][-1], self.curve["loss"][-1]
        return loss if done == self.config.steps and math.isfinite(loss) else math.inf


def identity(config: OneRun) -> str:
    """Of two runs with equal identities, one is enough."""
    flags = {"workload": config.workload, **decisive(to_json(config))}
    return hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """A folder with one file for each run.

    A file that was written before a flag existed counts as one with the flag's default, so a new
    flag's default must mean what was done before there was a flag.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Result] = {}
        for path in sorted(folder.glob("*.json")):
            self.add(json.loads(path.read_text()))

    def add(self, record: dict[str, Any]) -> None:
        kind = KINDS[record["workload"]]
        config = from_json(kind, filled(record["config"], to_json(kind())))
        self.results[identity(config)] = Result(config, record["curve"])

    def write(self, config: OneRun, record: dict[str, Any]) -> None:
        write_whole(self.folder / f"{identity(config)}.json", json.dumps(record) + "\n")
        self.add(record)

    def __getitem__(self, config: OneRun) -> Result:
        return self.results[identity(config)]

    def __contains__(self, config: OneRun) -> bool:
        return identity(config) in self.results


def filled(values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    return defaults | {
        name: filled(value, defaults[name]) if isinstance(value, dict) else value
        for name, value in values.items()
    }


def execute(configs: Iterable[OneRun], store: Store, workers: int, console: Console) -> None:
    """Makes the runs that the store does not have yet, several at a time, each on a core of its
    own, and stores each as it ends."""
    pending = {identity(config): config for config in configs if config not in store}
    ordered = sorted(pending.values(), key=lambda c: (c.workload, c.batch_size, c.seed))
    if not ordered:
        return
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in itertools.islice(itertools.cycle(sorted(os.sched_getaffinity(0))), workers):
        cores.put(core)
    with (
        context.Pool(workers, take_core, (cores,)) as pool,
        Progress(console=console) as progress,
    ):
        bar = progress.add_task(f"{len(ordered)} runs", total=len(ordered))
        for config, record in pool.imap_unordered(one_run, ordered):
            store.write(config, record)
            progress.advance(bar)
            if not console.is_terminal:
                console.print(told(config, record), highlight=False, soft_wrap=True)


def told(config: OneRun, record: Mapping[str, Any]) -> str:
    return (
        f"{identity(config)}  {config.workload} {config.optimizer}, seed {config.seed}, "
        f"{config.steps} steps of {config.batch_size}: {record['curve']['loss'][-1]:.4f} in "
        f"{record['cpu_seconds']:.0f} s"
    )


# A study yields the runs that it needs next, goes on when the store has them, and returns what it
# is about.
Study = Generator[list[OneRun], None, Any]


def together(studies: Mapping[Any, Study]) -> Study:
    """Runs studies side by side; returns what they return."""
    returned, asked = {}, {}

    def advance(name):
        try:
            asked[name] = next(studies[name])
        except StopIteration as stop:
            asked.pop(name, None)
            returned[name] = stop.value

    for name in studies:
        advance(name)
    while asked:
        yield [config for configs in asked.values() for config in configs]
        for name in list(asked):
            advance(name)
    return returned


def pursue(study: Study, store: Store, workers: int, console: Console) -> None:
    """Makes all runs of a study that are missing."""
    for configs in study:
        execute(configs, store, workers, console)


def settled(study: Study, store: Store) -> Any:
    """What a study returns, from the runs that are stored; None if it still needs some."""
    while True:
        try:
            if any(config not in store for config in next(study)):
                return None
        except StopIteration as stop:
            return stop.value


def table(
    headings: Sequence[str], lines: Iterable[Sequence[str]], title: str | None = None
) -> Table:
    """What a study says, for the console."""
    found = Table(*headings, title=title, box=box.SIMPLE_HEAD)
    for line in lines:
        found.add_row(*line)
    return found


def take_core(cores: Any) -> None:
    os.sched_setaffinity(0, {cores.get()})
    keep_memory()


def one_run(config: OneRun) -> tuple[OneRun, dict[str, Any]]:
    start = time.process_time()
    data = opened(*source(config))
    fitted = config.fitted(data)
    program = train.build(fitted, fitted.task(), make_mesh(1, jax.devices()[:1]))
    validation = data.validation(
        config.validation_examples, config.batch_size, *PROCESS, **config.data_options
    )
    curve: dict[str, list[float]] = {"step": []}
    due = evaluations(config.steps)
    with jax.set_mesh(program.mesh):
        state = program.initial()
        for done, batch in enumerate(batches(config), start=1):
            state, _ = program.step(state, place(batch, program.mesh, config.accumulate))
            if done in due:
                x = program.optimizer.eval_params(state.opt_state, state.params)
                metrics = train.mean_metrics(program, x, validation)
                curve["step"].append(done)
                for name, value in metrics.items():
                    curve.setdefault(name, []).append(round(value, 6))
                if not math.isfinite(metrics["loss"]):
                    break
    return config, {
        "workload": config.workload,
        "config": to_json(config),
        "curve": curve,
        "data": data.description,
        "versions": versions(),
        "hardware": f"one core of {processor()}",
        "date": datetime.date.today().isoformat(),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


@functools.lru_cache(maxsize=1)
def opened(source: Any, *vocab_size: int) -> Data:
    return source.prepare(*vocab_size)


@functools.lru_cache(maxsize=1)
def drawn(
    source: Any, *vocab_size: int, batch_size: int, seed: int, **how: int
) -> tuple[Iterator[Batch], list[Batch]]:
    """The trainer's batches, and those of them that were drawn so far."""
    return opened(source, *vocab_size).train(batch_size, seed, *PROCESS, **how), []


def batches(config: OneRun) -> list[Batch]:
    """Those of a run. The next run mostly has the same ones, and need not tokenize them again."""
    iterator, kept = drawn(
        *source(config), batch_size=config.batch_size, seed=config.seed, **config.data_options
    )
    kept.extend(itertools.islice(iterator, max(0, config.steps - len(kept))))
    return kept[: config.steps]


def source(config: OneRun) -> tuple[Any, ...]:
    return (config.data, config.model.vocab_size) if config.workload == "llama" else (config.data,)
