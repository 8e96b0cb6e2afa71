"""Trains the same model with several optimizers and tells which needs fewer steps.

python -m examples.compare llama
python -m examples.compare llama --steps 200 --gpa-adamw.learning-rate 8e-3
"""

import dataclasses
import json
import platform
import sys
from pathlib import Path
from typing import Literal

import jax
import matplotlib
import numpy as np
import optax
import tyro
from flax import nnx
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import gpa_optax
from examples.llama.data import Corpus, even_windows, random_windows, standard_library
from examples.llama.model import Llama, LlamaConfig
from examples.llama.sampling import sample
from examples.optimizers import AdamW, GPAAdamW, Recipe
from examples.training import Run, train

NAMES = {"adamw": "AdamW", "gpa-adamw": "GPA-AdamW"}


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains a small Llama on the Python standard library with AdamW and with GPA around AdamW, on
    the same batches and from the same initialization, and compares them."""

    workload: tyro.conf.Positional[Literal["llama"]]
    """What to train."""
    steps: int = 1000
    """Updates of each optimizer."""
    batch_size: int = 40
    """Sequences in a batch."""
    length: int = 64
    """Tokens in a sequence."""
    seed: int = 0
    """Decides the initialization and the order of the batches."""
    optimizers: tuple[Literal["adamw", "gpa-adamw"], ...] = ("adamw", "gpa-adamw")
    """Which optimizers to run, in this order."""
    evaluations: int = 20
    """How often to evaluate in the course of a run."""
    validation_windows: int = 200
    """Sequences of held-out files to evaluate on."""
    out: Path = Path("runs/compare-llama")
    """Folder for compare.json and compare.png."""
    adamw: AdamW = dataclasses.field(default_factory=AdamW)
    gpa_adamw: GPAAdamW = dataclasses.field(default_factory=GPAAdamW)
    model: LlamaConfig = dataclasses.field(default_factory=LlamaConfig)

    def __post_init__(self):
        for name in ("steps", "batch_size", "length", "evaluations", "validation_windows"):
            if getattr(self, name) < 1:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} must be at least 1, got {getattr(self, name)}.")
        if self.model.dim % self.model.heads or self.model.heads % self.model.kv_heads:
            raise ValueError(
                f"--model.dim ({self.model.dim}) must be a multiple of --model.heads "
                f"({self.model.heads}), and that of --model.kv-heads ({self.model.kv_heads})."
            )
        if self.model.dim // self.model.heads % 2:
            raise ValueError(
                f"--model.dim / --model.heads must be even for rotary positions, got "
                f"{self.model.dim} / {self.model.heads}."
            )
        if self.model.vocab_size < 257:
            raise ValueError(
                f"--model.vocab-size must be at least 257 (all bytes and the end of a file), got "
                f"{self.model.vocab_size}."
            )
        for name in self.optimizers:  # which check their own settings
            self.recipe(name)

    def recipe(self, optimizer: str) -> Recipe:
        return getattr(self, optimizer.replace("-", "_")).recipe(self.steps)


def main(arguments: list[str] | None = None) -> int:
    console = Console()
    config = tyro.cli(Config, prog="python -m examples.compare", args=arguments)
    runs: dict[str, Run] = {}
    interrupted = False
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        corpus = prepare(config, console)
        run_all(config, corpus, runs, console)
    except (ValueError, OSError) as error:
        console.print(f"[red]{escape(str(error))}[/]", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        interrupted = True
        console.print("\nInterrupted. What there is so far:")
    runs = {name: run for name, run in runs.items() if run.validation_loss}
    if not runs:
        console.print("Nothing was trained.")
        return 130
    console.print(table(runs))
    console.print(verdict(runs), highlight=False)
    save(config, runs)
    plot(runs, config.out / "compare.png")
    if (text := sample_text(config, corpus, runs)) is not None:
        console.print(text)
    console.print(
        f"Numbers: {config.out}/compare.json. Curves: {config.out}/compare.png.",
        highlight=False,
        soft_wrap=True,
    )
    return 130 if interrupted else 0


def prepare(config: Config, console: Console) -> Corpus:
    with console.status("Reading and tokenizing the standard library"):
        corpus = standard_library(config.model.vocab_size)
    if config.length >= len(corpus.validation):
        raise ValueError(
            f"--length must be below the {len(corpus.validation):,} tokens that there are to "
            f"validate on, got {config.length}."
        )
    console.print(corpus.description, highlight=False)
    size = sum(p.size for p in jax.tree.leaves(nnx.state(new_model(config), nnx.Param)))
    console.print(
        f"Llama with {size:,} parameters, {config.steps} steps of {config.batch_size} sequences of "
        f"{config.length} tokens, on {jax.devices()[0].device_kind}",
        highlight=False,
    )
    return corpus


def new_model(config: Config) -> Llama:
    return Llama(config.model, nnx.Rngs(config.seed))


def next_token_loss(model: nnx.Module, tokens_BxL: jax.Array) -> jax.Array:
    """Mean cross-entropy of each token after the first, in nats."""
    logits = model(tokens_BxL[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens_BxL[:, 1:]).mean()


def run_all(config: Config, corpus: Corpus, runs: dict[str, Run], console: Console) -> None:
    """Fills `runs`, optimizer by optimizer; each sees the same batches."""
    windows = even_windows(corpus.validation, config.validation_windows, config.length)
    pieces = int(np.ceil(len(windows) / config.batch_size))
    count = len(windows) // pieces  # equal batches: the mean of their means is the mean
    validation = windows[: pieces * count].reshape(pieces, count, -1)
    every = max(1, config.steps // config.evaluations)
    progress = Progress(
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=None),
        TextColumn("{task.completed}/{task.total}  validation loss {task.fields[loss]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )
    with progress:
        for name in config.optimizers:
            runs[name] = run = Run(config.steps)
            task = progress.add_task(NAMES[name], total=config.steps, loss="-")

            def report(run: Run, task=task, name=name) -> None:
                loss = final(run)
                progress.update(task, completed=run.done, loss=f"{loss:.4f}")
                if not console.is_terminal and run.done % (10 * every) == 0:
                    console.print(f"{NAMES[name]}: step {run.done}, validation loss {loss:.4f}")

            train(
                new_model(config),
                next_token_loss,
                config.recipe(name),
                random_windows(corpus.train, config.batch_size, config.length, config.seed),
                validation,
                run,
                every,
                report,
            )


def final(run: Run) -> float:
    """The last validation loss of the weights that the optimizer is evaluated at."""
    *_, best = run.validation_loss.values()
    return best[-1][1]


def target(runs: dict[str, Run]) -> float | None:
    """AdamW's final loss, once its run is complete."""
    run = runs.get("adamw")
    return final(run) if run is not None and run.done == run.steps else None


def first_step_at(losses: list[tuple[int, float]], target: float) -> int | None:
    return next((step for step, loss in losses if loss <= target), None)


def table(runs: dict[str, Run]) -> Table:
    """A column for each set of weights that an optimizer offers for evaluation."""
    goal = target(runs)
    columns = {}
    for name, run in runs.items():
        for weights, losses in run.validation_loss.items():
            title = NAMES[name] if weights == "params" else f"{NAMES[name]} at {weights}"
            reached = saved = "-"
            if goal is not None and name != "adamw":
                step = first_step_at(losses, goal)
                reached = "never" if step is None else str(step)
                saved = "none" if step is None else f"{1 - step / run.steps:.0%}"
            columns[title] = (
                f"{run.done} of {run.steps}",
                f"{losses[-1][1]:.4f}",
                reached,
                saved,
                f"{run.seconds_per_step:.3f}",
                f"{run.optimizer_bytes / 2**20:.1f}",
                f"{run.step_bytes / 2**20:.0f}",
            )
    rows = (
        "Steps",
        "Validation loss (nats per token)",
        "Reaches AdamW's end at step",
        "Steps saved",
        "Seconds per step",
        "Optimizer state (MiB)",
        "Memory of a step (MiB)",
    )
    result = Table("", *columns)
    for row, values in zip(rows, zip(*columns.values(), strict=True), strict=True):
        result.add_row(row, *values)
    return result


def verdict(runs: dict[str, Run]) -> str:
    goal, run = target(runs), runs.get("gpa-adamw")
    if goal is None or run is None or run.done < run.steps:
        return "No comparison: it needs a complete run of both optimizers."
    step = first_step_at(run.validation_loss["x"], goal)
    if step is None:
        return (
            f"GPA did not reach AdamW's final loss: {final(run):.4f} against {goal:.4f} "
            f"after {run.steps} steps."
        )
    return (
        f"GPA's average reached AdamW's final loss ({goal:.4f}) at step {step} of {run.steps}, "
        f"{1 - step / run.steps:.0%} fewer steps, and ended at {final(run):.4f}. "
        "One seed: runs of one optimizer differ as well."
    )


def save(config: Config, runs: dict[str, Run]) -> None:
    """Writes every measured number, with the configuration and versions behind it."""
    results = {
        "config": dataclasses.asdict(config),
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (gpa_optax, jax, optax)},
        },
        "target": target(runs),
        "runs": {
            name: {
                field.name: getattr(run, field.name)
                for field in dataclasses.fields(Run)
                if field.name != "weights"
            }
            for name, run in runs.items()
        },
    }
    (config.out / "compare.json").write_text(json.dumps(results, indent=1, default=str) + "\n")


def plot(runs: dict[str, Run], path: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # Okabe and Ito's palette, which colour-blind readers can tell apart.
    styles = {
        ("adamw", "params"): ("AdamW", "#0072B2", "-"),
        ("gpa-adamw", "y"): ("GPA-AdamW at y", "#E69F00", ":"),
        ("gpa-adamw", "x"): ("GPA-AdamW at the average x", "#D55E00", "-"),
    }
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    lowest = []
    for name, run in runs.items():
        for weights, losses in run.validation_loss.items():
            label, colour, line = styles[name, weights]
            axes.plot(*zip(*losses, strict=True), line, color=colour, label=label)
            lowest.append(min(loss for _, loss in losses))
    goal = target(runs)
    if goal is not None:
        axes.axhline(goal, color="#0072B2", linewidth=0.8, linestyle="--")
        step = (
            first_step_at(runs["gpa-adamw"].validation_loss["x"], goal)
            if "gpa-adamw" in runs
            else None
        )
        if step is not None:
            axes.plot([step], [goal], "o", color="#D55E00")
            axes.annotate(
                f"GPA reaches AdamW's final loss at step {step}",
                (step, goal),
                xytext=(-60, -30),
                textcoords="offset points",
                ha="right",
                arrowprops={"arrowstyle": "-"},
            )
    # The first steps fall from ln(vocabulary); what is compared happens near the end.
    axes.set_ylim(min(lowest) - 0.3, min(lowest) + 2.0)
    axes.set(xlabel="Step", ylabel="Validation loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def sample_text(config: Config, corpus: Corpus, runs: dict[str, Run]) -> Panel | None:
    run = runs.get("gpa-adamw")
    if run is None or run.weights is None:
        return None
    model = new_model(config)
    nnx.update(model, run.weights)
    text = sample(model, corpus.tokenizer, "def ", 100, config.length, seed=config.seed)
    return Panel(Text(text), title="Sampled from the averaged model")


if __name__ == "__main__":
    sys.exit(main())
