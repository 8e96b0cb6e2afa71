"""What the commands share: presets as defaults, one-sentence errors, several processes, and the
configuration that is stored with a run and read back."""

import contextlib
import ctypes
import dataclasses
import importlib.metadata
import itertools
import json
import platform
import sys
import traceback
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import tyro
from jax.experimental import multihost_utils
from rich.console import Console

from examples import peers
from examples.optimizers import Settings, flag, in_updates, without_effect
from examples.reporting import read_json

# Flags that change nothing in what a run computes: a run may go on with other values of these.
FREE = {
    "run", "out", "resume", "fsdp", "keep", "log_every", "evaluate_every", "evaluate_y",
    "max_bad_steps", "distributed", "data.cache",
}  # fmt: skip
# Orbax would warn of each checkpoint that is saved between two evaluations, and show the whole
# traceback of an error in its threads, which it raises as well.
absl.logging.set_verbosity(absl.logging.FATAL)
PACKAGES = ("gpa-optax", "jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "grain", "numpy")


@dataclasses.dataclass(frozen=True)
class Distributed:
    """Several processes that train together."""

    distributed: bool = False
    """Start as one of several processes (jax.distributed.initialize). Slurm, Cloud TPU and other
    clusters need no more; elsewhere the next three flags say who is who."""
    coordinator: str | None = None
    """Address and port of process 0, such as 10.0.0.1:1234."""
    processes: int | None = None
    """Number of processes."""
    process: int | None = None
    """Number of this process, from 0."""

    def start(self) -> None:
        """Must be called before anything else touches jax's devices.

        Raises:
          ValueError: if flags contradict each other or the processes do not meet.
        """
        given = [value is not None for value in (self.coordinator, self.processes, self.process)]
        if not self.distributed:
            if any(given):
                raise ValueError("--coordinator, --processes and --process need --distributed.")
            return
        if any(given) and not all(given):
            raise ValueError("Give --coordinator, --processes and --process together, or none.")
        peers.watch_the_others()
        try:
            jax.distributed.initialize(
                self.coordinator,
                self.processes,
                self.process,
                heartbeat_timeout_seconds=peers.SILENCE,
            )
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"--distributed: {error}") from error


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


def keep_memory() -> None:
    """Has the memory of a step kept for the next one.

    glibc gives large blocks back to the system, which clears them again when they are next used.
    `python -m benchmarks.train_step` with and without --keep-memory shows what that takes.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-8, 1)  # M_ARENA_MAX: the limits below are those of the one arena
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-2, 2**26)  # M_TOP_PAD, in bytes


def run_command(command: Callable[[Sequence[str], Console], int], arguments=None) -> int:
    """Runs a command; what the user can put right ends in one sentence and exit status 2, numbers
    that are not finite in one and status 3.

    One of several processes that fails does not wait for the others.
    """
    console = Console()
    keep_memory()
    try:
        return command(sys.argv[1:] if arguments is None else list(arguments), console)
    except (ValueError, OSError, FloatingPointError) as error:
        who = f"Process {jax.process_index()}: " if jax.distributed.is_initialized() else ""
        peers.say(f"{who}{error}")
        status = 3 if isinstance(error, FloatingPointError) else 2
    except KeyboardInterrupt:
        console.print("\nInterrupted.")
        status = 130
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        if isinstance(error, RuntimeError):  # as a collective raises, and JAX in general
            peers.wait_for_news()
        traceback.print_exc()
        status = 1
    if jax.distributed.is_initialized():
        peers.leave(status)
    return status


def begin_anew(folder: Path, console: Console) -> None:
    """Renames a folder that is there, so that nothing in it is lost."""
    if folder.exists() and jax.process_index() == 0:
        renamed = free_name(folder)
        folder.rename(renamed)
        console.print(f"{folder} is {renamed} now.", highlight=False, soft_wrap=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"begin anew in {folder}")


def free_name(path: Path) -> Path:
    """The path itself, or with the first number after it that nothing there has."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())


def check_run(config: Any) -> None:
    """Checks that the run folder, if there is one, was begun with this configuration: but for
    --steps, of which there may be more if nothing else in the run depends on their number.

    Raises:
      ValueError: if the folder holds a run with other flags, or one that cannot be made longer.
    """
    path = config.run / "config.json"
    if not path.exists():
        return
    stored, given = read_json(path)["config"], to_json(config)
    before, now = lasting(stored), lasting(given)
    same = "give the same flags to go on with it, another --run, or --no-resume to rename it and "
    same += "start anew."
    begun = f"{config.run} holds a run that was begun with"
    old, new = before.pop("steps", None), now.pop("steps")
    if old != new and now["settings.schedule"] == before.get("settings.schedule") != "constant":
        raise ValueError(
            f"{begun} --steps {old}, not {new}, and its --schedule {now['settings.schedule']} "
            f"depends on their number; {same}"
        )
    for name in sorted(before.keys() | now.keys()):
        was, would_be = before.get(name), now.get(name)
        if was == would_be:
            continue
        field = name.removeprefix("settings.")
        by_length = {"warmup": "warmup", "mu_y_warmup": "mu_y_warmup", "mu_x": "window"}
        part = given["settings"].get(by_length.get(field))
        if old != new and part is not None and part == stored["settings"][by_length[field]]:
            number = int(was) if was == int(was) else was
            raise ValueError(
                f"{begun} --steps {old}, of which {flag(by_length[field])} {part:g} is a part: to "
                f"make it longer with the same schedule, give {flag(field)} {number}."
            )
        raise ValueError(f"{begun} {flag(field)} {was}, not {would_be}; {same}")
    if old is None or new < old:
        raise ValueError(f"{begun} --steps {old}, and cannot be made shorter, got {new}; {same}")


def lasting(stored: dict[str, Any]) -> dict[str, Any]:
    """The flags on which each step of a run depends, so that equal ones make equal steps whatever
    --steps is."""
    known = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{k: v for k, v in stored["settings"].items() if k in known})
    settings = in_updates(settings, stored["steps"])
    unused = without_effect(stored["optimizer"], settings)
    used = {k: v for k, v in dataclasses.asdict(settings).items() if k not in unused}
    return decisive({**stored, "settings": used})


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


def to_store(config: Any) -> dict[str, Any]:
    """What is written beside a run: the whole configuration, and the versions behind it."""
    return {"config": to_json(config), "versions": versions()}


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


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def parse(kind: type, program: str, default: Any, arguments: Sequence[str]) -> Any:
    return tyro.cli(kind, prog=program, default=default, args=arguments)
