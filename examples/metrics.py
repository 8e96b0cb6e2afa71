"""What a run measures, and where it is stored: metrics.jsonl and TensorBoard.

metrics.jsonl is the record from which tables and plots are made (plots.py).
"""

import contextlib
import dataclasses
import itertools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from rich.console import Console
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from examples.files import naming, write_json, write_whole
from examples.progress import Display


@dataclasses.dataclass
class History:
    """What metrics.jsonl says."""

    size: dict[str, int] = dataclasses.field(default_factory=dict)
    """Numbers of the program: params, bytes of the optimizer's state, bytes of a step."""
    train_loss: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """(step, mean loss of the updates since the last entry)."""
    validation: dict[str, list[tuple[int, dict[str, float]]]] = dataclasses.field(
        default_factory=dict
    )
    """For x, and y if it was evaluated: (step, validation metrics)."""
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Time of an update, without evaluation and compilation; one entry for each line."""

    @classmethod
    def read(cls, folder: Path) -> Self:
        history = cls()
        for record in records(folder / "metrics.jsonl"):
            if "size" in record:
                history.size = record["size"]
            elif "validation" in record:
                for weights, metrics in record["validation"].items():
                    history.validation.setdefault(weights, []).append((record["step"], metrics))
            else:
                history.train_loss.append((record["step"], record["loss"]))
                history.seconds.append(record["seconds_per_step"])
        return history

    def losses(self, weights: str = "x") -> list[tuple[int, float]]:
        return [(step, metrics["loss"]) for step, metrics in self.validation.get(weights, [])]

    def last(self, weights: str = "x") -> dict[str, float]:
        return self.validation[weights][-1][1]

    @property
    def done(self) -> int:
        return self.validation["x"][-1][0] if self.validation else 0

    @property
    def seconds_per_step(self) -> float:
        return float(np.median(self.seconds)) if self.seconds else float("nan")


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file that are whole: a crash may cut the last one."""
    if not path.exists():
        return []
    *whole, _ = path.read_bytes().split(b"\n")
    try:
        return [json.loads(line) for line in whole]
    except ValueError as error:
        raise ValueError(f"{path} is damaged, a line of it is not JSON: {error}.") from None


class Log:
    """metrics.jsonl and TensorBoard."""

    def __init__(self, folder: Path, done: int):
        """Opens the files. Drops the lines of steps after `done`, which the run takes again."""
        self.folder, path = folder, folder / "metrics.jsonl"
        before = records(path) if done else []
        self.kept = [line for line in before if line["step"] <= done and "size" not in line]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in self.kept))
        self.file = path.open("a", buffering=1)
        # Not tensorboardX's SummaryWriter, whose thread ends when the disk is full and leaves the
        # training waiting for it.
        events = folder / "tensorboard" / "events"
        events.parent.mkdir(exist_ok=True)
        self.board = EventsWriter(str(events))
        start = SessionLog(status=SessionLog.START)  # hides older events of this step and later
        self.board.write_event(Event(step=done + 1, session_log=start))

    def write(self, step: int, **values: Any) -> None:
        with naming(self.folder / "metrics.jsonl"):
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        values = [Summary.Value(tag=name, simple_value=value) for name, value in flat(values)]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        with naming(self.folder / "tensorboard"):
            self.board.write_event(event)

    def flush(self) -> None:
        with naming(self.folder / "tensorboard"):
            self.board.flush()

    def close(self) -> None:
        for file in (self.file, self.board):
            with contextlib.suppress(OSError):  # a full disk, which `write` has reported
                file.close()


class Report:
    """Measures a run, stores the numbers and shows them. Of several processes, only the first does
    the storing and showing."""

    def __init__(
        self,
        folder: Path,
        console: Console,
        *,
        title: str,
        steps: int,
        log_every: int,
        unit: str,
        units_per_step: int,
        learning_rate: Any,
        files: Mapping[str, Any],
    ):
        self.folder, self.steps, self.log_every, self.files = folder, steps, log_every, files
        self.unit, self.units_per_step = unit, units_per_step
        self.learning_rate = learning_rate
        self.active = jax.process_index() == 0
        self.display = Display(console, title, steps, self.active)
        self.log: Log | None = None
        self.waiting: list[tuple[dict[str, jax.Array], float]] = []
        self.bad_steps = 0
        """Steps of the run that changed nothing, because their loss or gradient was non-finite."""
        self.bad_in_a_row = self.worst_row = 0
        """Consecutive bad steps up to the last step, and the most of them since `begin`."""
        self.since = time.perf_counter()

    def say(self, line: str) -> None:
        self.display.say(line)

    def begin(self, done: int, state: Any, memory: Any) -> None:
        """Opens the record of a run that has taken `done` steps; to be called before the next."""
        if not self.active:
            return
        for name, content in self.files.items():
            write_json(self.folder / name, content)
        self.log = Log(self.folder, done)
        self.bad_steps = sum(record.get("bad_steps", 0) for record in self.log.kept)
        self.log.write(done, size=sizes(state, memory))
        self.display.begin(done)
        self.since = time.perf_counter()

    def stepped(self, done: int, metrics: Mapping[str, jax.Array], waited: float) -> None:
        """Leaves the numbers on the device until a line is due: reading one waits for the step."""
        self.waiting.append((dict(metrics), waited))
        if done % self.log_every == 0 or done == self.steps:
            self.flush(done)

    def flush(self, done: int) -> None:
        """Writes the line of the steps since the last line."""
        if not self.waiting:
            return
        values = jax.device_get([metrics for metrics, _ in self.waiting])
        elapsed = time.perf_counter() - self.since
        steps, waited = len(self.waiting), sum(waited for _, waited in self.waiting)
        self.waiting.clear()
        self.since = time.perf_counter()
        good = [bool(value.pop("good")) for value in values]
        bad = self.count_bad(good)
        if self.log is None:
            return
        if bad:
            self.say(
                f"{bad} of the {steps} steps up to {done} changed nothing: their loss or gradient "
                "is not finite."
            )
        if bad < steps:
            values = list(itertools.compress(values, good))
        means = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        rate = steps * self.units_per_step / elapsed
        self.log.write(
            done,
            **means,
            **({"bad_steps": bad} if bad else {}),
            learning_rate=float(self.learning_rate(max(0, done - 1 - self.bad_steps))),
            seconds_per_step=elapsed / steps,
            input_seconds_per_step=waited / steps,
            **{f"{self.unit}_per_second": rate},
        )
        self.display.stepped(done, means["loss"], rate, self.unit)

    def count_bad(self, good: list[bool]) -> int:
        for one in good:
            self.bad_in_a_row = 0 if one else self.bad_in_a_row + 1
            self.worst_row = max(self.worst_row, self.bad_in_a_row)
        bad = len(good) - sum(good)
        self.bad_steps += bad
        return bad

    def evaluated(self, done: int, validation: dict[str, dict[str, float]]) -> None:
        if self.log is not None:
            self.log.write(done, validation=validation)
            self.log.flush()
            self.display.evaluated(done, validation["x"])
        self.since = time.perf_counter()  # an evaluation is no part of a step

    def close(self) -> None:
        if self.log is not None:
            self.display.close()
            self.log.close()


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """TensorBoard's names for nested numbers: validation/x/loss."""
    pairs = []
    for name, value in values.items():
        inner = isinstance(value, Mapping)
        pairs += flat(value, f"{prefix}{name}/") if inner else [(prefix + name, value)]
    return pairs


def sizes(state: Any, memory: Any) -> dict[str, int]:
    """Params, and bytes of the optimizer's state and of a compiled step, on one device."""

    def on_device(tree: Any) -> int:
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    size = {
        "params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "optimizer_bytes": on_device(state.opt_state),
    }
    if memory is not None:
        size["step_bytes"] = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes
        )
    return size
