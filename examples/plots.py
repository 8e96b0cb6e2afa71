"""Tables and plots of runs, made from their metrics."""

from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.table import Table

from examples.metrics import History

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def first_step_at(losses: list[tuple[int, float]], target: float) -> int | None:
    """The first evaluated step whose loss is at or below the target."""
    return next((step for step, loss in losses if loss <= target), None)


def results_table(runs: Mapping[str, History], steps: int, baseline: str | None = None) -> Table:
    """A line for each run, and for each set of weights that it was evaluated at. Steps saved are
    those to the final loss of the run that is named `baseline`."""
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
        column.no_wrap = True  # on a narrow terminal names are folded, and no digit is lost
    for name, run in runs.items():
        for weights, evaluated in run.validation.items():
            if evaluated[-1][0] != run.done:  # y, if a resumed run no longer evaluates it
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


def plot(runs: Mapping[str, History], path: Path, baseline: str | None = None) -> None:
    """Validation loss over steps; of a single run, its training loss too."""
    from matplotlib.figure import Figure  # which takes half a second

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
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
