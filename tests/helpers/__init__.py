"""What the tests share; see the modules."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
