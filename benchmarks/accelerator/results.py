"""A file of results for each part, rewritten after each measurement."""

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import jax

import gpa_optax
from benchmarks import processor
from examples.files import write_json

PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy", "torch")


@dataclasses.dataclass(frozen=True)
class Bar:
    """A number that was set as a goal before it was measured."""

    what: str
    limit: float
    measured: float
    at_most: bool = True
    """Or at least."""
    essential: bool = False
    """Whether missing it is an error, on any device."""

    @property
    def met(self) -> bool:
        return self.measured <= self.limit if self.at_most else self.measured >= self.limit

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"met": self.met}

    def __str__(self) -> str:
        word = "at most" if self.at_most else "at least"
        verdict = "met" if self.met else "MISSED"
        return f"{verdict}: {self.what} is {self.measured:.3g}, {word} {self.limit:.3g} wanted"


class Results:
    """What a part has measured, in a file in `folder`.

    Measurements that an earlier run made with the same code and versions on the same kind of device
    are reused, unless `again` is set.
    """

    def __init__(self, folder: Path, part: str, quick: bool, again: bool):
        origin = {
            "part": part,
            "quick": quick,
            "device": device(),
            "versions": versions(),
            "code": code(),
        }
        today = datetime.date.today().isoformat()
        kind = re.sub(r"\W+", "-", origin["device"]["kind"]).strip("-").lower()
        self.path = folder / f"{part}-{kind}-{today}.json"
        self.content = {"date": today, **origin, "seconds": 0.0, "measurements": {}}
        for path in [] if again else sorted(folder.glob(f"{part}-{kind}-*.json")):
            found = json.loads(path.read_text())
            if found | origin == found:
                self.path, self.content = path, found
        folder.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic() - self.content["seconds"]

    @property
    def measurements(self) -> dict[str, Any]:
        """Those that succeeded."""
        every = self.content["measurements"]
        return {name: found for name, found in every.items() if "failed" not in found}

    def has(self, name: str) -> bool:
        """Whether a measurement is complete."""
        return not self.measurements.get(name, {"partial": True}).get("partial")

    def add(self, name: str, found: dict[str, Any]) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.content["measurements"][name] = {"date": now, **found}
        self.write()

    def finish(self, left_out: dict[str, str], bars: list[Bar]) -> None:
        self.content |= {"left_out": left_out, "bars": [bar.to_json() for bar in bars]}
        self.write()

    def write(self) -> None:
        self.content["seconds"] = round(time.monotonic() - self.began, 1)
        write_json(self.path, self.content)


def device() -> dict[str, Any]:
    """The device that JAX computes on."""
    found = jax.devices()[0]
    return {
        "kind": found.device_kind if found.platform != "cpu" else processor(),
        "platform": found.platform,
        "driver": driver(),
    }


def driver() -> str | None:
    """The version of NVIDIA's driver, if there is one."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[0].strip()
    return None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "gpa-optax": gpa_optax.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    # Of CUDA, for a GPU: such as "PJRT C API\ncuda 13000".
    found["backend"] = " ".join(jax.devices()[0].client.platform_version.split())
    return found


def code() -> str:
    """A digest of the library's source."""
    folder = Path(gpa_optax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
