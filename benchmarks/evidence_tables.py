"""The tables and figures of the studies in `benchmarks.studies`, from what is stored so far."""

import functools
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from matplotlib.figure import Figure

from benchmarks import Table
from benchmarks.ensemble import Result, mean_final
from benchmarks.evidence import STORE
from benchmarks.members import MEMBERS
from benchmarks.statistics import (
    Curve,
    Estimate,
    bootstrap,
    estimate,
    exchanged,
    holm,
    mean_curve,
    prediction_interval,
    signed_saving,
    trend,
)
from benchmarks.store import Store, settled
from benchmarks.studies import (
    CONDITIONS,
    ONE_LINER_FORMS,
    ONE_LINERS,
    SIZES,
    STUDIES,
    TUNING,
    UNTUNED,
    Contrast,
)
from examples.llama.model import Llama, LlamaConfig
from examples.plots import COLOURS

HEADINGS = (
    "", "", "learning rate", "loss at the end", "less AdamW's", "p, by Holm", "signed saving",
    "by chance",
)  # fmt: skip


def stored() -> Store:
    return Store(STORE, kind=MEMBERS)


class Saving(NamedTuple):
    """Part of the steps that a contender saves, read off mean curves."""

    saved: float
    low: float
    high: float
    by_chance: float
    """Within which 95 % of savings lie if contender and baseline are exchanged at random."""


def complete(study: str, store: Store) -> Iterator[tuple[str, list[Contrast]]]:
    """The conditions of a study whose runs are all stored."""
    for name, condition in STUDIES[study].items():
        if (contrasts := settled(condition, store)) is not None:
            yield name, contrasts


def difference(contrast: Contrast) -> Estimate | None:
    """The difference of the losses at the end, paired by seed; None if a run diverged."""
    pairs = zip(contrast.contender, contrast.baseline, strict=True)
    found = [ours.final - theirs.final for ours, theirs in pairs]
    return estimate(found) if np.isfinite(found).all() else None


def losses(contrast: Contrast) -> tuple[np.ndarray, np.ndarray]:
    """The losses of contender and baseline, each (seeds, evaluations); infinite after a run has
    diverged."""
    both = [[run.curve["loss"] for run in runs] for runs in (contrast.contender, contrast.baseline)]
    count = max(len(curve) for curves in both for curve in curves)
    ours, theirs = (
        np.array([[*curve, *[np.inf] * (count - len(curve))] for curve in curves])
        for curves in both
    )
    return ours, theirs


def saving(contrast: Contrast) -> Saving:
    steps = contrast.baseline[0].curve["step"]
    ours, theirs = losses(contrast)

    def saved(ours, theirs):
        return signed_saving(steps, ours, theirs)

    chance = float(np.quantile(np.abs(exchanged(saved, ours, theirs)), 0.95))
    return Saving(saved(ours, theirs), *bootstrap(saved, ours, theirs), chance)


def table(study: str, store: Store) -> Table:
    """The headings, and a line for each contender, the baseline first, in each condition. One that
    is the baseline itself there has none."""
    lines = []
    for condition, contrasts in complete(study, store):
        baseline = contrasts[0].baseline
        contrasts = [one for one in contrasts if one.contender != baseline]
        first = f"{condition}, {len(baseline)} seeds"
        lines.append([first, baseline[0].member.optimizer, *run_cells(baseline), "", "", "", ""])
        differences = [difference(contrast) for contrast in contrasts]
        p_values = holm([1.0 if d is None else d.p for d in differences])
        for contrast, d, p in zip(contrasts, differences, p_values, strict=True):
            lines.append(["", contrast.name, *run_cells(contrast.contender)])
            if d is None:
                lines[-1] += ["diverged", "", "", ""]
                continue
            s = saving(contrast)
            lines[-1] += [
                f"{d.mean:+.4f} ({d.low:+.4f} to {d.high:+.4f})",
                f"{p:.1g}",
                f"{s.saved:+.1%} ({s.low:+.1%} to {s.high:+.1%})",
                f"within {s.by_chance:.1%}",
            ]
    return HEADINGS, lines


def seeds(store: Store) -> Table:
    """The losses at the end of every run of the study "blocks", seed by seed."""
    lines = []
    for condition, contrasts in complete("blocks", store):
        of_all = {"adamw": contrasts[0].baseline}
        of_all |= {contrast.name: contrast.contender for contrast in contrasts}
        for name, runs in of_all.items():
            finals = ", ".join(f"{run.final:.3f}" for run in runs)
            lines.append([condition if name == "adamw" else "", name, finals])
    return ("", "", "loss at the end, a number for each seed"), lines


def run_cells(runs: Sequence[Result]) -> list[str]:
    member = runs[0].member
    return [f"{member.learning_rate:.2g}, warmup {member.warmup:.0%}", f"{mean_final(runs):.4f}"]


def tuning(store: Store) -> Table:
    """The tuning trials of AdamW and of the one-liners, the best first, in each run."""
    tuned = {"adamw", *(optimizer for optimizer, _ in ONE_LINER_FORMS.values())}
    runs = CONDITIONS | {name: run for name, (run, *_) in SIZES.items()}
    names = {(run.steps, run.workload): name for name, run in runs.items()}
    groups: dict[tuple[int, str, str], dict[tuple[float, float], dict[int, float]]] = {}
    for result in store:
        member = result.member
        plain = member.workload.changes().keys() <= {"batch_size"}
        if member.seed in TUNING and member.optimizer in tuned and not member.knobs:
            steps = f"{member.steps:,} steps of {member.workload.batch_size}"
            run = steps if plain else names[member.steps, member.workload]
            key = (member.steps, run, member.optimizer)
            setting = member.learning_rate, member.warmup
            groups.setdefault(key, {}).setdefault(setting, {})[member.seed] = result.final
    lines = []
    for (_, run, optimizer), cell in sorted(groups.items()):
        ordered = sorted(cell.items(), key=lambda item: np.mean([*item[1].values()]))
        for (rate, warmup), finals in ordered:
            first = finals is ordered[0][1]
            losses = [f"{finals[seed]:.4f}" if seed in finals else "" for seed in TUNING]
            what = (run, optimizer) if first else ("", "")
            lines.append([*what, f"{rate:.2g}", f"{warmup:.0%}", *losses])
    headings = ("", "", "learning rate", "warmup", *(f"loss, seed {seed}" for seed in TUNING))
    return headings, lines


def prediction(store: Store) -> str:
    """Predicts the gain of each untuned form in a condition that was not tried."""
    gains: dict[str, list[float]] = {}
    for _, contrasts in complete("transfer", store):
        for contrast in contrasts:
            gains.setdefault(contrast.name, []).append(saving(contrast).saved)
    told = []
    for name, found in gains.items():
        if len(found) > 2:
            low, high = prediction_interval(found)
            told.append(
                f"In a new condition `{name}` is predicted to save {np.mean(found):+.0%} "
                f"({low:+.0%} to {high:+.0%}, from {len(found)} conditions)."
            )
    return paragraphs(told or ["Fewer than three conditions are complete."])


def paragraphs(told: Sequence[str]) -> str:
    return "\n\n".join(textwrap.fill(one, 118) for one in told) + "\n"


class Point(NamedTuple):
    """A condition of the studies "length" and "size"."""

    steps: int
    parameters: int
    contrast: Contrast


def over_length_and_size(name: str, store: Store) -> list[Point]:
    """Of one contender, the conditions that are complete."""
    return [
        Point(member.steps, count(member.workload.model), contrast)
        for study in ("length", "size")
        for _, contrasts in complete(study, store)
        for contrast in contrasts
        if contrast.name == name and difference(contrast) is not None
        for member in [contrast.contender[0].member]
    ]


@functools.cache
def count(config: LlamaConfig) -> int:
    model = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def trend_text(store: Store) -> str:
    """How the saving changes with the logarithms of length and size, by least squares."""
    per = (
        "at 1,000 steps",
        "for each doubling of the steps",
        "for each doubling of the parameters",
    )
    told = []
    for name in UNTUNED:
        points = over_length_and_size(name, store)
        if len(points) < 3:
            continue
        smallest = min(point.parameters for point in points)
        doublings = np.log2([(p.steps / 1000, p.parameters / smallest) for p in points])
        features = np.column_stack([np.ones(len(points)), doublings])
        features = features[:, features.any(axis=0)]  # with one size there is no term for it
        # All runs are evaluated after the same parts of their steps.
        parts = np.divide(points[0].contrast.baseline[0].curve["step"], points[0].steps)
        saved = functools.partial(signed_saving, parts)
        found = trend(saved, features, [losses(point.contrast) for point in points])
        terms = [
            f"{value:+.1%} ({low:+.1%} to {high:+.1%}) {what}"
            for (value, low, high), what in zip(found, per, strict=False)
        ]
        terms = ", and ".join([", ".join(terms[:2]), *terms[2:]])
        told.append(f"`{name}` saves {terms}, by least squares over {len(points)} conditions.")
    return paragraphs(told or ["Fewer than three lengths are complete."])


class Gain(NamedTuple):
    """What a form gains in runs of one length."""

    steps: int
    loss: Estimate
    """At the end, less AdamW's."""
    steps_saved: Saving


Panels = dict[str, dict[str, list[Gain]]]


def over_length(store: Store) -> Panels:
    """The gains of each form without tuning, by the size of the model. A form that is the same as
    an earlier one in a condition is left out there."""
    found: Panels = {}
    seen = []
    for name in UNTUNED:
        for steps, parameters, contrast in over_length_and_size(name, store):
            if contrast.contender in seen:
                continue
            seen.append(contrast.contender)
            loss = difference(contrast)
            assert loss is not None
            forms = found.setdefault(f"{parameters / 1e6:.3g}M parameters", {})
            forms.setdefault(name, []).append(Gain(steps, loss, saving(contrast)))
    return found


def length_figure(panels: Panels) -> Figure:
    """The difference of the losses, and the saving, over the length of the run, with 95 %
    intervals; the ends of the grey bars are what chance does."""
    figure = Figure(figsize=(max(5.4, 3.6 * len(panels)), 5.6), layout="constrained")
    figure.patch.set_facecolor("white")
    grid = figure.subplots(2, len(panels), sharex="col", sharey="row", squeeze=False)
    for (above, below), (size, forms) in zip(grid.T, panels.items(), strict=True):
        for number, (colour, (name, gains)) in enumerate(
            zip(COLOURS[1:], forms.items(), strict=False)
        ):
            # Beside each other, so that none covers another.
            places = [gain.steps * 1.06 ** (number - 1) for gain in gains]
            mean, low, high = np.array([gain.loss[:3] for gain in gains]).T
            above.plot(places, mean, "o-", color=colour, label=name)
            above.vlines(places, low, high, color=colour)
            saved, low, high, chance = 100 * np.array([gain.steps_saved for gain in gains]).T
            below.vlines(places, -chance, chance, color="0.85", linewidth=7, zorder=0)
            below.plot(places, saved, "o-", color=colour)
            below.vlines(places, low, high, color=colour)
        for axes in (above, below):
            axes.axhline(0, color="0.3", linewidth=0.8, linestyle="--")
            axes.grid(alpha=0.3)
        lengths = sorted({gain.steps for gains in forms.values() for gain in gains})
        above.set_title(size)
        below.set(xscale="log", xlabel="Steps of the run")
        below.set_xticks(lengths, [f"{steps:,}" for steps in lengths])
        below.minorticks_off()
    grid[0, 0].set_ylabel("Loss at the end,\nless tuned AdamW's (nats)")
    grid[1, 0].set_ylabel("Steps saved,\nof tuned AdamW's (%)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=1)
    return figure


def brief(store: Store) -> Table:
    """For the README: what the one-liners gain by the length of the run, in large batches and in
    conditions not used in development, and by chance."""
    conditions = {f"{name} of 32": found for name, found in complete("length", store)}
    for study in ("blocks", "transfer"):
        for name, found in complete(study, store):
            conditions.setdefault(name, found)
    lines = []
    for condition, contrasts in conditions.items():
        named = {contrast.name: contrast for contrast in contrasts}
        cells = []
        for name in ONE_LINERS:
            d, s = difference(named[name]), saving(named[name])
            cells += [
                "diverged" if d is None else f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})",
                f"{s.saved:+.0%} ({s.low:+.0%} to {s.high:+.0%}; by chance ±{s.by_chance:.0%})",
            ]
        lines.append([condition, f"{mean_final(contrasts[0].baseline):.3f}", *cells])
    headings = ["", "tuned AdamW ends at"]
    for name in ONE_LINERS:
        headings += [f"`{name}`: loss less AdamW's", "steps saved"]
    return headings, lines


def curves(store: Store) -> dict[str, dict[str, Curve]]:
    """Of AdamW and the one-liners in each condition of the study "blocks"."""
    found = {}
    for condition, contrasts in complete("blocks", store):
        runs = {"AdamW, tuned": contrasts[0].baseline}
        shown = [c for c in contrasts if c.name in ONE_LINERS and difference(c) is not None]
        runs |= {c.name: c.contender for c in shown}
        found[condition] = {
            name: mean_curve(same[0].curve["step"], [run.curve["loss"] for run in same])
            for name, same in runs.items()
        }
    return found
