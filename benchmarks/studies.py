"""The studies of what GPA brings: which runs they need, and what is compared.

benchmarks/PROTOCOL.md says what each is for and how it is judged. A study has conditions, and a
condition is a plain function of the stored runs. It returns its contrasts; where it needs a run
that is not stored it raises `Missing`, with all runs that it could use by now. So the tuning and
what depends on it stand in one function, in their order.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ensemble import Member, Result, mean_final
from benchmarks.store import Missing, Store, results_of, together
from benchmarks.workloads import ImageWorkload, Workload
from examples.llama.model import LlamaConfig

TUNING = (1000, 1001)
FRESH = tuple(range(2000, 2024))
CONFIRMING = tuple(range(2100, 2124))
WARMUPS = (0.05, 0.2)
LONGER_WARMUPS = (*WARMUPS, 0.3, 0.5)  # for AdamW, where the longest of these is the best


class Run(NamedTuple):
    """What is trained, and for how long."""

    steps: int
    workload: Workload | ImageWorkload = Workload()

    def member(self, optimizer: str, learning_rate: float, seed: int, **more: Any) -> Member:
        knobs = more.pop("knobs", {})
        return Member(
            optimizer,
            self.steps,
            seed,
            float(f"{learning_rate:.3g}"),  # one rate, even if reached in two ways
            workload=self.workload,
            knobs=knobs,
            **more,
        )


class Setting(NamedTuple):
    """A contender without its seed: an optimizer and its hyperparameters in one run."""

    optimizer: str
    learning_rate: float
    warmup: float
    knobs: tuple[tuple[str, Any], ...] = ()

    def members(self, run: Run, seeds: Sequence[int]) -> list[Member]:
        how = {"warmup": self.warmup, "knobs": dict(self.knobs)}
        return [run.member(self.optimizer, self.learning_rate, seed, **how) for seed in seeds]


class Contrast(NamedTuple):
    """Runs of a contender and of its baseline with the same seeds."""

    name: str
    contender: list[Result]
    baseline: list[Result]


def tuned(
    store: Store,
    run: Run,
    optimizer: str,
    rates: Sequence[float],
    *,
    warmups: Sequence[float] = WARMUPS,
    seeds: Sequence[int] = TUNING,
    knobs: Sequence[Mapping[str, Any]] = ({},),
    refine: bool = True,
) -> Setting:
    """The setting with the lowest mean loss at the end over the tuning seeds.

    First all rates (an octave apart) with all warmups and knobs. Then rates half an octave to
    either side of the best, until both neighbours of the best are worse; without `refine`, only
    whole octaves beyond the edge of the rates.
    """
    step = math.sqrt(2) if refine else 2.0
    tried: dict[Setting, float] = {}

    def attempt(settings: Sequence[Setting]) -> None:
        runs = results_of(store, [m for setting in settings for m in setting.members(run, seeds)])
        losses = np.reshape([one.final for one in runs], (len(settings), len(seeds))).mean(1)
        tried.update(zip(settings, losses, strict=True))

    grid = itertools.product(rates, warmups, [tuple(sorted(some.items())) for some in knobs])
    attempt([Setting(optimizer, *point) for point in grid])
    for _ in range(6):
        best = min(tried, key=tried.__getitem__)
        rate = best.learning_rate
        sides = [float(f"{rate * factor:.3g}") for factor in (1 / step, step)]
        there = [s.learning_rate for s in tried if s._replace(learning_rate=rate) == best]
        new = [
            side for side in sides if not any(math.isclose(side, r, rel_tol=0.02) for r in there)
        ]
        if not refine:  # the grid's own rates are the neighbours, except at its edges
            new = [side for side in new if not min(there) < side < max(there)]
        if not new:
            break
        attempt([best._replace(learning_rate=side) for side in new])
    return min(tried, key=tried.__getitem__)


Form = tuple[str, Mapping[str, Any]]
"""An optimizer and what differs from its defaults."""


def tuned_forms(
    store: Store, run: Run, forms: Mapping[str, Form], rates: Sequence[float], **how: Any
) -> dict[str, Setting]:
    """Each form at its best rate and warmup, on the first tuning seed unless `how` gives others."""
    how = {"seeds": TUNING[:1], "refine": False, **how}
    return together(
        {
            name: lambda form=form: tuned(store, run, form[0], rates, knobs=[form[1]], **how)
            for name, form in forms.items()
        }
    )


OCTAVES = (4e-3, 8e-3, 1.6e-2)


def adamw(store: Store, run: Run, rates: Sequence[float], warmups: Sequence[float]) -> Setting:
    """AdamW with a line to 0, which was its best of four schedules in the study before this one.

    The rates to begin with are those for batches of 32 windows of text.
    """
    factor = math.sqrt(run.workload.batch_size / 32)
    rates = [float(f"{rate * factor:.3g}") for rate in rates] if factor != 1 else rates
    return tuned(store, run, "adamw", rates, warmups=warmups, refine=run.steps <= 2000)


def usual_adamw(store: Store, run: Run, rates: Sequence[float] = OCTAVES) -> Setting:
    """With a usual warmup: what a reader has, and what the rule starts from."""
    return adamw(store, run, rates, WARMUPS)


def tuned_adamw(store: Store, run: Run, rates: Sequence[float] = OCTAVES) -> Setting:
    """The baseline: AdamW with longer warmups as well, where the longest usual one is the best."""
    usual = usual_adamw(store, run, rates)
    if usual.warmup < max(WARMUPS):
        return usual
    return adamw(store, run, rates, LONGER_WARMUPS)


# What a reader copies, from AdamW's usual learning rate and warmup.
def annealed(base: Setting) -> Setting:
    return Setting("annealed", 2 * base.learning_rate, 0.2)


def anytime(base: Setting) -> Setting:
    return Setting("anytime", 2 * base.learning_rate, 0.2)


def as_typed_first(base: Setting) -> Setting:
    """gpa(optax.adamw(schedule)) with the defaults of gpa and AdamW's own good settings."""
    return base._replace(optimizer="gpa-adamw", knobs=tuple(sorted(DEFAULTS.items())))


DEFAULTS = {"b1": 0.9, "mu_y": 0.7, "average": "warmed-up", "mu_x": 0.9967}
PAPER = {**DEFAULTS, "schedule": "cosine"}
PARTIAL_EMA = {"final": 0.3, "window": 0.1}

# The one-liners, by the rule and where they have a search of their own.
ONE_LINERS = {"annealed_adamw": annealed, "anytime_adamw": anytime}
ONE_LINER_FORMS: dict[str, Form] = {
    "annealed_adamw": ("annealed", {}),
    "anytime_adamw": ("anytime", {}),
}
# Blocks: every form that the pages offer to copy, on the runs that it is meant for; and AdamW with
# a usual warmup, where the baseline has a longer one.
BLOCKS = {**ONE_LINERS, "gpa(optax.adamw)": as_typed_first}
USUAL = {"adamw, usual warmup": lambda base: base}
BLOCK_RUNS = {
    "1,000 steps of 32": (Run(1000), BLOCKS | USUAL),
    "400 steps of 256": (Run(400, Workload(batch_size=256)), ONE_LINERS | USUAL),
    "4,000 steps of 32": (Run(4000), BLOCKS),
}


def annealed_with_its_warmup(base: Setting) -> Setting:
    return annealed(base)._replace(warmup=base.warmup)


# A fifth of a long run is a long warmup: AdamW's usual one may do there.
UNTUNED = {**ONE_LINERS, "annealed_adamw, AdamW's usual warmup": annealed_with_its_warmup}


def against_tuned_adamw(
    run: Run,
    forms: Mapping[str, Callable[[Setting], Setting]],
    store: Store,
    seeds: int = 8,
    rates: Sequence[float] = OCTAVES,
) -> list[Contrast]:
    """Forms that are derived from AdamW's setting and have no search of their own."""
    base = usual_adamw(store, run, rates)
    settings = [tuned_adamw(store, run, rates), *(form(base) for form in forms.values())]
    return contrasts(forms, found_all(store, run, settings, FRESH[:seeds]))


def found_all(
    store: Store, run: Run, settings: Sequence[Setting], seeds: Sequence[int]
) -> list[list[Result]]:
    """The runs of each setting. They are made seed by seed, so that early ones are comparable."""
    members = [[setting.members(run, [seed])[0] for setting in settings] for seed in seeds]
    runs = results_of(store, [member for same in members for member in same])
    return [runs[i :: len(settings)] for i in range(len(settings))]


def contrasts(names: Iterable[str], runs: Sequence[list[Result]]) -> list[Contrast]:
    """The contrast of each contender with the baseline, which is the first of `runs`."""
    baseline, *others = runs
    return [Contrast(name, one, baseline) for name, one in zip(names, others, strict=True)]


# The map: where the paper's constants, the two one-liners or AdamW are best, by batch and length.
MAP = [
    *((16, steps) for steps in (300, 1000, 3000, 8000)),
    *((64, steps) for steps in (300, 1000, 2000)),
    *((256, steps) for steps in (100, 300, 600)),
]


def cell_of_the_map(batch: int, steps: int, store: Store) -> list[Contrast]:
    """AdamW and the paper's constants with rates of their own, the one-liners by the rule."""
    run = Run(steps, Workload(batch_size=batch))
    warmups = (0.2,) if batch < 128 else (0.2, 0.5)
    rates = octaves(8e-3 * math.sqrt(batch / 32))
    adamws: dict[str, Form] = {"adamw": ("adamw", {})}
    paper: dict[str, Form] = {"paper": ("gpa-adamw", PAPER)}
    usual = tuned_forms(store, run, adamws, rates, warmups=(0.2,))["adamw"]
    own = tuned_forms(store, run, adamws | paper, rates, warmups=warmups)
    forms = {name: form(usual) for name, form in ONE_LINERS.items()} | {"paper": own["paper"]}
    return contrasts(forms, found_all(store, run, [own["adamw"], *forms.values()], FRESH[:3]))


def octaves(centre: float) -> list[float]:
    return [float(f"{centre * factor:.3g}") for factor in (0.5, 1, 2)]


# Tuned: what the one-liners bring when they are tuned as AdamW is, where the rule did not win.
def tuned_one_liners(run: Run, store: Store, rates: Sequence[float] = OCTAVES) -> list[Contrast]:
    usual, base = usual_adamw(store, run, rates), tuned_adamw(store, run, rates)
    settings = tuned_forms(store, run, ONE_LINER_FORMS, octaves(usual.learning_rate))
    every = [base, *settings.values()]
    return contrasts(settings, found_all(store, run, every, FRESH[:8]))


# Length: fresh data, one size of model, 1,000 to 8,000 steps, and how many seeds of each.
LENGTHS = {1000: 8, 2000: 8, 4000: 8, 8000: 4}
# These have a search of their own, where the one-liners have none.
RIVALS: dict[str, Form] = {
    "paper": ("gpa-adamw", PAPER),
    "Schedule-Free": ("schedule-free-adamw", {}),
    "EMA, decay to 30 %": ("ema-adamw", PARTIAL_EMA),
}


def rivals_over_length(steps: int, store: Store) -> list[Contrast]:
    run = Run(steps)
    settings = tuned_forms(store, run, RIVALS, doubled(usual_adamw(store, run)))
    every, seeds = [tuned_adamw(store, run), *settings.values()], FRESH[: LENGTHS[steps]]
    return contrasts(settings, found_all(store, run, every, seeds))


def doubled(base: Setting) -> tuple[float, float]:
    return base.learning_rate, 2 * base.learning_rate


# Without tuning: the rule against tuned AdamW in conditions other than those it was found in.
SMALL = Workload().model
FINE_TUNING = "fine-tuning on docstrings"
CONDITIONS = {
    "batches of 8": Run(1000, Workload(batch_size=8)),
    FINE_TUNING: Run(300, Workload(text="docstrings", pretrained=True)),
    "a ViT, ten epochs": Run(1600, ImageWorkload("vit")),
    "a ConvNet with BatchNorm, ten epochs": Run(1600, ImageWorkload("convnet")),
    "docstrings": Run(1000, Workload(text="docstrings")),
    "vocabulary of 4,096": Run(1000, Workload(dataclasses.replace(SMALL, vocab_size=4096))),
    "eight layers": Run(500, Workload(dataclasses.replace(SMALL, layers=8, unroll=8))),
    "batches of 128": Run(500, Workload(batch_size=128)),
}
# Where the search for AdamW's learning rate starts elsewhere.
FIRST_RATES = {FINE_TUNING: (1e-3, 2e-3, 4e-3)}


LATE = {"schedule": "constant", "average": "lr-weighted", "step_power": 2.0, "start": 0.2}
# Does one form beat its rivals? Sixteen settings, listed before any of them was run.
SCREEN: dict[str, Form] = {
    **{
        f"decay to 30 %, {name}": ("gpa-adamw", {"final": 0.3, **average})
        for name, average in {
            "lr_weighted": {"average": "lr-weighted"},
            "polynomial(2)": {"average": "polynomial", "power": 2.0},
            "polynomial(8)": {"average": "polynomial", "power": 8.0},
            "annealed window of 5 %": {"window": 0.05},
            "annealed window of 10 %": {"window": 0.1},
        }.items()
    },
    **{
        f"decay to 10 %, {name}": ("gpa-adamw", {"final": 0.1, **average})
        for name, average in {
            "lr_weighted": {"average": "lr-weighted"},
            "polynomial(8)": {"average": "polynomial", "power": 8.0},
        }.items()
    },
    "lr_weighted, cooldown of 10 %": (
        "gpa-adamw", {"schedule": "wsd", "decay": 0.1, "average": "lr-weighted"},
    ),
    "annealed, cooldown of 20 %": ("gpa-adamw", {"schedule": "wsd", "decay": 0.2}),
    "constant, polynomial(8)": (
        "gpa-adamw", {"schedule": "constant", "average": "polynomial", "power": 8.0},
    ),
    "annealed, mu_y 0.8": ("gpa-adamw", {"mu_y": 0.8}),
    "annealed, mu_y 0.95": ("gpa-adamw", {"mu_y": 0.95}),
    "anytime, mu_y 0.96": ("anytime", {"mu_y": 0.96}),
    "constant, lr_weighted after the warmup, (t + 1)^2": ("gpa-adamw", LATE),
    "ScheduleFree+'s average": (
        "gpa-adamw", {**LATE, "b1": 0.9, "mu_y_schedule": "schedule-free-plus"},
    ),
    "AMUSE's mu_y": (
        "gpa-adamw",
        {
            "schedule": "constant", "average": "lr-weighted",
            "mu_y": 0.6, "mu_y_schedule": "amuse",
        },
    ),
}  # fmt: skip


def screened(steps: int, seeds: Sequence[int], store: Store) -> list[Contrast]:
    """Each at twice AdamW's rate, with a fifth of the run as warmup, against the annealed form."""
    run = Run(steps)
    base = usual_adamw(store, run)
    settings = screen_settings(base)
    runs = found_all(store, run, [annealed(base), *settings.values()], seeds)
    return contrasts(settings, runs)


def screen_settings(base: Setting) -> dict[str, Setting]:
    return {
        name: Setting(optimizer, 2 * base.learning_rate, 0.2, tuple(sorted(knobs.items())))
        for name, (optimizer, knobs) in SCREEN.items()
    }


SCREENS = {
    "1,000 steps": functools.partial(screened, 1000, FRESH[:4]),
    "4,000 steps": functools.partial(screened, 4000, FRESH[:2]),
}


def confirmed(store: Store) -> list[Contrast]:
    """The three that ended lowest beside the annealed form, in the mean of both lengths, and
    Schedule-Free, in runs of a length between, on seeds that were not used for anything before."""
    run = Run(2000)
    screens = together(
        {name: functools.partial(condition, store) for name, condition in SCREENS.items()}
    )
    behind = np.mean(
        [
            [mean_final(one.contender) - mean_final(one.baseline) for one in found]
            for found in screens.values()
        ],
        axis=0,
    )
    ends = dict(zip(SCREEN, behind, strict=True))
    base = usual_adamw(store, run)
    settings = screen_settings(base)
    named = {name: settings[name] for name in sorted(ends, key=ends.__getitem__)[:3]}
    rival = {"Schedule-Free": RIVALS["Schedule-Free"]}
    named |= tuned_forms(store, run, rival, doubled(base))
    return contrasts(named, found_all(store, run, [annealed(base), *named.values()], CONFIRMING))


# Around Muon, with momentum 0.9. The pull is that of EMA-Nesterov, evaluated at both places.
MUON: dict[str, Form] = {
    **{
        f"constant, Schedule-Free's average, mu_y {mu_y}": (
            "gpa-muon", {"schedule": "constant", "average": "lr-weighted", "mu_y": mu_y},
        )
        for mu_y in (0.5, 0.7, 0.9)
    },
    **{f"annealed, mu_y {mu_y}": ("gpa-muon", {"mu_y": mu_y}) for mu_y in (0.3, 0.5, 0.7)},
    "EMA, window of 2 %": ("ema-muon", {"window": 0.02}),
    **{f"EMA-Nesterov's pull, at {at}": ("pulled-muon", {"at": at}) for at in ("z", "x")},
}  # fmt: skip


def around_muon(store: Store) -> list[Contrast]:
    run, rates = Run(1000), (1.6e-2, 3.2e-2)
    base = tuned(store, run, "muon", rates)
    settings = tuned_forms(store, run, MUON, rates, warmups=(0.2,), seeds=TUNING)
    runs = found_all(store, run, [base, *settings.values()], FRESH)
    return contrasts(settings, runs)


# The paper's own setting, at a length where its window is a small part of the run.
def papers_setting(store: Store) -> list[Contrast]:
    run = Run(8000)
    windows = {"H = 16": 0.9934, "H = 32": 0.9967, "H = 64": 0.9984}
    forms: dict[str, Form] = {
        name: ("gpa-adamw", {**PAPER, "mu_x": mu_x}) for name, mu_x in windows.items()
    }
    rates = doubled(usual_adamw(store, run))
    settings = tuned_forms(store, run, forms, rates, warmups=(0.05,))
    every = [tuned_adamw(store, run), *settings.values()]
    return contrasts(settings, found_all(store, run, every, FRESH[:4]))


# Size: 20 tokens a parameter, as the paper trains.
SIZES = {
    "0.25M parameters": (Run(2400, Workload(LlamaConfig(
        512, dim=96, layers=2, heads=3, kv_heads=1, hidden=256, unroll=2
    ))), UNTUNED, 8),
    "1M parameters": (Run(9500, Workload(LlamaConfig(
        512, dim=128, layers=5, heads=4, kv_heads=2, hidden=344, unroll=5
    ))), {"annealed_adamw": annealed}, 3),
}  # fmt: skip


def steps_of(batch: int, steps: int) -> str:
    return f"{steps:,} steps of {batch}"


STUDIES: dict[str, dict[str, Callable[[Store], list[Contrast]]]] = {
    "blocks": {
        name: functools.partial(against_tuned_adamw, run, forms)
        for name, (run, forms) in BLOCK_RUNS.items()
    },
    "tuned": {
        "4,000 steps of 32": functools.partial(tuned_one_liners, Run(4000)),
        FINE_TUNING: functools.partial(
            tuned_one_liners, CONDITIONS[FINE_TUNING], rates=FIRST_RATES[FINE_TUNING]
        ),
    },
    "length": {
        f"{steps:,} steps": functools.partial(
            against_tuned_adamw, Run(steps), UNTUNED | USUAL, seeds=seeds
        )
        for steps, seeds in LENGTHS.items()
    },
    "map": {
        steps_of(batch, steps): functools.partial(cell_of_the_map, batch, steps)
        for batch, steps in sorted(MAP, key=math.prod)
    },
    "rivals": {
        f"{steps:,} steps": functools.partial(rivals_over_length, steps) for steps in LENGTHS
    },
    "transfer": {
        name: functools.partial(
            against_tuned_adamw, run, UNTUNED, rates=FIRST_RATES.get(name, OCTAVES)
        )
        for name, run in CONDITIONS.items()
    },
    "screen": {**SCREENS, "2,000 steps, confirmed": confirmed},
    "muon": {"1,000 steps": around_muon},
    "size": {
        f"{name}, {run.steps:,} steps": functools.partial(
            against_tuned_adamw, run, forms, seeds=seeds
        )
        for name, (run, forms, seeds) in SIZES.items()
    },
    "paper": {"8,000 steps": papers_setting},
}
"""The conditions of each study, the most important study first."""


def missing(store: Store, names: Iterable[str] = STUDIES) -> list[Member]:
    """The runs that can be made next, the most valuable first, each once."""
    members: dict[str, Member] = {}
    for name in names:
        for condition in STUDIES[name].values():
            try:
                condition(store)
            except Missing as more:
                for member in more.runs:
                    members.setdefault(member.identity, member)
    return list(members.values())
