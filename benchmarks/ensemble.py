"""Trains the members of a study: small models that differ in optimizer, hyperparameters and seed.

    data = Workload().load(folder)
    [result] = train([Member("annealed", steps=1000, seed=2000, learning_rate=1.6e-2)], data)

A member is a run: it reads the data of its workload (`benchmarks.workloads`) in an order that its
seed decides, and is evaluated at x on held-out rows, the same ones for all. Members that differ
only in numbers (`learning_rate`, `weight_decay`, the seed, and the knobs in `TRACED`) run the same
compiled program. On an accelerator they are trained at once, by `jax.vmap`; on a CPU one by one,
which is faster there.

This module imports jax, flax, optax and NumPy only, so that it runs where the trainer's
dependencies are not installed.
"""

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

import gpa_optax
from benchmarks.workloads import HELD_OUT, ON_THE_WAY, Data, ImageWorkload, Workload
from examples.optimizers import (
    Optimizer,
    base_optimizer,
    decays,
    params_themselves,
    schedule_free_eval_params,
)
from examples.settings import Base
from gpa_optax import averaging

# The knobs of each optimizer besides learning rate, warmup and weight decay, and their defaults.
BASE = {"b1": 0.9, "b2": 0.95, "schedule": "linear", "decay": 0.2, "final": 0.0}
AVERAGE = {
    "average": "annealed", "window": 0.05, "mu_x": None,
    "power": 0.0,  # of polynomial
    "step_power": 0.0, "start": 0.0,  # of lr-weighted; the start as a part of the run
}  # fmt: skip
GPA = {"base_params": "z", "mu_y_schedule": "constant"}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "annealed": {"mu_y": 0.9, "window": 0.05, "b2": 0.95},
    "anytime": {"mu_y": 0.9, "b2": 0.95},
    "adamw": BASE,
    "muon": BASE,
    "gpa-adamw": {**BASE, **AVERAGE, **GPA, "b1": 0.0, "mu_y": 0.9},
    "gpa-muon": {**BASE, **AVERAGE, **GPA, "mu_y": 0.5},
    "ema-adamw": {**BASE, **AVERAGE, "average": "warmed-up"},
    "ema-muon": {**BASE, **AVERAGE, "average": "warmed-up"},
    "pulled-muon": {**BASE, "pull": 0.006, "mu_x": 0.99, "at": "x"},
    "schedule-free-adamw": {**BASE, "b1": 0.0, "schedule": "constant", "mu_y": 0.9},
    "schedule-free-muon": {**BASE, "schedule": "constant", "mu_y": 0.9},
    "diloco-adamw": {**BASE, "sync_period": 16, "outer_learning_rate": 0.7, "outer_momentum": 0.9},
}
# Numbers in which members that run the same program may differ.
TRACED = ("learning_rate", "weight_decay", "mu_y", "final", "outer_learning_rate")


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a study."""

    optimizer: str
    """A name in OPTIMIZERS."""
    steps: int
    seed: int
    """Decides the initialization and the order of the data."""
    learning_rate: float
    warmup: float = 0.1
    """Part of the run in which the learning rate grows from 0."""
    weight_decay: float = 0.1
    knobs: tuple[tuple[str, Any], ...] = ()
    """What differs from the optimizer's defaults, in any order; also given as a mapping."""
    workload: Workload | ImageWorkload = Workload()

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}."
            )
        defaults, given = OPTIMIZERS[self.optimizer], dict(self.knobs)
        if unknown := sorted(given.keys() - defaults.keys()):
            raise ValueError(
                f"{self.optimizer} has no knob {', '.join(unknown)}: it has {', '.join(defaults)}."
            )
        changed = sorted((k, v) for k, v in given.items() if v != defaults[k])
        object.__setattr__(self, "knobs", tuple(changed))

    @property
    def settings(self) -> dict[str, Any]:
        """All hyperparameters that the optimizer is built from."""
        rates = {"learning_rate": self.learning_rate, "weight_decay": self.weight_decay}
        return {**OPTIMIZERS[self.optimizer], **dict(self.knobs), **rates}

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.steps)

    def changes(self) -> dict[str, Any]:
        """What differs from the defaults, as JSON values; `optimizer`, `steps`, `seed` and
        `learning_rate` have no defaults."""
        required = ("optimizer", "steps", "seed", "learning_rate")
        found = {name: getattr(self, name) for name in required}
        for name, default in (("warmup", Member.warmup), ("weight_decay", Member.weight_decay)):
            if getattr(self, name) != default:
                found[name] = getattr(self, name)
        nested = {"knobs": dict(self.knobs), "workload": self.workload.changes()}
        return found | {name: value for name, value in nested.items() if value}

    @property
    def identity(self) -> str:
        """Members with equal identities are the same run."""
        text = json.dumps(self.changes(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Result:
    """The outcome of a member's run."""

    member: Member
    curve: Mapping[str, list[float]]
    """Steps, and the held-out loss (nats per token, or per image) at x after them; also at y if
    requested."""
    final: float
    """The loss at the end, on more rows; infinite if the member diverged."""
    seconds: float
    """CPU time, or its share of the time of those that were trained together."""


def mean_final(runs: Sequence[Result]) -> float:
    return float(np.mean([run.final for run in runs]))


def shape(member: Member, settings: Mapping[str, Any]) -> optax.Schedule:
    """The learning rate as a part of its peak."""
    warmup, final = member.warmup_steps, settings["final"]
    rest, decay = max(1, member.steps - warmup), max(1, round(settings["decay"] * member.steps))
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(1.0, rest, final),
        "linear": lambda: optax.linear_schedule(1.0, final, rest),
        "wsd": lambda: optax.linear_schedule(1.0, final, decay, rest - decay),
        "constant": lambda: optax.constant_schedule(1.0),
    }[settings["schedule"]]()
    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup])


def optimizer_of(member: Member, settings: Mapping[str, Any]) -> Optimizer:
    """The optimizer with gradient clipping before it, and how to get the weights to evaluate.

    Of the `settings`, those in `TRACED` may be traced.
    """
    name, steps, warmup = member.optimizer, member.steps, member.warmup_steps
    rate, decay = settings["learning_rate"], settings["weight_decay"]
    own = {"mask": decays, "weight_decay": decay}
    evaluated = gpa_optax.eval_params
    if name in ("annealed", "anytime"):
        own |= {knob: settings[knob] for knob in OPTIMIZERS[name]}
        if name == "annealed":
            optimizer = gpa_optax.annealed_adamw(rate, steps, warmup, **own)
        else:
            optimizer = gpa_optax.anytime_adamw(rate, warmup, **own)
        return Optimizer(*optax.chain(optax.clip_by_global_norm(1.0), optimizer), evaluated)

    relative = shape(member, settings)

    def learning_rate(count):
        return rate * relative(count)

    around, _, base = name.rpartition("-")
    optimizer = base_optimizer(
        cast(Base, base), learning_rate, weight_decay=decay, b1=settings["b1"], b2=settings["b2"]
    )
    if around in ("gpa", "ema"):
        mu_x = average(member, relative, settings)
        mu_y = momentum(member, settings) if around == "gpa" else 0.0
        at = settings.get("base_params", "z")
        optimizer = gpa_optax.gpa(optimizer, mu_x, mu_y, base_params=at)
    elif around == "schedule-free":
        optimizer = contrib.schedule_free(optimizer, learning_rate, b1=settings["mu_y"])
        evaluated = schedule_free_eval_params
    elif around == "pulled":
        optimizer = pulled(
            optimizer, lambda count: settings["pull"] * relative(count), settings["mu_x"]
        )
        evaluated = pulled_average if settings["at"] == "x" else params_themselves
    elif around == "diloco":
        outer = settings["outer_learning_rate"], settings["outer_momentum"]
        optimizer = gpa_optax.single_worker_diloco(optimizer, settings["sync_period"], *outer)
    else:
        evaluated = params_themselves
    return Optimizer(*optax.chain(optax.clip_by_global_norm(1.0), optimizer), evaluated)


class PulledState(NamedTuple):
    count: jax.Array
    x: optax.Params
    base: optax.OptState


def pulled(
    base: optax.GradientTransformation, pull: optax.Schedule, mu_x: float
) -> optax.GradientTransformation:
    """An EMA from which its params are pushed away, as in EMA-Nesterov.

    z' = z + base_update + pull (z - x), x' = mu_x x + (1 - mu_x) z'; the params are z.
    """

    def init(params):
        return PulledState(jnp.zeros((), jnp.int32), params, base.init(params))

    def update(updates, state, params):
        updates, base_state = base.update(updates, state.base, params)
        by = pull(state.count)
        updates = jax.tree.map(lambda u, z, x: u + by * (z - x), updates, params, state.x)
        new = optax.apply_updates(params, updates)
        x = jax.tree.map(lambda x, z: x + (1 - mu_x) * (z - x), state.x, new)
        return updates, PulledState(state.count + 1, x, base_state)

    return optax.GradientTransformation(init, update)


def pulled_average(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    [state] = [one for one in jax.tree.leaves(opt_state, is_leaf=is_pulled) if is_pulled(one)]
    return state.x


def is_pulled(state: Any) -> bool:
    return isinstance(state, PulledState)


def average(
    member: Member, relative: optax.Schedule, settings: Mapping[str, Any]
) -> float | averaging.AveragingSchedule:
    """mu_x. Of the learning rate only the shape matters to it."""
    mu_x = settings["mu_x"]
    if mu_x is None:
        mu_x = averaging.from_horizon(max(1.0, settings["window"] * member.steps))
    return {
        "annealed": lambda: averaging.annealed(mu_x, relative, 1.0),
        "warmed-up": lambda: averaging.warmed_up(mu_x),
        "constant": lambda: mu_x,
        "polynomial": lambda: averaging.polynomial(settings["power"]),
        "lr-weighted": lambda: averaging.lr_weighted(
            relative,
            member.warmup_steps,
            step_power=settings["step_power"],
            start=round(settings["start"] * member.steps),
        ),
    }[settings["average"]]()


def momentum(member: Member, settings: Mapping[str, Any]) -> optax.ScalarOrSchedule:
    """mu_y: it grows from the setting `mu_y` as in docs/averages.md, or stays there."""
    mu_y = settings["mu_y"]

    def amuse(count):  # from the end of the warmup on, with a rho of 0.8
        warmup = max(2, member.warmup_steps)
        return 1 - (1 - mu_y) * ((warmup - 1) / jnp.maximum(count, warmup - 1)) ** 0.8

    def schedule_free_plus(count):  # to 0.965 in the first half of the run
        progress = jnp.minimum(1, count / (member.steps / 2))
        return 1 - (1 - mu_y) ** (1 - progress) * (1 - 0.965) ** progress

    schedules = {"constant": mu_y, "amuse": amuse, "schedule-free-plus": schedule_free_plus}
    return schedules[settings["mu_y_schedule"]]


class Program(NamedTuple):
    """The jitted functions of a member, or of members that are trained together, whose arguments
    and results then have the member as their first axis."""

    initial: Callable[..., Any]
    advance: Callable[..., Any]
    evaluate: Callable[..., Any]


def structure(member: Member) -> Member:
    """A member that stands for all members that run the same program."""
    static = {name: value for name, value in member.knobs if name not in TRACED}
    return dataclasses.replace(member, seed=0, learning_rate=1.0, weight_decay=0.1, knobs=static)


@functools.lru_cache(maxsize=16)
def program(like: Member, together: bool, at_y: bool) -> Program:
    """The program of all members whose structure is `like`."""
    task = like.workload.task()

    def built(numbers: Mapping[str, jax.Array]) -> Optimizer:
        return optimizer_of(like, {**like.settings, **numbers})

    def initial(seed: jax.Array, numbers: Mapping[str, jax.Array], start: optax.Params | None):
        params = task.init(jax.random.key(seed)) if start is None else start
        return params, built(numbers).init(params)

    def advance(state, numbers: Mapping[str, jax.Array], rows: jax.Array, train: Any):
        optimizer = built(numbers)

        def step(state, rows):
            params, opt_state = state
            grads = jax.grad(task.loss)(params, train, rows)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, state, rows)[0]

    def evaluate(state, numbers: Mapping[str, jax.Array], parts: Any):
        params, opt_state = state
        weights = {"loss": built(numbers).eval_params(opt_state, params)}
        weights |= {"loss at y": params} if at_y else {}
        return {name: task.held_out_loss(params, parts) for name, params in weights.items()}

    if together:
        initial = jax.vmap(initial, (0, 0, None))
        advance = jax.vmap(advance, (0, 0, 0, None))
        evaluate = jax.vmap(evaluate, (0, 0, None))
    return Program(jax.jit(initial), jax.jit(advance, donate_argnums=0), jax.jit(evaluate))


def evaluations(steps: int) -> list[int]:
    """The steps after which to evaluate: few in the first half, every 2 % of the run after it."""
    percents = [*range(10, 50, 10), *range(50, 101, 2)]
    return sorted({round(percent * steps / 100) for percent in percents} - {0})


def train(members: Sequence[Member], data: Data, at_y: bool = False) -> list[Result]:
    """Trains all members; returns their results in the same order.

    Args:
      members: any number of members of any structure, all on the same data.
      data: what their workload loaded.
      at_y: whether to evaluate the params as well, where gradients are taken.

    Raises:
      ValueError: if the corpus is too small to give a member fresh windows at each step.
    """
    groups: dict[Member, list[Member]] = {}
    for member in members:
        groups.setdefault(structure(member), []).append(member)
    alone = jax.default_backend() == "cpu"
    results = {}
    for group in groups.values():
        for some in [[member] for member in group] if alone else [group]:
            results |= {result.member: result for result in train_group(some, data, at_y)}
    return [results[member] for member in members]


def train_group(members: Sequence[Member], data: Data, at_y: bool) -> list[Result]:
    """Trains members of one structure at once."""
    began = time.process_time()
    like, together = structure(members[0]), len(members) > 1
    workload, compiled = like.workload, program(like, together, at_y)

    def gathered(values: Iterable[Any]) -> np.ndarray:
        return np.stack([*values]) if together else next(iter(values))

    numbers = {
        name: gathered([np.float32(member.settings[name]) for member in members])
        for name in TRACED
        if name in like.settings
    }
    order = [workload.rows(data.train, member.seed, member.steps) for member in members]
    train, few, many = (
        jax.tree.map(jnp.asarray, arrays)
        for arrays in (data.train, *(workload.parts(data, n) for n in (ON_THE_WAY, HELD_OUT)))
    )
    seeds = gathered([np.uint32(member.seed) for member in members])
    state = compiled.initial(seeds, numbers, data.start)
    points = evaluations(like.steps)
    unit = math.gcd(*points)  # steps in a call, so that all calls are the same program
    values: dict[str, list[np.ndarray]] = {}
    for done in range(unit, like.steps + 1, unit):
        rows = gathered([rows[done - unit : done] for rows in order])
        state = compiled.advance(state, numbers, rows, train)
        if done in points:
            found = compiled.evaluate(state, numbers, few)
            for name, value in found.items():
                values.setdefault(name, []).append(np.atleast_1d(value))
            if not np.isfinite(values["loss"][-1]).any():
                break
    final = np.atleast_1d(compiled.evaluate(state, numbers, many)["loss"])
    seconds = (time.process_time() - began) / len(members)
    curves = {name: np.stack(value, axis=1).astype(float) for name, value in values.items()}
    results = []
    for index, member in enumerate(members):
        finite = np.isfinite(curves["loss"][index])
        count = len(finite) if finite.all() else int(finite.argmin())
        curve = {name: rows[index, :count].tolist() for name, rows in curves.items()}
        end = final[index] if count == len(points) else math.inf
        results.append(Result(member, {"step": points[:count], **curve}, float(end), seconds))
    return results
