"""The tables of the studies in `benchmarks.studies`, and the curves of the README's picture, from
what is stored so far."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

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
)
from benchmarks.store import Store, settled
from benchmarks.studies import STUDIES, Contrast

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
    """The conditions of a study all of whose runs are there."""
    for name, condition in STUDIES[study].items():
        if (contrasts := settled(condition, store)) is not None:
            yield name, contrasts


def difference(contrast: Contrast) -> Estimate | None:
    """Of the losses at the end, paired by seed; None if a run diverged."""
    pairs = zip(contrast.contender, contrast.baseline, strict=True)
    found = [ours.final - theirs.final for ours, theirs in pairs]
    return estimate(found) if np.isfinite(found).all() else None


def saving(contrast: Contrast) -> Saving:
    steps = contrast.baseline[0].curve["step"]
    ours, theirs = (
        np.array([run.curve["loss"] for run in runs])
        for runs in (contrast.contender, contrast.baseline)
    )

    def saved(ours, theirs):
        return signed_saving(steps, ours, theirs)

    chance = float(np.quantile(np.abs(exchanged(saved, ours, theirs)), 0.95))
    return Saving(saved(ours, theirs), *bootstrap(saved, ours, theirs), chance)


def table(study: str, store: Store) -> tuple[Sequence[str], list[list[str]]]:
    """The headings, and a line for each contender, the baseline first, in each condition."""
    lines = []
    for condition, contrasts in complete(study, store):
        baseline = contrasts[0].baseline
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


def run_cells(runs: Sequence[Result]) -> list[str]:
    member = runs[0].member
    return [f"{member.learning_rate:.2g}, warmup {member.warmup:.0%}", f"{mean_final(runs):.4f}"]


def tuning(store: Store) -> tuple[Sequence[str], list[list[str]]]:
    """What was tried to tune AdamW, the best first, in each workload and length."""
    groups: dict[tuple[int, int], dict[tuple[float, float], list[float]]] = {}
    for result in store:
        member = result.member
        if member.optimizer == "adamw" and member.seed < 2000 and not member.knobs:
            cell = groups.setdefault((member.steps, member.workload.batch_size), {})
            cell.setdefault((member.learning_rate, member.warmup), []).append(result.final)
    lines = []
    for (steps, batch), cell in sorted(groups.items()):
        ordered = sorted(cell.items(), key=lambda item: np.mean(item[1]))
        for (rate, warmup), finals in ordered:
            first = f"{steps:,} steps of {batch}" if finals is ordered[0][1] else ""
            losses = ", ".join(f"{final:.4f}" for final in finals)
            lines.append([first, f"{rate:.2g}", f"{warmup:.0%}", losses])
    return ("", "learning rate", "warmup", "loss at the end, a number for each seed"), lines


def prediction(store: Store) -> str:
    """Of the gain of each form that is not tuned in a condition that nobody has tried."""
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
    return "\n".join(told or ["Fewer than three conditions are complete."]) + "\n"


ONE_LINERS = ("annealed_adamw", "anytime_adamw")


def brief(store: Store) -> tuple[Sequence[str], list[list[str]]]:
    """For the README: what the one-liners gain where people copy them, and by chance."""
    lines = []
    for condition, contrasts in complete("blocks", store):
        named = {contrast.name: contrast for contrast in contrasts}
        cells = []
        for name in ONE_LINERS:
            d, s = difference(named[name]), saving(named[name])
            cells += [
                "diverged" if d is None else f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})",
                f"{s.saved:+.0%} (by chance within {s.by_chance:.0%})",
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
        runs |= {c.name: c.contender for c in contrasts if c.name in ONE_LINERS}
        found[condition] = {
            name: mean_curve(same[0].curve["step"], [run.curve["loss"] for run in same])
            for name, same in runs.items()
        }
    return found
