"""What a run shows while it trains."""

import math
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from examples.console import say


class Display:
    """A bar with the last losses on a terminal; lines elsewhere."""

    def __init__(self, console: Console, title: str, steps: int, active: bool):
        self.console, self.title, self.steps = console, title, steps
        self.training, self.validation = "", "0"
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.completed}/{task.total}  {task.fields[status]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not active,
        )

    def say(self, line: str) -> None:
        say(self.console, f"{self.title}: {line}")

    def begin(self, done: int) -> None:
        self.progress.start()
        self.task = self.progress.add_task(self.title, total=self.steps, completed=done, status="")
        if done:
            self.say(f"resumes from step {done}.")

    def stepped(self, done: int, loss: float, rate: float, unit: str) -> None:
        self.training = f"loss {loss:.3f}  {rate:,.0f} {unit}/s"
        self.update(done)

    def evaluated(self, done: int, metrics: Mapping[str, float]) -> None:
        loss = metrics["loss"]
        if not math.isfinite(loss) and math.isfinite(float(self.validation)):
            self.say(f"at step {done} the loss is {loss}.")
        self.validation = f"{loss:.4f}"
        self.update(done)
        if not self.console.is_terminal:
            numbers = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
            self.say(f"step {done} of {self.steps}, validation {numbers}")

    def update(self, done: int) -> None:
        status = f"{self.training}  validation {self.validation}"
        self.progress.update(self.task, completed=done, status=status)

    def close(self) -> None:
        self.progress.stop()
