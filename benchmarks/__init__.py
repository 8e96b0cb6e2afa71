"""Measurements behind what the documentation says; their results are in `results/`."""

import contextlib
import platform
import re
from collections.abc import Sequence
from pathlib import Path

Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Headings, and a line of cells for each row."""
QUICK = Path("runs/bench")  # where the short forms write their results


def quick_file(file: Path, default: Path) -> Path:
    """Where a short form writes: never over the stored results, unless that was asked for."""
    return QUICK / file.name if file == default else file


def processor() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()):
            return found[1]
    return platform.processor()
