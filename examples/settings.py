"""The names of the optimizers, their settings with the defaults, and which settings have no effect
with which optimizer."""

import dataclasses
from collections.abc import Collection
from typing import Literal, get_args

from gpa_optax import averaging

Base = Literal["adamw", "muon", "lion", "sgd"]
Name = Literal[
    "adamw", "gpa-adamw", "schedule-free-adamw", "diloco-adamw", "ema-adamw",
    "muon", "gpa-muon", "schedule-free-muon", "diloco-muon", "ema-muon",
    "lion", "gpa-lion", "schedule-free-lion", "diloco-lion", "ema-lion",
    "sgd", "gpa-sgd", "schedule-free-sgd", "diloco-sgd", "ema-sgd",
]  # fmt: skip
LABELS = {"adamw": "AdamW", "muon": "Muon", "lion": "Lion", "sgd": "SGD"}
METHODS = {"gpa": "GPA", "schedule-free": "Schedule-Free", "diloco": "DiLoCo", "ema": "EMA"}
NAMES: tuple[Name, ...] = get_args(Name)


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of an optimizer. `without_effect` says which of them do not apply to it."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warmup: a cosine or a line down, constant and then a line down (warmup, stable,
    decay), or constant."""
    warmup: float = 0.05
    """Part of the run in which the learning rate grows from 0 to its peak, such as 0.05; or, from 1
    on, the number of updates, such as 500."""
    decay: float = 0.2
    """Part of the run in which wsd decays."""
    final: float = 0.0
    """Learning rate at the end, as a part of the peak; no effect with constant."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices, multiplied by the learning rate."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    b1: float = 0.9
    """Momentum of the base: the decay of its first moment. 0 keeps none."""
    b2: float = 0.95
    """AdamW: decay of the second moment. Lion: decay of the momentum that is kept."""
    mu_y: float = 0.9
    """GPA: how far gradients are taken from z towards x. Schedule-Free calls it beta."""
    mu_y_warmup: float = 0.0
    """GPA: part of the run in which mu_y grows from 0; or, from 1 on, the number of updates."""
    mu_x: float | None = None
    """GPA, EMA: decay of the average. Default: that of the window."""
    window: float = 0.05
    """GPA, EMA: steps that the average remembers, as a part of the run."""
    average: Literal["annealed", "warmed-up", "constant", "polynomial", "lr-weighted"] = "annealed"
    """GPA, EMA: annealed shrinks the window with the learning rate; warmed-up starts as a uniform
    average; constant always has the same window; polynomial grows it with the run, and so does
    lr-weighted, where the iterates of the warmup weigh less, as in Schedule-Free
    (gpa_optax.averaging)."""
    power: float = 0.0
    """GPA, EMA: how much more late iterates weigh in a polynomial average; 0 is a uniform one."""
    base_params: Literal["z", "y"] = "z"
    """GPA: where weight decay acts."""
    sync_period: int = 32
    """DiLoCo: inner steps between two outer steps."""
    outer_learning_rate: float = 0.7
    """DiLoCo: learning rate of the outer SGD."""
    outer_momentum: float = 0.9
    """DiLoCo: Nesterov momentum of the outer SGD."""

    def __post_init__(self):
        for name in ("learning_rate", "clip", "window"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{flag(name)} must be positive, got {getattr(self, name)}.")
        for name in ("final", "b1", "b2", "mu_y"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be in [0, 1), got {getattr(self, name)}.")
        for name in ("warmup", "mu_y_warmup"):
            value = getattr(self, name)
            if not (0 <= value < 1 or (value >= 1 and value == round(value))):
                raise ValueError(
                    f"{flag(name)} must be a part of the run in [0, 1) or a whole number of "
                    f"updates, got {value}."
                )
        if self.schedule == "wsd" and not 0 < self.decay <= 1 - self.warmup % 1:
            raise ValueError(
                f"--decay must be positive and leave room for --warmup {self.warmup}, got "
                f"{self.decay}."
            )


def flag(name: str, prefix: str = "--") -> str:
    return prefix + name.replace("_", "-")


def split(name: Name) -> tuple[str, Base]:
    """("gpa", "adamw") of "gpa-adamw", ("", "adamw") of "adamw"."""
    method, _, base = name.rpartition("-")
    return method, base


def label(name: Name) -> str:
    method, base = split(name)
    return "-".join(filter(None, (METHODS.get(method), LABELS[base])))


def without_effect(
    name: Name, settings: Settings, prefix: str = "--"
) -> dict[str, tuple[str, str]]:
    """The settings that have no effect with this optimizer: for each the choice that makes it so,
    and the one with which it would matter. The flags of the settings begin with `prefix`."""
    method, base = split(name)
    average, schedule = (f"{prefix}{flag} " for flag in ("average", "schedule"))
    windows = ("annealed", "warmed-up", "constant")
    rules = [
        ("decay", settings.schedule == "wsd", schedule + settings.schedule, schedule + "wsd"),
        (
            "final", settings.schedule != "constant",
            schedule + settings.schedule, schedule + "cosine, linear or wsd",
        ),
        ("b2", base != "sgd", name, "an optimizer around adamw, muon or lion"),
        ("mu_y", method in ("gpa", "schedule-free"), name, f"gpa-{base} or schedule-free-{base}"),
        ("mu_y_warmup base_params", method == "gpa", name, f"gpa-{base}"),
        ("average mu_x window power", method in ("gpa", "ema"), name, f"gpa-{base} or ema-{base}"),
        (
            "mu_x window", settings.average in windows,
            average + settings.average, average + "annealed, warmed-up or constant",
        ),
        ("window", settings.mu_x is None, f"{prefix}mu-x {settings.mu_x}", f"no {prefix}mu-x"),
        (
            "power", settings.average == "polynomial",
            average + settings.average, average + "polynomial",
        ),
        (
            "sync_period outer_learning_rate outer_momentum", method == "diloco",
            name, f"diloco-{base}",
        ),
    ]  # fmt: skip
    found: dict[str, tuple[str, str]] = {}
    for fields, matter, choice, other in rules:
        for field in () if matter else fields.split():
            found.setdefault(field, (choice, other))
    return found


def check_effect(
    name: Name, settings: Settings, given: Collection[str], prefix: str = "--"
) -> None:
    """Checks that each of the flags that were given, such as --mu-x, has an effect.

    Raises:
      ValueError: if one has none, whatever its value.
    """
    for field, (choice, other) in without_effect(name, settings, prefix).items():
        if flag(field, prefix) in given:
            raise ValueError(
                f"{flag(field, prefix)} {getattr(settings, field)} has no effect with {choice}: "
                f"leave it out, or give it with {other}."
            )


# Against AdamW's learning rate: Lion's authors recommend 3 to 10 times less (arXiv 2302.06675) with
# as much more weight decay; SGD steps along gradients, clipped at a norm of 1; Muon is scaled to
# AdamW's size of update.
SCALES = {"adamw": 1.0, "muon": 1.0, "lion": 0.1, "sgd": 20.0}


def default_settings(
    name: Name, learning_rate: float, warmup: float, small: bool = False
) -> Settings:
    """Settings to start from, given a learning rate that is good for AdamW.

    A small model is one like those of benchmarks/. It has the schedule that was best for AdamW
    there, a line to 0; with GPA around AdamW it has twice the learning rate, a longer warmup, and
    then a constant rate.
    """
    method, base = split(name)
    values = {"learning_rate": learning_rate * SCALES[base], "warmup": warmup}
    if base == "lion":
        values |= {"b2": 0.99, "weight_decay": 1.0}
    if method == "schedule-free":
        values |= {"b1": 0.0, "schedule": "constant"}
    # One momentum: the interpolation's, the outer loop's or the base's.
    if method == "gpa":
        values |= {"b1": 0.0, "mu_y": 0.9} if base in ("adamw", "sgd") else {"mu_y": 0.7}
    if method == "diloco" and base == "sgd":
        values |= {"b1": 0.0}
    if small and name == "gpa-adamw":
        values |= {"learning_rate": 2 * learning_rate, "warmup": 0.2}
        values |= {"schedule": "constant", "average": "lr-weighted"}
    elif small:
        values = {"schedule": "linear", **values}
    return Settings(**values)


def averages(name: Name) -> bool:
    """Whether the optimizer is evaluated at other weights than the params."""
    return split(name)[0] != ""


def holds_master_copy(name: Name) -> bool:
    """Whether the state holds bfloat16 params in float32, so that no small steps are lost."""
    return split(name)[0] in ("gpa", "ema")


def in_updates(settings: Settings, steps: int) -> Settings:
    """The same settings for a run of `steps` updates, with the parts of the run as numbers of
    updates and the window as its mu_x: what stays fixed when the run is made longer."""

    def number(part: float) -> float:
        return part if part >= 1 else float(round(part * steps))

    mu_x = settings.mu_x
    if mu_x is None:
        mu_x = averaging.from_horizon(max(1.0, settings.window * steps))
    return dataclasses.replace(
        settings,
        warmup=number(settings.warmup),
        mu_y_warmup=number(settings.mu_y_warmup),
        mu_x=mu_x,
    )
