"""What the folder of a run records of its flags and its data, and whether they are the same when a
command resumes it."""

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from rich.console import Console

from examples.config import decisive, to_json
from examples.console import say
from examples.files import free_name, read_json
from examples.settings import Settings, flag, in_updates, without_effect

PACKAGES = ("gpa-optax", "jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "grain", "numpy")
# Settings that are numbers of updates, and the flag that gives them as a part of the run.
PARTS = {"warmup": "warmup", "mu_y_warmup": "mu_y_warmup", "mu_x": "window"}


def to_store(config: Any) -> dict[str, Any]:
    """What is written beside a run: the whole configuration, and the versions behind it."""
    return {"config": to_json(config), "versions": versions()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def start_over(folder: Path, console: Console) -> None:
    """Renames the folder if it exists, so that nothing in it is lost."""
    if folder.exists() and jax.process_index() == 0:
        renamed = free_name(folder)
        folder.rename(renamed)
        say(console, f"{folder} is {renamed} now.")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"start over in {folder}")


def check_run(config: Any) -> None:
    """Checks that the run folder, if there is one, was started with this configuration.

    --steps may be larger, if nothing else in the run depends on it; flags in `config.FREE` do not
    count.

    Raises:
      ValueError: if the folder holds a run with other flags, or one that cannot be made longer.
    """
    path = config.run / "config.json"
    if not path.exists():
        return
    stored = read_json(path)["config"]
    before, now = lasting(stored), lasting(to_json(config))
    given = dataclasses.asdict(config.settings)
    same = "give the same flags to resume it, another --run, or --no-resume to rename it and "
    same += "start over."
    started = f"{config.run} holds a run that was started with"
    old, new = before.pop("steps"), now.pop("steps")
    if old != new and now["settings.schedule"] == before.get("settings.schedule") != "constant":
        raise ValueError(
            f"{started} --steps {old}, not {new}, and its --schedule {now['settings.schedule']} "
            f"depends on their number; {same}"
        )
    for name in sorted(before.keys() | now.keys()):
        was, would_be = before.get(name), now.get(name)
        if was == would_be:
            continue
        field = name.removeprefix("settings.")
        if field in PARTS and stored["settings"][field] != was and given[field] != would_be:
            part = f"{flag(PARTS[field])} {given[PARTS[field]]:g}"
            number = int(was) if was == int(was) else was
            raise ValueError(
                f"{started} --steps {old} and {part}, which is a fraction of --steps: to make it "
                f"longer with the same schedule, give {flag(field)} {number}."
            )
        raise ValueError(f"{started} {flag(field)} {was}, not {would_be}; {same}")
    if new < old:
        raise ValueError(f"{started} --steps {old}, and cannot be made shorter, got {new}; {same}")


def lasting(stored: dict[str, Any]) -> dict[str, Any]:
    """The flags on which each step of a run depends: where they are equal, so are the steps of two
    runs, whatever their --steps."""
    known = {field.name for field in dataclasses.fields(Settings)}
    settings = Settings(**{k: v for k, v in stored["settings"].items() if k in known})
    settings = in_updates(settings, stored["steps"])
    unused = without_effect(stored["optimizer"], settings)
    used = {k: v for k, v in dataclasses.asdict(settings).items() if k not in unused}
    return decisive({**stored, "settings": used})


def check_data(folder: Path, files: Mapping[str, Any]) -> None:
    """Checks that the data is still what the run was started with: its tokenizer, its classes.

    Raises:
      ValueError: if it has changed since.
    """
    for name, content in files.items():
        path = folder / name
        if path.exists() and read_json(path) != content:
            raise ValueError(
                f"{folder} holds a run that was started with other data, as its {name} shows; give "
                "that data to resume it, another --run, or --no-resume to rename it and start "
                "over."
            )
