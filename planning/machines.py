"""Ahead-of-time compilation for machines that are not here.

The compilers for TPUs and NVIDIA GPUs run on any CPU. Given the description of a machine, they
produce the program that it would run, from which buffer sizes and collectives can be read.
"""

import importlib.metadata
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

GIB = 2**30
UNITS = [(GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")]
# GiB of memory that a program may use on one chip: the available HBM that libtpu 0.0.42's compiler
# reports when it refuses a program that is too large. cloud.google.com/tpu/docs/system-architecture
# lists 32, 16, 95 and 32 in all.
TPUS = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
# cloud.google.com/tpu/docs/v5e and /v6e. Topologies of the other two chips are boxes, whose sides
# are multiples of 4 when they are large.
FLAT = {"1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"}
SMALL_BOXES = {"2x2x1", "2x2x2", "2x2x4", "2x4x4"}
GPUS = {"h100": Path(__file__).parent / "targets" / "h100.textproto"}


class Target(NamedTuple):
    """A machine to compile for."""

    platform: str
    devices: Sequence[jax.Device]
    memory: float | None
    """GiB of a device's memory that a program can use, if known."""
    compiler: str
    """The package that the compiler is in, and its version."""


def find(target: str) -> Target:
    """The machine of a `--target`; must be called before anything else touches jax's devices.

    Raises:
      ValueError: if there is no such machine, or its compiler is not installed.
    """
    chip, _, shape = target.partition(":")
    if chip in TPUS:
        flat = chip in ("v5e", "v6e")
        if not (shape in FLAT if flat else is_box(shape)):
            known = ", ".join(sorted(FLAT if flat else SMALL_BOXES, key=cores))
            larger = "" if flat else ", or a larger box, such as 4x4x8"
            raise ValueError(
                f"--target {target}: no such {chip} exists; there are {known}{larger}."
            )
        return tpu(chip, shape)
    if chip not in GPUS and chip != "cpu":
        raise ValueError(f"--target {target}: give {', '.join((*TPUS, *GPUS))} or cpu, and a size.")
    count = int(shape) if re.fullmatch(r"[1-9]\d*", shape) else 0
    if not count or (chip in GPUS and count > 8 and count % 8):
        raise ValueError(
            f"--target {target}: after the colon comes the number of devices, such as {chip}:8"
            + (" (1 to 8, or a multiple of 8)." if chip in GPUS else ".")
        )
    return gpu(chip, count) if chip in GPUS else cpu(count)


def is_box(shape: str) -> bool:
    sides = [int(side) for side in re.findall(r"\d+", shape)]
    box = re.fullmatch(r"\d+x\d+x\d+", shape) and all(s and s % 4 == 0 for s in sides)
    return shape in SMALL_BOXES or (bool(box) and sides == sorted(sides))


def cores(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def tpu(chip: str, shape: str) -> Target:
    need("libtpu", f"--target {chip}:{shape}", 'pip install "jax[tpu]"')
    # libtpu reads these when it is loaded. There is no TPU to ask or to lock.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    options = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    if chip == "v4":  # its two cores work as one device
        options["chip_config_name"] = "megacore"
    devices = topology(f"{chip}:{shape}", "tpu", f"{chip}:{shape}", **options)
    return Target("tpu", devices, TPUS[chip], f"libtpu {importlib.metadata.version('libtpu')}")


def gpu(chip: str, count: int) -> Target:
    packages = [f"{name}=={jax.__version__}" for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt")]
    install = f"pip install --no-deps {' '.join(packages)}"
    need("jax_plugins.xla_cuda13", f"--target {chip}:{count}", install)
    # NVLink domains, processes in each, GPUs of each process.
    shape = f"{max(1, count // 8)}x{min(count, 8)}x1"
    described = GPUS[chip].read_text()
    devices = topology(f"{chip}:{count}", "cuda", "", topology=shape, target_config=described)
    memory = int(re.search(r"device_memory_size: (\d+)", described)[1]) / GIB
    version = importlib.metadata.version("jax-cuda13-plugin")
    return Target("cuda", devices, memory, f"jax-cuda13-plugin {version}")


def cpu(count: int) -> Target:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    version = importlib.metadata.version("jaxlib")
    return Target("cpu", jax.devices(), None, f"jaxlib {version}")


def need(module: str, flag: str, install: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that the module would be in
        found = None
    if not found:
        raise ValueError(f"{flag} needs a compiler that is not installed: {install}.")


def topology(target: str, platform: str, name: str, **options: Any) -> Sequence[jax.Device]:
    jax.config.update("jax_platforms", "cpu")  # this machine's own accelerators are not wanted
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--target {target}: the compiler does not know it: {reason}") from None


def compile_for(target: Target, jitted: Any, *arguments: Any) -> jax.stages.Compiled:
    """The program that the target would run, compiled from the shapes of its arguments. Arguments
    without a sharding are on the first device."""
    first = jax.sharding.SingleDeviceSharding(target.devices[0])
    arguments = jax.tree.map(
        lambda leaf: leaf if leaf.sharding else leaf.update(sharding=first), arguments
    )
    return jitted.trace(*arguments).lower(lowering_platforms=(target.platform,)).compile()


def amount(size: float) -> str:
    """Bytes as text, such as 1.50 GiB; small sizes are in MiB or KiB."""
    unit, name = next((u for u in UNITS if abs(size) >= u[0] / 10), UNITS[-1])
    return f"{size / unit:.2f} {name}"


def per_device(tree: Any) -> int:
    """Bytes of arrays on each device, from their shapes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
