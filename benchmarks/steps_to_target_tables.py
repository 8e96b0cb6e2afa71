"""The tables and figures of the study steps_to_target, with what its recipe brought elsewhere."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from benchmarks import Table, steps_to_target, transfer
from benchmarks.statistics import (
    Curve,
    against_itself,
    bootstrap,
    detectable,
    estimate,
    holm,
    mean_curve,
    signed_saving,
)
from benchmarks.steps_to_target import WORKLOADS, Row, parts, title
from benchmarks.store import Store, settled
from examples.config import OneRun
from examples.plots import COLOURS

TITLES = {
    "text": "Llama, text",
    "images": "ViT, batches of 64",
    "images-large": "ViT, batches of 512",
}
RECIPE = "the recipe"  # of benchmarks.transfer
GPAS = (RECIPE, "gpa-adamw", "gpa-adamw, annealed")
# The contenders whose form was chosen after the seeds of these finals had been seen.
AFTER = {"text": set(GPAS), "images": {RECIPE}, "images-large": {RECIPE}}
METHOD_COLOURS = dict(
    zip(("", "gpa", "schedule-free", "diloco", "ema", "gpa, annealed"), COLOURS, strict=False)
)


def short_title(contender: str) -> str:
    """The title without the base, for figures that have only one base."""
    return title(contender).replace("-AdamW", "")


def title_beside_adamw(name: str) -> str:
    return "`anytime_adamw`, not tuned" if name == RECIPE else short_title(name)


def finals_table(store: Store, workload: str) -> Table:
    found = steps_to_target.rows(workload, store)
    strict = any(row.saved_strictly for row in found)
    columns = slice(None if strict else -1)  # the last is the strict reading
    headings = steps_to_target.HEADINGS[columns]
    return headings, [steps_to_target.cells(row)[columns] for row in found]


def trials_table(store: Store, workload: str) -> Table:
    """Every tuning trial, the best of an optimizer first."""
    lines = []
    for name in WORKLOADS[workload].contenders:
        tried = settled(steps_to_target.trials, workload, name, store)
        for trial in tried or ():
            changed = {
                field: value
                for field, value in dataclasses.asdict(trial.settings).items()
                if value != getattr(steps_to_target.method(name).start, field)
                and field != "learning_rate"
            }
            what = ", ".join(f"`{field}={value}`" for field, value in changed.items())
            loss, rate = store[trial].loss, trial.settings.learning_rate
            lines.append([title(name), f"{rate:.2g}", what, f"{loss:.4f}"])
    return ("", "learning rate", "other than at the start", "loss at the end"), lines


def beside_adamw(workload: str, store: Store) -> dict[str, list[OneRun]]:
    """The recipe's runs, and the finals' with AdamW as the base on the same seeds."""
    finals = settled(steps_to_target.finals, workload, store)
    recipe = settled(transfer.on_workload, workload, store)
    if finals is None or recipe is None:
        return {}
    found = {name: runs for name, runs in finals.items() if parts(name)[1] == "adamw"}
    return {RECIPE: recipe["gpa-adamw"], **found}


def differences(runs: Sequence[OneRun], others: Sequence[OneRun], store: Store) -> list[float]:
    """Of the losses at the end, paired by seed."""
    return [store[run].loss - store[other].loss for run, other in zip(runs, others, strict=True)]


def rivals_table(store: Store) -> Table:
    """GPA's loss at the end less that of its rivals beside AdamW, paired by seed."""
    lines = []
    for workload in WORKLOADS:
        found = beside_adamw(workload, store)
        for gpa in GPAS if found else ():
            line = [TITLES[workload], title_beside_adamw(gpa)]
            for rival in ("schedule-free-adamw", "diloco-adamw", "ema-adamw"):
                paired = differences(found[gpa], found[rival], store)
                line.append(steps_to_target.interval(estimate(paired)))
                if rival == "schedule-free-adamw":
                    line.append(f"{detectable(paired):.3f}")
            lines.append(line)
    headings = (
        "",
        "",
        "against Schedule-Free",
        "could be seen from",
        "against DiLoCo",
        "against EMA",
    )
    return headings, lines


class Saving(NamedTuple):
    """What a contender saves in one place, and what AdamW saves against itself there."""

    where: str
    name: str
    chosen: str
    """Whether its form was chosen before or after the seeds were seen."""
    saved: float
    low: float
    high: float
    by_chance: float
    p: float
    """Of the difference of the losses at the end, by Holm over the contenders of the place."""


def savings(
    where: str, runs: dict[str, list[OneRun]], after: set[str], store: Store
) -> list[Saving]:
    """A line for each contender against the runs of AdamW."""
    curves = {name: [store[run].curve["loss"] for run in same] for name, same in runs.items()}
    baseline = curves.pop("adamw")
    saving = functools.partial(signed_saving, store[runs["adamw"][0]].curve["step"])
    by_chance = float(np.quantile(np.abs(against_itself(saving, baseline)), 0.95))
    p_values = [estimate(differences(runs[name], runs["adamw"], store)).p for name in curves]
    return [
        Saving(
            where,
            title_beside_adamw(name),
            "after" if name in after else "before",
            saving(of_it, baseline),
            *bootstrap(saving, of_it, baseline),
            by_chance,
            p,
        )
        for (name, of_it), p in zip(curves.items(), holm(p_values), strict=True)
    ]


@functools.cache
def all_savings(store: Store) -> list[Saving]:
    """On the workloads, and the recipe's on the further conditions."""
    found = []
    for workload in WORKLOADS:
        runs = beside_adamw(workload, store)
        found += savings(TITLES[workload], runs, AFTER[workload], store) if runs else []
    for condition in transfer.CONDITIONS:
        runs = settled(transfer.on_condition, condition, store)
        if runs is not None:
            both = {"adamw": runs["adamw"], RECIPE: runs["gpa-adamw"]}
            found += savings(condition, both, set(), store)
    return found


def savings_table(store: Store) -> Table:
    lines = [
        [
            s.where,
            s.name,
            s.chosen,
            f"{s.saved:+.1%} ({s.low:+.1%} to {s.high:+.1%})",
            f"within {s.by_chance:.1%}",
            f"{s.p:.1g}",
        ]
        for s in all_savings(store)
    ]
    headings = (
        "",
        "",
        "form chosen",
        "signed saving",
        "AdamW against itself",
        "loss at the end: p",
    )
    return headings, lines


def brief_savings_table(store: Store) -> Table:
    """For the README: the workloads beside each other."""
    found = [s for s in all_savings(store) if s.where in TITLES.values()]
    places = list(dict.fromkeys(s.where for s in found))
    lines = []
    for name in dict.fromkeys(s.name for s in found):
        of_it = [s for s in found if s.name == name]
        lines.append([name, *(f"{s.saved:+.0%} ({s.low:+.0%} to {s.high:+.0%})" for s in of_it)])
    chance = {s.where: f"within {s.by_chance:.0%}" for s in found}
    lines.append(["AdamW, against itself on other seeds", *chance.values()])
    return ("", *places), lines if found else []


def saved_figure(rows: dict[str, list[Row]]) -> Figure:
    """Steps saved to AdamW's final loss: filled as in the paper, hollow by shorter runs."""
    figure = Figure(figsize=(8, 1 + 1.15 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ticks, height = {}, 0.0
    for workload, found in rows.items():
        challengers = [row for row in found if parts(row.name)[0] and parts(row.name)[1] == "adamw"]
        ticks[height - (len(challengers) - 1) / 2] = TITLES[workload]
        for row in challengers:
            colour = METHOD_COLOURS[parts(row.name)[0]]
            for saved, face in ((row.saved, colour), (row.saved_strictly, "white")):
                if saved is None:
                    continue
                at = height + (0.16 if saved is row.saved else -0.16)
                axes.plot([100 * saved.low, 100 * saved.high], [at, at], color=colour, linewidth=2)
                axes.plot(100 * saved.mean, at, "o", color=colour, markerfacecolor=face)
            right = 100 * max(s.high for s in (row.saved, row.saved_strictly) if s is not None)
            name = short_title(row.name) + ("" if row.reached else " (never there)")
            axes.text(max(right, 0) + 0.6, height, name, color=colour, va="center")
            height -= 1
        height -= 1
    axes.set_ylim(height + 1.5, 0.5)
    axes.axvline(0, color=METHOD_COLOURS[""], linewidth=1)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.set_xlabel(
        "Steps saved to the loss at which tuned AdamW ends (%), with 95 % intervals\n"
        "filled: by when a run of the same length is there; hollow: by a shorter run of its own"
    )
    axes.tick_params(left=False)
    axes.spines["left"].set_visible(False)
    return figure


def mean_curves(workload: str, store: Store) -> dict[str, Curve]:
    """The curves of AdamW and of what is around it, in the order of the colours."""
    whole = settled(steps_to_target.finals, workload, store) or {}
    names = [name for name in whole if parts(name)[1] == "adamw"]
    names.sort(key=lambda name: [*METHOD_COLOURS].index(parts(name)[0]))
    return {
        short_title(name): mean_curve(
            store[whole[name][0]].curve["step"], [store[run].curve["loss"] for run in whole[name]]
        )
        for name in names
    }


def trials_figure(trials: dict[str, dict[str, list[tuple[float, float]]]]) -> Figure:
    """The loss at the end over the learning rate, of every trial."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axes, (workload, contenders) in zip(
        np.atleast_1d(figure.subplots(1, len(trials))), trials.items(), strict=True
    ):
        lowest = min(loss for points in contenders.values() for _, loss in points)
        for contender, points in contenders.items():
            rates = sorted({rate for rate, _ in points})
            best = [min(loss for r, loss in points if r == rate) for rate in rates]
            colour = METHOD_COLOURS[parts(contender)[0]]
            axes.plot(rates, best, color=colour, linewidth=1)
            axes.plot(*zip(*points, strict=True), ".", color=colour, label=short_title(contender))
        axes.set(xscale="log", xlabel="Peak learning rate", title=TITLES[workload])
        rates = WORKLOADS[workload].learning_rates
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
        axes.minorticks_off()
        axes.set_ylim(lowest - 0.01, lowest + 0.25)
    figure.axes[0].set_ylabel("Validation loss at the end (nats)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def all_trials(workload: str, store: Store) -> dict[str, list[tuple[float, float]]]:
    found = {}
    for name in WORKLOADS[workload].contenders:
        tried = settled(steps_to_target.trials, workload, name, store)
        if tried and parts(name)[1] == "adamw":
            found[name] = [(t.settings.learning_rate, store[t].loss) for t in tried]
    return found


def map_figure(losses: list[tuple[float | None, float, float]]) -> Figure:
    """The loss at the end for each window and mu_y, with the settings that have names."""
    windows = sorted({w for w, _, _ in losses if w not in (None, 1)})
    windows.append(None)
    mu_ys = sorted({mu_y for _, mu_y, _ in losses})
    grid = np.full((len(mu_ys), len(windows)), np.nan)
    for window, mu_y, loss in losses:
        if window != 1:
            grid[mu_ys.index(mu_y), windows.index(window)] = loss
    base = next(loss for window, _, loss in losses if window == 1)
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    lowest = np.nanmin(grid)
    image = axes.imshow(grid, cmap="viridis_r", origin="lower", aspect="auto",
                        vmin=lowest, vmax=lowest + 0.3)  # fmt: skip
    for (row, column), loss in np.ndenumerate(grid):
        name = {(0.7, 300): "\nthe defaults", (0.9, None): "\nSchedule-Free"}.get(
            (mu_ys[row], windows[column]), ""
        )
        if mu_ys[row] == 0 and windows[column] is not None:
            name = "\nEMA"
        elif windows[column] is not None and np.isclose(mu_ys[row], 1 - 1 / windows[column]):
            name = "\nNesterov"
        dark = loss > lowest + 0.15
        axes.text(column, row, f"{loss:.3f}{name}", ha="center", va="center", fontsize=8,
                  color="white" if dark else "black")  # fmt: skip
    axes.set_xticks(
        range(len(windows)),
        ["Schedule-Free's" if w is None else f"{1 - 1 / w:.4g}" for w in windows],
    )
    axes.set_yticks(range(len(mu_ys)), [f"{mu_y:g}" for mu_y in mu_ys])
    axes.set(
        xlabel="mu_x (warmed up)", ylabel="mu_y", title=f"The base alone (mu_x = 0): {base:.3f}"
    )
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="Validation loss at the end (nats)")
    return figure
