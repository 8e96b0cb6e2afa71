"""Measurements behind what the documentation says; their results lie in `results/`."""

from pathlib import Path

QUICK = Path("runs/bench")  # where the short forms leave theirs


def quick_file(file: Path, default: Path) -> Path:
    """Where a short form writes: never over results that are kept, unless that was asked for."""
    return QUICK / file.name if file == default else file
