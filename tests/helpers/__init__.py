"""What the tests share; see the modules."""

import os
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Compiling is most of what the tests do. With XLA's older emitter of CPU kernels, in one piece
# instead of many, it takes a fifth of the time. With COMPILE=fully programs are as users have them,
# as in CI on the newest Python, and for kills and moves.
QUICKLY = os.environ.get("COMPILE") != "fully"
QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
# XLA ends a process for a flag that it does not know. Those releases that have them:
KNOWN = tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 10)


def xla_flags(devices: int = 1) -> str:
    """XLA_FLAGS for so many devices and, unless COMPILE says otherwise, for quick compilation."""
    quick = QUICK_FLAGS if QUICKLY and KNOWN else ""
    return f"{quick} --xla_force_host_platform_device_count={devices}"


def environment(devices: int = 1) -> dict[str, str]:
    """For a process of its own, with so many devices."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
