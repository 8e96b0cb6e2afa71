"""Runs of the examples' trainer as records of a store.

Such a run is a configuration (`examples.config.OneRun`). A study uses its model, data, optimizer
and compiled step, and leaves out what costs time in a run of a minute: checkpoints, metrics of
every step, the display.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
from rich import box
from rich.table import Table

from benchmarks.ensemble import evaluations
from benchmarks.store import RESULTS, Kind, Missing, Store, make, rounded
from examples import train
from examples.commands import keep_memory
from examples.config import OneRun, decisive, from_json, to_json
from examples.llama.config import TrainLlama
from examples.sharding import make_mesh, place
from examples.vit.config import TrainViT
from examples.workload import Batch, Data

PROCESS = (0, 1)  # the first of one
CONFIGS = {"llama": TrainLlama, "vit": TrainViT}
FILES = tuple(RESULTS / "steps_to_target" / f"{workload}.jsonl" for workload in CONFIGS)


@dataclasses.dataclass(frozen=True)
class Result:
    """One run and its curve."""

    config: OneRun
    curve: Mapping[str, list[float]]
    """Steps, and losses (in nats) and other metrics on the validation data after them, at x."""
    data: str = ""
    """What it was trained on."""
    seconds: float = 0.0
    """CPU time."""

    @property
    def loss(self) -> float:
        """The loss at the end; infinite if the run diverged."""
        ended = self.curve["step"][-1:] == [self.config.steps]
        return self.curve["loss"][-1] if ended else math.inf


def changes(config: OneRun) -> dict[str, Any]:
    """The flags that decide the result of a run and differ from their defaults."""
    defaults = decisive(to_json(CONFIGS[config.workload]()))
    flags = decisive(to_json(config))
    return {name: flags[name] for name in flags if flags[name] != defaults[name]}


@functools.cache
def identity(config: OneRun) -> str:
    text = json.dumps({"workload": config.workload, **changes(config)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def record_of(result: Result) -> dict[str, Any]:
    config = result.config
    return {
        "identity": identity(config),
        "workload": config.workload,
        "config": changes(config),
        "curve": rounded(result.curve),
        "data": result.data,
        "cpu_seconds": round(result.seconds, 1),
    }


def in_record(record: dict[str, Any]) -> tuple[OneRun, Result]:
    kind = CONFIGS[record["workload"]]
    values = to_json(kind())
    for name, value in record["config"].items():
        *groups, flag = name.split(".")
        functools.reduce(dict.__getitem__, groups, values)[flag] = value
    config = from_json(kind, values)
    return config, Result(config, record["curve"], record["data"], record["cpu_seconds"])


def told(result: Result) -> str:
    config = result.config
    return (
        f"{config.workload} {config.optimizer}, seed {config.seed}, {config.steps} steps of "
        f"{config.batch_size}: {result.loss:.4f} in {result.seconds:.0f} s"
    )


RUNS = Kind(identity, record_of, in_record, told)


def stored() -> Store:
    """The store of all runs made so far."""
    return Store(*FILES, kind=RUNS)


def pursue(store: Store, workers: int, study: Callable[..., Any], *arguments: Any) -> Any:
    """Makes all runs of a study that are missing; returns what the study returns."""
    while True:
        try:
            return study(*arguments)
        except Missing as missing:  # those with the same batches follow each other
            runs = sorted(missing.runs, key=lambda c: (c.workload, c.batch_size, c.seed))
            make(store, runs, workers, train_config, niceness=0)


def table(
    headings: Sequence[str], lines: Iterable[Sequence[str]], title: str | None = None
) -> Table:
    """The results of a study, for the console."""
    found = Table(*headings, title=title, box=box.SIMPLE_HEAD)
    for line in lines:
        found.add_row(*line)
    return found


def train_config(config: OneRun) -> Result:
    """Trains a run, as a worker does."""
    start = time.process_time()
    keep_memory()
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
                if not math.isfinite(metrics["loss"]):  # a curve ends where its run diverged
                    break
                curve["step"].append(done)
                for name, value in metrics.items():
                    curve.setdefault(name, []).append(value)
    return Result(config, curve, data.description, time.process_time() - start)


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
    """The batches of a run. The next run mostly has the same ones, and need not tokenize again."""
    iterator, kept = drawn(
        *source(config), batch_size=config.batch_size, seed=config.seed, **config.data_options
    )
    kept.extend(itertools.islice(iterator, max(0, config.steps - len(kept))))
    return kept[: config.steps]


def source(config: OneRun) -> tuple[Any, ...]:
    return (config.data, config.model.vocab_size) if config.workload == "llama" else (config.data,)
