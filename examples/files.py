"""Files that are written whole or not at all."""

import contextlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it is not JSON: {error}.") from None


def write_json(path: Path, values: Any) -> None:
    write_whole(path, json.dumps(values, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes all of the text or nothing, whenever the process may end."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with naming(path):
            partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Adds the file's name to an error of the system, such as a full disk: errors from writing to
    an open file lack it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def free_name(path: Path) -> Path:
    """The path itself, or the path with the first number after it that makes it a free name."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())
