"""Makes the figures and the tables of the documentation from the results, and from nothing else.

python -m benchmarks.report            # writes them
python -m benchmarks.report --check    # exit status 1, and their names, if any is not up to date

Tables stand between two comments in README.md, benchmarks/pages, docs/accelerator.md,
docs/tested.md and docs/api/errors.md; that of bad input and its errors is made by running
bad_input.py. A figure carries a digest of its numbers and of the code that draws it, by which it is
known to be up to date.
"""

import dataclasses
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks import (
    Table,
    bad_input,
    convex,
    cost_tables,
    evidence_tables,
    ingredients,
    long_runs,
    steps_to_target,
    steps_to_target_tables,
    transfer,
)
from benchmarks.accelerator import tables as accelerator_tables
from benchmarks.runs import stored
from benchmarks.statistics import Curve
from benchmarks.steps_to_target import WORKLOADS
from benchmarks.store import RESULTS, Store, measured, settled
from benchmarks.studies import STUDIES
from examples.files import write_whole
from examples.plots import COLOURS

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "docs" / "figures"
PAGES = (
    ROOT / "README.md",
    *sorted((ROOT / "benchmarks" / "pages").glob("*.md")),
    ROOT / "docs" / "accelerator.md",
    ROOT / "docs" / "tested.md",
    ROOT / "docs" / "api" / "errors.md",
)
BLOCK = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.DOTALL)
matplotlib.rcParams |= {"svg.hashsalt": "gpa-optax", "font.size": 10, "axes.spines.top": False}
matplotlib.rcParams |= {"axes.spines.right": False, "legend.frameon": False}
MISSING = "Not all runs are there yet.\n"


def markdown(table: Table, missing: str = MISSING) -> str:
    headings, lines = table
    if not lines:
        return missing
    rows = [headings, ["---"] * len(headings), *lines]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


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


def errors_table() -> str:
    """Bad input, and what is said to it."""
    lines = [[f"`{call}`", f"`{error}: {message}`"] for call, error, message in bad_input.errors()]
    return markdown((("call", "error"), lines))


def figures(store: Store) -> Iterator[tuple[str, Callable[[Any], Figure], Any]]:
    """Name, function and numbers of each figure whose results are there."""
    study = steps_to_target_tables
    rows = {name: steps_to_target.rows(name, store) for name in WORKLOADS}
    yield "steps-saved", study.saved_figure, {name: found for name, found in rows.items() if found}
    curves = {study.TITLES[name]: study.mean_curves(name, store) for name in WORKLOADS}
    yield "curves", curves_figure, {heading: found for heading, found in curves.items() if found}
    trials = {name: study.all_trials(name, store) for name in WORKLOADS}
    yield "trials", study.trials_figure, {name: found for name, found in trials.items() if found}
    runs = settled(ingredients.mu_map, store) or {}
    losses = [(*point, store[run].loss) for point, run in runs.items()]
    yield "map", study.map_figure, losses
    yield "update-cost", cost_tables.cost_figure, cost_tables.on_the_cpu()
    evidence = evidence_tables.stored()
    yield "blocks", curves_figure, evidence_tables.curves(evidence)
    yield "length", evidence_tables.length_figure, evidence_tables.over_length(evidence)
    yield "convex", convex.figure, measured("convex")
    yield "long-runs", long_runs.figure, measured("long_runs")


def tables(store: Store) -> dict[str, Callable[[], str]]:
    """What stands between the comments with these names."""
    study, evidence = steps_to_target_tables, evidence_tables.stored()
    found: dict[str, Callable[[], Table]] = {}
    for workload in WORKLOADS:
        found[f"finals-{workload}"] = lambda name=workload: study.finals_table(store, name)
        found[f"trials-{workload}"] = lambda name=workload: study.trials_table(store, name)
    found["rivals"] = lambda: study.rivals_table(store)
    found["savings"] = lambda: study.savings_table(store)
    found["savings-in-brief"] = lambda: study.brief_savings_table(store)
    found["ingredients"] = lambda: (
        ingredients.HEADINGS,
        ingredients.effects_table(ingredients.effects(store)),
    )
    found["transfer"] = lambda: (transfer.COLUMNS, list(transfer.lines(transfer.rows(store))))
    found["cost"] = cost_tables.cost_table
    found["timings"] = cost_tables.timings_table
    found["compiled"] = cost_tables.compiled_table
    found["long-runs"] = lambda: long_runs.table(measured("long_runs"))
    for name in STUDIES:
        found[f"evidence-{name}"] = lambda name=name: evidence_tables.table(name, evidence)
    found["evidence-in-brief"] = lambda: evidence_tables.brief(evidence)
    found["evidence-seeds"] = lambda: evidence_tables.seeds(evidence)
    found["evidence-tuning"] = lambda: evidence_tables.tuning(evidence)
    texts = {name: lambda table=table: markdown(table()) for name, table in found.items()}
    for name, table in accelerator_tables.TABLES.items():
        texts[name] = lambda table=table: markdown(
            table(RESULTS / "accelerator"), missing="Not measured yet.\n"
        )
    texts["evidence-prediction"] = lambda: evidence_tables.prediction(evidence)
    texts["evidence-trend"] = lambda: evidence_tables.trend_text(evidence)
    texts["convex"] = lambda: convex.table(measured("convex"))
    texts["errors"] = errors_table
    return texts


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
