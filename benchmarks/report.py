"""Makes the figures and the tables of the documentation from the results, and from nothing else.

python -m benchmarks.report            # writes them
python -m benchmarks.report --check    # exit status 1, and their names, if any is not up to date

Tables stand between two comments in README.md, benchmarks/pages, docs/accelerator.md,
docs/tested.md and docs/api/errors.md; that of bad input and its errors is made by running
bad_input.py. A figure carries a digest of its numbers and of the code that draws it, by which it is
known to be up to date.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks import (
    bad_input,
    convex,
    evidence_tables,
    ingredients,
    long_runs,
    steps_to_target,
    transfer,
)
from benchmarks.accelerator import tables as accelerator_tables
from benchmarks.runs import stored
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
from benchmarks.studies import STUDIES
from examples.config import OneRun
from examples.files import write_whole
from examples.plots import COLOURS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FIGURES = ROOT / "docs" / "figures"
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "benchmarks" / "pages").glob("*.md")),
    ROOT / "docs" / "accelerator.md",
    ROOT / "docs" / "tested.md",
    ROOT / "docs" / "api" / "errors.md",
)
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
TITLES = {
    "text": "Llama, text",
    "images": "ViT, batches of 64",
    "images-large": "ViT, batches of 512",
}
RECIPE = "the recipe"  # of benchmarks.transfer
GPAS = (RECIPE, "gpa-adamw", "gpa-adamw, annealed")
# Whose form was chosen when the seeds of these finals had been seen.
AFTER = {"text": set(GPAS), "images": {RECIPE}, "images-large": {RECIPE}}
METHOD_COLOURS = dict(
    zip(("", "gpa", "schedule-free", "diloco", "ema", "gpa, annealed"), COLOURS, strict=False)
)
matplotlib.rcParams |= {"svg.hashsalt": "gpa-optax", "font.size": 10, "axes.spines.top": False}
matplotlib.rcParams |= {"axes.spines.right": False, "legend.frameon": False}


MISSING = "Not all runs are there yet.\n"


def markdown(
    headings: Sequence[str], lines: Sequence[Sequence[str]], missing: str = MISSING
) -> str:
    if not lines:
        return missing
    rows = [headings, ["---"] * len(headings), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def short_title(contender: str) -> str:
    """Without the base, in figures that have one base only."""
    return title(contender).replace("-AdamW", "")


def title_beside_adamw(name: str) -> str:
    return "`anytime_adamw`, not tuned" if name == RECIPE else short_title(name)


def finals_table(store: Store, workload: str) -> str:
    found = steps_to_target.rows(workload, store)
    strict = any(row.saved_strictly for row in found)
    columns = slice(None if strict else -1)  # the last is the strict reading
    return markdown(
        steps_to_target.HEADINGS[columns], [steps_to_target.cells(row)[columns] for row in found]
    )


def trials_table(store: Store, workload: str) -> str:
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
    return markdown(("", "learning rate", "other than at the start", "loss at the end"), lines)


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


def rivals_table(store: Store) -> str:
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
    return markdown(headings, lines)


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


def savings_table(store: Store) -> str:
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
    return markdown(headings, lines)


def brief_savings_table(store: Store) -> str:
    """For the README: the workloads beside each other."""
    found = [s for s in all_savings(store) if s.where in TITLES.values()]
    places = list(dict.fromkeys(s.where for s in found))
    lines = []
    for name in dict.fromkeys(s.name for s in found):
        of_it = [s for s in found if s.name == name]
        lines.append([name, *(f"{s.saved:+.0%} ({s.low:+.0%} to {s.high:+.0%})" for s in of_it)])
    chance = {s.where: f"within {s.by_chance:.0%}" for s in found}
    lines.append(["AdamW, against itself on other seeds", *chance.values()])
    return markdown(("", *places), lines if found else [])


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


def curves_figure(panels: dict[str, dict[str, Curve]]) -> Figure:
    """Mean held-out loss over the second half of the runs, with the standard error; a line at the
    height at which the first of a panel ends, the baseline."""
    figure = Figure(figsize=(4 * max(len(panels), 1.5), 3.4), layout="constrained")
    figure.patch.set_facecolor("white")
    for axes, (heading, curves) in zip(
        np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True
    ):
        ends, starts = [], []
        for colour, (label, curve) in zip(COLOURS, curves.items(), strict=False):
            late = np.array(curve.steps) >= curve.steps[-1] / 2
            x, y, e = (np.array(values)[late] for values in curve)
            axes.plot(x, y, color=colour, label=label)
            axes.fill_between(x, y - e, y + e, color=colour, alpha=0.2, linewidth=0)
            ends.append(y[-1])
            starts.append(y[0])
        axes.axhline(ends[0], color=COLOURS[0], linewidth=0.8, linestyle="--")
        axes.set_ylim(min(ends) - 0.1 * (starts[0] - min(ends)), starts[0])
        axes.set(xlabel="Step", title=heading)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("Held-out loss at x (nats)")
    # Outside, where it covers no curve; the contenders are the same in each.
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def mean_curves(workload: str, store: Store) -> dict[str, Curve]:
    """Of AdamW and what is around it, in the order of the colours."""
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


def cost_figure(updates: list[dict[str, Any]]) -> Figure:
    """Time of an update over that of optax.adamw: median and quartiles."""
    figure = Figure(figsize=(8, 0.9 + 0.32 * len(updates)), layout="constrained")
    axes = figure.subplots()
    for height, update in enumerate(reversed(updates)):
        low, median, high = update["ratio"]
        name = update["optimizer"]
        colour = METHOD_COLOURS["gpa"] if name.startswith("gpa") else "0.7"
        axes.barh(height, median, color=colour)
        axes.plot([low, high], [height, height], color="0.2", linewidth=1)
        axes.text(max(high, median) + 0.05, height, f"{median:.2f}", va="center")
    axes.axvline(1, color="0.2", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(updates)), [u["optimizer"] for u in reversed(updates)])
    axes.set_xlabel("Time of an update, relative to optax.adamw")
    axes.tick_params(left=False)
    return figure


def on_the_cpu(scheduler: str, size: str = "llama-160m") -> list[dict[str, Any]]:
    """The updates that were timed with a scheduler and a size."""
    return [u for u in updates("update_cost") if (u["scheduler"], u["size"]) == (scheduler, size)]


def cost_table() -> str:
    """What an update costs: from the compilers' programs, and timed on the CPU."""
    timed = {u["optimizer"]: u for u in on_the_cpu("default")}
    compiled: dict[str, list[dict[str, Any]]] = {}
    for update in updates("compiled_cost"):
        if update["dtype"] == "float32":
            compiled.setdefault(update["optimizer"], []).append(update)
    lines = []
    for name, found in compiled.items():
        if name not in timed:
            continue
        kernels = max(u["kernels_per_leaf"] for u in found)
        moved = {u["target"]: u["moved"] for u in found}
        everywhere = [u["ratio"][1] for u in updates("update_cost") if u["optimizer"] == name]
        lines.append(
            [
                f"`{name}`",
                f"{found[0]['state_bytes']:.0f}",
                f"{kernels:.2g}",
                f"{moved['h100:1']:.0f} ({found[0]['floor']:.0f})",
                f"{timed[name]['ratio'][1]:.2f} ({min(everywhere):.2f} to {max(everywhere):.2f})",
            ]
        )
    headings = (
        "update of",
        "state, bytes per parameter",
        "kernels per leaf (maximum over H100, TPU v5e, v5p, v6e)",
        "bytes moved per parameter on H100 (at least)",
        "time on a CPU, `optax.adamw` = 1 (range over sizes and schedulers)",
    )
    return markdown(headings, lines)


def timings_table() -> str:
    """Every size and scheduler: time over that of optax.adamw, and temporaries."""
    measured = updates("update_cost")
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for update in measured:
        temporary = update.get("temporary_bytes")
        more = f", {temporary / 2**20:.0f} MiB" if temporary and temporary > 2**20 else ""
        where = update["size"], update["scheduler"]
        cells.setdefault(update["optimizer"], {})[where] = f"{update['ratio'][1]:.2f}{more}"
    places = list(dict.fromkeys((u["size"], u["scheduler"]) for u in measured))
    places.sort(key=lambda place: place[1])
    headings = ["", *(f"{size}, {scheduler}" for size, scheduler in places)]
    return markdown(
        headings,
        [[f"`{name}`", *(row.get(place, "") for place in places)] for name, row in cells.items()],
    )


def compiled_table() -> str:
    """Every target and precision, of AdamW and what is built on it."""
    lines = [
        [
            update["target"].partition(":")[0],
            update["dtype"],
            f"`{update['optimizer']}`",
            f"{update['kernels_per_leaf']:.2f}",
            f"{update['temporary_bytes'] / 2**10:,.1f}",
            f"{update['in_place']:.1%}",
            f"{update['moved']:.1f}",
            f"{update['floor']:.1f}",
            f"{update['state_bytes']:.1f}",
        ]
        for update in updates("compiled_cost")
    ]
    headings = (
        "target", "params", "update of", "kernels per leaf", "temporaries, KiB", "in place",
        "bytes moved per parameter", "at least", "bytes of state per parameter",
    )  # fmt: skip
    return markdown(headings, lines)


def errors_table() -> str:
    """Bad input, and what is said to it."""
    lines = [[f"`{call}`", f"`{error}: {message}`"] for call, error, message in bad_input.errors()]
    return markdown(("call", "error"), lines)


def figures(store: Store) -> Iterator[tuple[str, Callable[[Any], Figure], Any]]:
    """Name, function and numbers of each figure whose results are there."""
    rows = {name: steps_to_target.rows(name, store) for name in WORKLOADS}
    yield "steps-saved", saved_figure, {name: found for name, found in rows.items() if found}
    curves = {TITLES[name]: mean_curves(name, store) for name in WORKLOADS}
    yield "curves", curves_figure, {heading: found for heading, found in curves.items() if found}
    trials = {name: all_trials(name, store) for name in WORKLOADS}
    yield "trials", trials_figure, {name: found for name, found in trials.items() if found}
    runs = settled(ingredients.mu_map, store) or {}
    yield "map", map_figure, [(*point, store[run].loss) for point, run in runs.items()]
    yield "update-cost", cost_figure, on_the_cpu("default")
    yield "blocks", curves_figure, evidence_tables.curves(evidence_tables.stored())
    yield "convex", convex.figure, results("convex")
    yield "long-runs", long_runs.figure, results("long_runs")


def results(name: str) -> Any:
    """What a benchmark measured, if it has."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def updates(name: str) -> list[dict[str, Any]]:
    """The updates of a cost benchmark; none if it was not run yet."""
    return (results(name) or {"updates": []})["updates"]


def tables(store: Store) -> dict[str, Callable[[], str]]:
    """What stands between the comments with these names."""
    found = {}
    for workload in WORKLOADS:
        found[f"finals-{workload}"] = lambda workload=workload: finals_table(store, workload)
        found[f"trials-{workload}"] = lambda workload=workload: trials_table(store, workload)
    found["rivals"] = lambda: rivals_table(store)
    found["savings"] = lambda: savings_table(store)
    found["savings-in-brief"] = lambda: brief_savings_table(store)
    found["ingredients"] = lambda: markdown(
        ingredients.HEADINGS, ingredients.effects_table(ingredients.effects(store))
    )
    found["transfer"] = lambda: markdown(
        transfer.COLUMNS, list(transfer.lines(transfer.rows(store)))
    )
    found |= {"cost": cost_table, "timings": timings_table, "compiled": compiled_table}
    found["convex"] = lambda: convex.table(results("convex"))
    found["long-runs"] = lambda: markdown(*long_runs.table(results("long_runs")))
    found["errors"] = errors_table
    evidence = evidence_tables.stored()
    for study in STUDIES:
        found[f"evidence-{study}"] = lambda study=study: markdown(
            *evidence_tables.table(study, evidence)
        )
    found["evidence-in-brief"] = lambda: markdown(*evidence_tables.brief(evidence))
    found["evidence-tuning"] = lambda: markdown(*evidence_tables.tuning(evidence))
    found["evidence-prediction"] = lambda: evidence_tables.prediction(evidence)
    for name, table in accelerator_tables.TABLES.items():
        found[name] = lambda table=table: markdown(
            *table(RESULTS / "accelerator"), missing="Not measured yet.\n"
        )
    return found


def digest(draw: Callable[[Any], Figure], numbers: Any) -> str:
    """Of what a figure shows: not of the last digits, in which versions of SciPy differ."""
    shown = json.loads(json.dumps(numbers, default=str), parse_float=lambda f: f"{float(f):.6g}")
    text = inspect.getsource(draw) + json.dumps(shown)
    return hashlib.sha256(text.encode()).hexdigest()


def stale(store: Store) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The files that are not up to date, and what brings each up to date."""
    for name, draw, numbers in figures(store):
        path, mark = FIGURES / f"{name}.svg", digest(draw, numbers)
        if numbers and not (path.exists() and mark in path.read_text()):

            def save(path=path, draw=draw, numbers=numbers, mark=mark):
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(numbers).savefig(path, metadata={"Description": mark, "Date": None})

            yield path, save
    texts = tables(store)
    for path in PAGES:
        old = path.read_text()
        new = BLOCK.sub(lambda block: f"{block[1]}{texts[block[2]]()}{block[3]}", old)
        if new != old:
            yield path, lambda path=path, new=new: write_whole(path, new)


@dataclasses.dataclass(frozen=True)
class Config:
    """Makes the figures and tables of the documentation from the results."""

    check: bool = False
    """Write nothing; tell what is not up to date."""


def main() -> int:
    flags = tyro.cli(Config, prog="python -m benchmarks.report")
    count = 0
    for path, write in stale(stored()):
        count += 1
        print(f"{path.relative_to(ROOT)} {'is not up to date' if flags.check else 'written'}")
        if not flags.check:
            write()
    if flags.check and count:
        print("python -m benchmarks.report brings them up to date.")
    return int(flags.check and count > 0)


if __name__ == "__main__":
    sys.exit(main())
