"""What a run shows and stores: a progress display, metrics.jsonl, TensorBoard, a table and a plot.

metrics.jsonl is the record: the table and the plot are made from it, of one run or of several.
"""

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
import matplotlib
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from examples.files import naming, write_json, write_whole

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


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
    """Time of an update, evaluation and compilation apart, one entry for each line."""

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


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}.") from None


class Report:
    """Shows and stores what a run measures. Only the first of several processes does."""

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
        self.folder, self.console, self.title, self.steps = folder, console, title, steps
        self.files = files
        self.log_every, self.unit, self.units_per_step = log_every, unit, units_per_step
        self.learning_rate = learning_rate
        self.active = jax.process_index() == 0
        self.waiting: list[tuple[dict[str, jax.Array], float]] = []
        self.status, self.validation_loss = "", "0"
        self.bad_steps = 0
        """Steps of the run that changed nothing, because a number was not finite."""
        self.bad_in_a_row = self.worst_row = 0
        """How many the last ones are, and the most that followed each other since `begin`."""
        self.since = time.perf_counter()
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}  {task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self.active,
        )

    def begin(self, done: int, state: Any, memory: Any) -> None:
        """Opens the files; lines of steps that will be made again are dropped."""
        if not self.active:
            return
        for name, content in self.files.items():
            write_json(self.folder / name, content)
        path = self.folder / "metrics.jsonl"
        before = records(path) if done else []
        kept = [record for record in before if record["step"] <= done and "size" not in record]
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.bad_steps = sum(record.get("bad_steps", 0) for record in kept)
        # Not tensorboardX's SummaryWriter, whose thread ends when the disk is full and leaves the
        # training waiting for it.
        events = self.folder / "tensorboard" / "events"
        events.parent.mkdir(exist_ok=True)
        self.board = EventsWriter(str(events))
        start = SessionLog(status=SessionLog.START)  # hides what is stored of this step and later
        self.board.write_event(Event(step=done + 1, session_log=start))
        self.file = path.open("a", buffering=1)
        self.write(done, size=sizes(state, memory))
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=self.steps, completed=done, status="")
        if done:
            self.console.print(f"{self.title}: goes on from step {done}.", highlight=False)
        self.since = time.perf_counter()

    def stepped(self, done: int, metrics: Mapping[str, jax.Array], waited: float) -> None:
        """Keeps the numbers where they are until a line is due: reading one waits for the step."""
        self.waiting.append((dict(metrics), waited))
        if done % self.log_every == 0 or done == self.steps:
            self.flush(done)

    def flush(self, done: int) -> None:
        if not self.waiting:
            return
        values = jax.device_get([metrics for metrics, _ in self.waiting])
        elapsed = time.perf_counter() - self.since
        steps, waited = len(self.waiting), sum(waited for _, waited in self.waiting)
        self.waiting.clear()
        self.since = time.perf_counter()
        good = [bool(value.pop("good")) for value in values]
        self.count_bad(good)
        if not self.active:
            return
        bad = steps - sum(good)
        if bad:
            self.console.print(
                f"[red]{self.title}: {bad} of the {steps} steps up to {done} changed nothing: "
                "their loss or gradient is no finite number.[/]",
                highlight=False, soft_wrap=True,
            )  # fmt: skip
        rate = steps * self.units_per_step / elapsed
        if bad < steps:
            values = list(itertools.compress(values, good))
        means = {name: float(np.mean([value[name] for value in values])) for name in values[0]}
        self.write(
            done,
            **means,
            **({"bad_steps": bad} if bad else {}),
            learning_rate=float(self.learning_rate(max(0, done - 1 - self.bad_steps))),
            seconds_per_step=elapsed / steps,
            input_seconds_per_step=waited / steps,
            **{f"{self.unit}_per_second": rate},
        )
        self.status = f"loss {means['loss']:.3f}  {rate:,.0f} {self.unit}/s"
        self.show(done)

    def count_bad(self, good: list[bool]) -> None:
        for one in good:
            self.bad_in_a_row = 0 if one else self.bad_in_a_row + 1
            self.worst_row = max(self.worst_row, self.bad_in_a_row)
        self.bad_steps += len(good) - sum(good)

    def show(self, done: int) -> None:
        status = f"{self.status}  validation {self.validation_loss}"
        self.progress.update(self.task, completed=done, status=status)

    def evaluated(self, done: int, validation: dict[str, dict[str, float]]) -> None:
        if self.active:
            self.write(done, validation=validation)
            with naming(self.folder / "tensorboard"):
                self.board.flush()
            loss = validation["x"]["loss"]
            if not math.isfinite(loss) and math.isfinite(float(self.validation_loss)):
                self.console.print(f"[red]{self.title}: at step {done} the loss is {loss}.[/]")
            self.validation_loss = f"{loss:.4f}"
            self.show(done)
            if not self.console.is_terminal:
                numbers = ", ".join(f"{k} {v:.4f}" for k, v in validation["x"].items())
                line = f"{self.title}: step {done} of {self.steps}, validation {numbers}"
                self.console.print(line, highlight=False, soft_wrap=True)
        self.since = time.perf_counter()  # an evaluation is no part of a step

    def write(self, step: int, **values: Any) -> None:
        with naming(self.folder / "metrics.jsonl"):
            self.file.write(json.dumps({"step": step, **values}) + "\n")
        values = [Summary.Value(tag=name, simple_value=value) for name, value in flat(values)]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        with naming(self.folder / "tensorboard"):
            self.board.write_event(event)

    def close(self) -> None:
        if hasattr(self, "file"):
            self.progress.stop()
            for file in (self.file, self.board):
                with contextlib.suppress(OSError):  # a full disk, of which `write` has told
                    file.close()


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


def first_step_at(losses: list[tuple[int, float]], target: float) -> int | None:
    """The first evaluated step whose loss is at or below the target."""
    return next((step for step, loss in losses if loss <= target), None)


def table(runs: Mapping[str, History], steps: int, baseline: str | None = None) -> Table:
    """A line for each run, and for each set of weights that it was evaluated at; steps saved are
    counted to the final loss of the run that is named `baseline`."""
    complete = baseline in runs and runs[baseline].done == steps and len(runs) > 1
    goal = runs[baseline].last()["loss"] if complete else None
    metrics = sorted({name for run in runs.values() for name in run.last()}, reverse=True)
    headings = ["at\nstep", *metrics]
    if goal is not None:
        headings += ["reaches\nit at", "steps\nsaved"]
    headings += ["seconds\na step", "state\n(MiB)", "step\n(MiB)"]
    caption = "Loss (nats) on held-out data"
    caption += "." if goal is None else f"; 'it' is {baseline}'s last."
    result = Table("", *headings, caption=caption, box=box.SIMPLE_HEAD, padding=0)
    result.columns[0].overflow = "fold"
    for column in result.columns[1:]:
        column.justify = "right"
        column.no_wrap = True  # where it is narrow the names give way, and no digit is lost
    for name, run in runs.items():
        for weights, evaluated in run.validation.items():
            if evaluated[-1][0] != run.done:  # y, when it was asked for at first and later not
                continue
            label = name if list(run.validation) == ["x"] else f"{name} at {weights}"
            cells = [f"{run.done}", *(f"{run.last(weights)[metric]:.4f}" for metric in metrics)]
            if goal is not None:
                step = first_step_at(run.losses(weights), goal)
                reached = ("never", "-") if step is None else (f"{step}", f"{1 - step / steps:.0%}")
                cells += ("", "") if name == baseline else reached
            cells += [f"{run.seconds_per_step:.3f}", f"{run.size['optimizer_bytes'] / 2**20:.1f}"]
            cells += [f"{run.size.get('step_bytes', float('nan')) / 2**20:.0f}"]
            result.add_row(label, *cells)
    return result


def stopped(done: int, resume: bool) -> str:
    """How to go on."""
    how = "the same command" if resume else "the same command without --no-resume"
    return f"Stopped after step {done}; {how} goes on from there."


def plot(runs: Mapping[str, History], path: Path, baseline: str | None = None) -> None:
    """Validation loss over steps; of a single run, its training loss too."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lowest = []
    for (name, run), colour in zip(runs.items(), COLOURS * 3, strict=False):
        if len(runs) == 1 and run.train_loss:
            axes.plot(*zip(*run.train_loss, strict=True), color="0.75", label="training")
        for weights in run.validation:
            line = "-" if weights == "x" else ":"
            label = name if list(run.validation) == ["x"] else f"{name} at {weights}"
            losses = run.losses(weights)
            axes.plot(*zip(*losses, strict=True), line, color=colour, label=label)
            lowest.append(min(loss for _, loss in losses))
    if baseline in runs and len(runs) > 1:
        goal = runs[baseline].last()["loss"]
        axes.axhline(goal, color=COLOURS[list(runs).index(baseline)], linewidth=0.8, linestyle="--")
        for (name, run), colour in zip(runs.items(), COLOURS * 3, strict=False):
            step = first_step_at(run.losses(), goal)
            if step is not None and name != baseline:
                axes.plot([step], [goal], "o", color=colour)
    # The first steps fall from ln(classes); what is compared happens near the end.
    highest = max(run.losses()[0][1] for run in runs.values())
    height = highest - min(lowest)
    if height > 0:
        axes.set_ylim(min(lowest) - 0.05 * height, min(lowest) + 0.6 * height)
    axes.set(xlabel="Step", ylabel="Loss (nats)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
