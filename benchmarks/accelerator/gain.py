"""What GPA gains by the length of the run and the size of the model: many members at once.

AdamW with a line to 0, the two forms that the README offers, and Schedule-Free, each at equally
many learning rates and on the same seeds, and AdamW also with a warmup of half the run: one group
of members per contender, trained at once. The first seed is for tuning, and so is the fifth if
there are that many; the others are shown. Members are stored one by one in members.jsonl, and
those that are stored are not trained again.

The speed of the device is measured on what was trained so far. Only groups that will end in the
time that is left are started, with as many seeds as fit.
"""

import concurrent.futures
import functools
import itertools
import math
import time
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ensemble, statistics, workloads
from benchmarks.accelerator.plan import PEAKS, Conditions, LeftOut, Peaks, Work, backward
from benchmarks.accelerator.results import Bar
from benchmarks.ensemble import Member, Result, mean_final
from benchmarks.members import MEMBERS
from benchmarks.store import Store
from benchmarks.studies import FRESH, TUNING
from benchmarks.updates import entries, shapes
from benchmarks.workloads import Data, Workload
from examples.llama.model import LlamaConfig

SHARE = 230  # of the time of all parts
MEMORY = 0.9  # of the GPU's, for JAX


class Contender(NamedTuple):
    """One group of members: an optimizer with a warmup, at several learning rates."""

    optimizer: str
    factor: int = 2
    """Its learning rates, in units of those of AdamW: the rule is twice AdamW's."""
    warmup: float = 0.2


USUAL = Contender("adamw", 1)
# In short runs and in large batches AdamW's best warmup was as long as that.
LONGER = USUAL._replace(warmup=0.5)
FORMS = [Contender(name) for name in ("annealed", "anytime", "schedule-free-adamw")]
SEEDS = (TUNING[0], *FRESH[:3], TUNING[1], *FRESH[3:6])
COMPILERS = 8
FILE = "members.jsonl"
MEMBER = "a member, trained with as many as fit"
# Of the corpus, for training and held out: to compile for a machine that is not here.
TOKENS = (77_064_062, 7_533_237)
GOALS = {
    "0.125M, 1,000 steps": 0.20, "0.125M, 4,000 steps": 0.15, "0.125M, 8,000 steps": 0.10,
}  # fmt: skip


class Size(NamedTuple):
    """A model, and what it is trained for."""

    workload: Workload
    rates: tuple[float, ...]
    """Learning rates of AdamW."""
    steps: tuple[int, ...]
    seeds: tuple[int, ...] = (8, 4, 2)
    """How many seeds: the first of these numbers that fits in the time."""
    at_once: int = 32
    """Members that fit into the memory of an H100."""


def llama(dim: int, layers: int, heads: int, hidden: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(512, dim, layers, heads, heads, hidden, **more)


SIZES = {
    "0.125M": Size(Workload(), (4e-3, 8e-3, 1.6e-2, 3.2e-2), (1000, 2000, 4000, 8000, 16_000)),
    # 20 tokens a parameter.
    "1M": Size(
        Workload(llama(128, 5, 4, 352), batch_size=64), (2e-3, 4e-3, 8e-3, 1.6e-2), (5000,)
    ),
    # 34M tokens.
    "16M": Size(
        Workload(llama(384, 9, 6, 1024, dtype="bfloat16"), length=256, batch_size=64),
        (1e-3, 2e-3, 4e-3), (2100,), (2, 1), at_once=3,
    ),
    "30M": Size(
        Workload(llama(512, 9, 8, 1408, dtype="bfloat16"), length=256, batch_size=64),
        (1e-3, 2e-3, 4e-3), (2100,), (2, 1), at_once=3,
    ),
}  # fmt: skip
REHEARSAL = {
    "4k": Size(
        Workload(LlamaConfig(257, 16, 1, 2, 1, 32), length=16, batch_size=4),
        (1e-2, 2e-2), (50,), (4, 2),
    ),
}  # fmt: skip


def measurements(quick: bool) -> list[str]:
    """Size of the model, and steps."""
    sizes = REHEARSAL if quick else SIZES
    return [f"{name}, {steps:,} steps" for name, size in sizes.items() for steps in size.steps]


def parsed(measurement: str) -> tuple[Size, int]:
    name, _, rest = measurement.partition(", ")
    return {**SIZES, **REHEARSAL}[name], int(rest.split()[0].replace(",", ""))


def contenders(measurement: str) -> list[Contender]:
    """All, and three in a rehearsal."""
    return [USUAL, LONGER, *FORMS][: 3 if measurement in measurements(quick=True) else None]


def members(measurement: str, one: Contender, seeds: Sequence[int] = SEEDS) -> list[Member]:
    """All of a contender, seed by seed."""
    size, steps = parsed(measurement)
    return [
        Member(one.optimizer, steps, seed, one.factor * rate, one.warmup, workload=size.workload)
        for seed, rate in itertools.product(seeds, size.rates)
    ]


def step(workload: Workload) -> Work:
    """The work of one step of one member, with AdamW and GPA."""
    params = entries(shapes(workload.model))
    passes = backward(workload.model, workload.batch_size, workload.length, params)
    return passes.more(params * 4 * (9 + 1))


def expected(measurement: str, peaks: Peaks | None) -> dict[str, dict[str, Any]]:
    """The work of one member, on paper."""
    size, steps = parsed(measurement)
    one = step(size.workload)
    work = one._replace(bytes=steps * one.bytes, operations=steps * one.operations)
    row = {"bytes": work.bytes, "operations": work.operations, "seconds": work.seconds(peaks)}
    return {MEMBER: row}


def programs(measurement: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The jitted functions of the first group of each optimizer, and their arguments' shapes.
    A longer warmup is another number in them."""
    found = {}
    for group in groups(measurement, parsed(measurement)[0].seeds[0]):
        for name, program in programs_of(group, *TOKENS).items():
            found.setdefault(f"{group[0].optimizer}, {name}", program)
    return found


def programs_of(
    group: Sequence[Member], train: int, held_out: int
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The programs of a group, for these numbers of training and held-out tokens."""
    like, count = ensemble.structure(group[0]), len(group)
    batch, length = like.workload.batch_size, like.workload.length
    initial, advance, evaluate = ensemble.program(like, count > 1, False)
    axes = (count,) if count > 1 else ()

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    numbers = {n: array(jnp.float32, *axes) for n in ensemble.TRACED if n in like.settings}
    seeds = array(jnp.uint32, *axes)
    state = jax.eval_shape(initial, seeds, numbers, None)
    unit = math.gcd(*ensemble.evaluations(like.steps))
    starts, text = array(jnp.int32, *axes, unit, batch), array(jnp.uint16, train)
    part = workloads.PART
    parts = array(jnp.int32, workloads.ON_THE_WAY // part, part, length + 1)
    last = min(workloads.HELD_OUT // part, (held_out - 1) // length // part)
    last_parts = array(jnp.int32, last, part, length + 1)
    return {
        "initial": (initial, (seeds, numbers, None)),
        "advance": (advance, (state, numbers, starts, text)),
        "evaluate": (evaluate, (state, numbers, parts)),
        "evaluate at the end": (evaluate, (state, numbers, last_parts)),
    }


def groups(measurement: str, seeds: int, made: Container[Member] = ()) -> list[list[Member]]:
    """The groups that are trained at once, without members that were made; some seeds with all
    contenders before the next seeds, so that seeds are complete early."""
    size, _ = parsed(measurement)
    at_once = max(1, size.at_once // len(size.rates))
    found = []
    for start in range(0, seeds, at_once):
        some = SEEDS[start : min(start + at_once, seeds)]
        for one in contenders(measurement):
            group = members(measurement, one, some)
            found.append([member for member in group if member not in made])
    return [group for group in found if group]


def measure(measurement: str, under: Conditions) -> dict[str, Any]:
    here = training(under.folder, under.corpus, under.quick)
    plan = here.plan(measurement, under.deadline - time.time(), under.peaks)
    if plan:
        here.compile_ahead(plan)
        following = measurements(under.quick)
        following = following[following.index(measurement) + 1 :]
        left = under.deadline - time.time() - sum(here.seconds(g, under.peaks) for g in plan)
        here.compile_ahead(here.plan(following[0], left, under.peaks) if following else [])
    elif missing := here.missing(measurement):
        first = missing[0]
        takes, left = here.seconds(first, under.peaks), max(0.0, under.deadline - time.time())
        raise LeftOut(f"its first {len(first)} members take {takes:.0f} s, {left:.0f} s are left")
    seconds = count = 0.0
    for group in plan:
        if time.time() + here.seconds(group, under.peaks) > under.deadline:
            break
        took = here.train(group, under.peaks)
        seconds, count = seconds + took, count + len(group)
        best = min(here.made[member].final for member in group)
        what = f"{group[0].optimizer}, warmup {group[0].warmup:.0%}: {len(group)} members"
        under.say(f"{what} in {took:.1f} s, the best ends at {best:.4f}")
    every = [m for one in contenders(measurement) for m in members(measurement, one)]
    predicted = expected(measurement, under.peaks)[MEMBER]["seconds"]
    row = {"seconds": seconds / count, "predicted_seconds": predicted} if count else None
    return {
        "members": sum(member in here.made for member in every),
        "partial": bool(here.missing(measurement)),
        "gains": {MEMBER: row} if row else {},
        "contrasts": contrasts(measurement, here.made),
    }


@functools.lru_cache(maxsize=1)
def training(folder: Path, text: Path, quick: bool) -> "Training":
    return Training(Store(folder / FILE, kind=MEMBERS), rehearsal() if quick else read(text))


def read(folder: Path) -> Data:
    try:
        return Workload().load(folder)
    except FileNotFoundError as error:
        raise LeftOut(str(error)) from None


def rehearsal() -> Data:
    """The bytes of this folder's source."""
    text = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))
    train, held_out = np.split(np.frombuffer(text, np.uint8).astype(np.uint16), [len(text) // 2])
    return Data(train, held_out)


class Training:
    """What was trained so far, how fast, and what is compiled for what comes next."""

    def __init__(self, made: Store, data: Data):
        self.made, self.data = made, data
        self.pool = concurrent.futures.ThreadPoolExecutor(COMPILERS)
        self.compiled: dict[tuple[Member, int], list[concurrent.futures.Future]] = {}
        self.slowdown: dict[Workload, float] = {}

    def missing(self, measurement: str) -> list[list[Member]]:
        return groups(measurement, parsed(measurement)[0].seeds[0], self.made)

    def seconds(self, group: Sequence[Member], peaks: Peaks | None) -> float:
        """How long a group will take: as on paper, times how much longer earlier groups took."""
        workload, paper = group[0].workload, on_paper(group, peaks)
        known = self.slowdown.get(workload, max(self.slowdown.values(), default=2.0))
        return 1.1 * known * paper

    def plan(self, measurement: str, left: float, peaks: Peaks | None) -> list[list[Member]]:
        """The groups with as many seeds as there is time for; if there is too little for the fewest
        seeds, those groups of them that fit."""
        size, _ = parsed(measurement)
        choices = [groups(measurement, seeds, self.made) for seeds in size.seeds]
        choices = [found for found in choices if found]
        for found in choices:
            if sum(self.seconds(group, peaks) for group in found) <= left:
                return found
        fewest = choices[-1] if choices else []
        takes = itertools.accumulate(self.seconds(group, peaks) for group in fewest)
        return fewest[: sum(total <= left for total in takes)]

    def compile_ahead(self, some: Sequence[Sequence[Member]]) -> None:
        """Starts to compile the programs of these groups, in the background."""
        for group in some:
            key = ensemble.structure(group[0]), len(group)
            if key not in self.compiled:
                self.compiled[key] = [
                    self.pool.submit(compile_program, *program)
                    for program in programs_of(group, *map(len, self.data[:2])).values()
                ]

    def train(self, group: Sequence[Member], peaks: Peaks | None) -> float:
        """Trains a group and stores its members; returns how long it took, compiled."""
        for program in self.compiled[ensemble.structure(group[0]), len(group)]:
            program.result()
        start = time.perf_counter()
        results = ensemble.train_group(group, self.data, at_y=False)
        seconds = time.perf_counter() - start
        self.made.add(results)
        self.slowdown[group[0].workload] = seconds / on_paper(group, peaks)
        return seconds


def compile_program(jitted: Any, arguments: tuple[Any, ...]) -> None:
    """Compiles a program; JAX keeps it, and uses it when `jitted` is called."""
    jitted.lower(*arguments).compile()


def on_paper(group: Sequence[Member], peaks: Peaks | None) -> float:
    """Seconds that a group takes on paper; for an unknown device, those on an H100."""
    seconds = step(group[0].workload).seconds(peaks or PEAKS["H100"])
    assert seconds is not None
    return len(group) * group[0].steps * seconds


def contrasts(measurement: str, made: Store | Mapping[Member, Result]) -> dict[str, dict[str, Any]]:
    """Each form beside AdamW on the seeds that were not used for tuning, at its own best learning
    rate and at twice the one that is AdamW's best with the usual warmup. AdamW has the better of
    its two warmups."""
    size, _ = parsed(measurement)
    seeds = [
        seed
        for seed in SEEDS
        if all(
            member in made
            for one in contenders(measurement)
            for member in members(measurement, one, [seed])
        )
    ]
    if not seeds:
        return {}
    tuning = [seed for seed in seeds if seed in TUNING]
    shown = [seed for seed in seeds if seed not in TUNING] or seeds

    def runs(one: Contender, rate: float, seeds: Sequence[int]) -> list[Result]:
        every = members(measurement, one, seeds)
        return [made[m] for m in every if math.isclose(m.learning_rate, rate)]

    def best(*some: Contender) -> tuple[Contender, float]:
        settings = [(one, one.factor * rate) for one in some for rate in size.rates]
        return min(settings, key=lambda setting: mean_final(runs(*setting, tuning)))

    _, usual_rate = best(USUAL)
    adamw, rate = best(USUAL, LONGER)
    baseline = runs(adamw, rate, shown)
    found = {
        USUAL.optimizer: {
            "learning_rate": rate,
            "warmup": adamw.warmup,
            "final": mean_final(baseline),
            "seeds": len(shown),
        }
    }
    for form in [one for one in contenders(measurement) if one in FORMS]:
        _, own = best(form)
        found[form.optimizer] = {
            "learning_rate": own,
            "warmup": form.warmup,
            **contrast(runs(form, own, shown), baseline),
            "by_rule": {
                "learning_rate": 2 * usual_rate,
                **contrast(runs(form, 2 * usual_rate, shown), baseline),
            },
        }
    return found


def contrast(contender: list[Result], baseline: list[Result]) -> dict[str, Any]:
    """The loss at the end beside the baseline's, seed by seed, and the signed saving."""
    pairs = zip(contender, baseline, strict=True)
    differences = [one.final - other.final for one, other in pairs]
    found: dict[str, Any] = {"final": mean_final(contender), "difference": np.mean(differences)}
    if not np.isfinite(differences).all():
        return {"final": math.inf, "difference": math.inf}
    steps = baseline[0].curve["step"]
    curves = [np.array([run.curve["loss"] for run in some]) for some in (contender, baseline)]
    saving = functools.partial(statistics.signed_saving, steps)
    found["saving"] = saving(*curves)
    if len(differences) > 1:
        estimate = statistics.estimate(differences)
        found |= {"interval": [estimate.low, estimate.high], "p": estimate.p}
        found["saving_interval"] = statistics.bootstrap(saving, *curves)
    return found


def bars(found: dict[str, Any]) -> list[Bar]:
    """The savings that were set as goals, for the form that the README shows first."""
    judged = []
    for measurement, goal in GOALS.items():
        contrast = found.get(measurement, {}).get("contrasts", {}).get("annealed", {})
        if "saving" in contrast.get("by_rule", {}):
            what = f"saving of annealed_adamw at twice AdamW's rate, {measurement}"
            judged.append(Bar(what, goal, contrast["by_rule"]["saving"], at_most=False))
    return judged


def told(result: dict[str, Any]) -> str:
    """The lines of progress of a measurement."""
    lines = [f"{result['members']} members{', not all' if result['partial'] else ''}"]
    for name, row in result["contrasts"].items():
        line = f"{name}: {row['final']:.4f} at a learning rate of {row['learning_rate']:.3g}"
        line += f" and a warmup of {row['warmup']:.0%}"
        if "saving" in row:
            line += f", {row['difference']:+.4f}, saves {row['saving']:.1%}"
        lines.append(line)
    return "\n".join(lines)
