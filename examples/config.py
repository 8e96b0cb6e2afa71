"""The flags of a run: what they are, how they are read from the command line with the defaults of a
preset and an optimizer, and how they are stored as JSON."""

import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from examples.settings import NAMES, Name, Settings, averages, check_effect, flag, holds_master_copy

# Flags that do not change what a run computes: a run may be resumed with other values of these.
FREE = {
    "run", "out", "resume", "fsdp", "keep", "log_every", "evaluate_every", "evaluate_y",
    "max_bad_steps", "distributed", "data.cache",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Training:
    """The flags that every run has, whatever it trains. A workload adds its data and model."""

    steps: int = 1000
    """Updates."""
    batch_size: int = 40
    """Examples in an update, over all devices."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after the other, to save memory."""
    seed: int = 0
    """Decides the initialization and the order of the data."""
    fsdp: int = 1
    """Devices that share one copy of params and optimizer state; each further group of as many
    devices holds its own copy."""
    evaluate_every: int = 50
    """Updates from one evaluation, and checkpoint, to the next."""
    evaluate_y: bool = False
    """Whether to evaluate y, the params that are trained, beside the averaged weights x."""
    validation_examples: int | None = 200
    """Held-out examples to evaluate on; None: all there are."""
    keep: int = 2
    """Checkpoints to keep, beside the best."""
    resume: bool = True
    """Resume from what is in the folder. --no-resume renames it and starts over."""
    log_every: int = 10
    """Updates from one line of metrics to the next."""
    max_bad_steps: int = 10
    """Consecutive steps with a non-finite loss or gradient after which the run ends. Such a step
    changes neither the params nor the optimizer's state."""

    def __post_init__(self):
        counts = ("steps", "batch_size", "accumulate", "evaluate_every", "keep", "log_every")
        for name in (*counts, "max_bad_steps", "validation_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {value}.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--batch-size ({self.batch_size}) must be a multiple of --accumulate "
                f"({self.accumulate})."
            )


@dataclasses.dataclass(frozen=True)
class OneRun(Training):
    """The flags of a single run. `examples.compare` makes one of these for each optimizer."""

    run: Path | None = None
    """Folder of the run: checkpoints, metrics, summary. The same command resumes what it finds
    there. Default: runs/ and a name made of the workload, the preset and the optimizer."""
    optimizer: Name = "gpa-adamw"
    """The optimizer: a base, or a kind of averaging around it."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = Settings()


def check_master_copy(param_dtype: str, optimizer: Name) -> None:
    if param_dtype == "bfloat16" and not holds_master_copy(optimizer):
        raise ValueError(
            f"--model.param-dtype bfloat16 needs an optimizer that holds a float32 copy of the "
            f"params, such as gpa-adamw; --optimizer {optimizer} holds none."
        )


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Several processes that train together."""

    distributed: bool = False
    """Start as one of several processes (jax.distributed.initialize). On Slurm, Cloud TPU and other
    clusters this flag is enough; elsewhere the next three flags identify the processes."""
    coordinator: str | None = None
    """Address and port of process 0, such as 10.0.0.1:1234."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0."""


def parse_run(kind: type, program: str, arguments: Sequence[str]) -> OneRun:
    """Parses the flags, whose defaults, as `--help` shows them, depend on the preset and the
    optimizer."""
    default = kind()
    preset = peek(arguments, "--preset", default.preset)
    optimizer = peek(arguments, "--optimizer", default.optimizer)
    if preset in kind.PRESETS and optimizer in NAMES:  # else tyro names the error
        default = kind(
            optimizer=optimizer,
            settings=kind.preset_settings(preset, optimizer),
            **kind.preset_values(preset),
        )
    config = tyro.cli(kind, prog=program, default=default, args=arguments)
    check_effect(config.optimizer, config.settings, given(arguments))
    if config.evaluate_y and not averages(config.optimizer):
        raise ValueError(
            f"--evaluate-y has no effect with {config.optimizer}, whose params are all there is to "
            "evaluate: leave it out."
        )
    if config.run is None:
        folder = Path("runs", f"{config.workload}-{config.preset}-{config.optimizer}")
        config = dataclasses.replace(config, run=folder)
    return config


def peek(arguments: Sequence[str], flag: str, default: str) -> str:
    """The value of a flag, before the others can be parsed: it decides their defaults."""
    for index, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == flag:  # the last one counts
            default = value or (*arguments, default)[index + 1]
    return default


def given(arguments: Sequence[str]) -> set[str]:
    """The flags among the arguments; a value of a flag never begins with two hyphens."""
    names = (argument.partition("=")[0] for argument in arguments if argument.startswith("--"))
    return {name.replace("_", "-") for name in names}  # tyro takes both


def decisive(stored: dict[str, Any]) -> dict[str, Any]:
    """The flags on which the result of a run depends."""
    return {
        name: value
        for name, value in leaves(stored).items()
        if not {name, name.split(".")[0]} & FREE
    }


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {}
        flat |= {} if isinstance(value, dict) else {prefix + name: value}
    return flat


def to_json(config: Any) -> Any:
    """A dataclass as JSON has it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def from_json(kind: type, values: dict[str, Any]) -> Any:
    """The dataclass that `to_json` stored."""
    hints = typing.get_type_hints(kind)
    fields = {}
    for field in dataclasses.fields(kind):
        value, hint = values[field.name], hints[field.name]
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if dataclasses.is_dataclass(hint):
            value = from_json(hint, value)
        elif Path in options and value is not None:
            value = Path(value)
        elif isinstance(value, list):
            value = tuple(value)
        fields[field.name] = value
    return kind(**fields)
