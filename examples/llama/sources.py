"""Where text comes from: the standard library, files, or the Hugging Face hub; all of it streamed.

A corpus is a list of shards, and a shard can be read from any position that it has named before.
"""

import dataclasses
import functools
import glob
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet

PIECE = 2**14  # bytes of a .txt file that are read as one document
SPAN = 2**22  # bytes of a .txt or .jsonl file in a shard: one large file is many shards
# Tests and bundled packages are left out: not every distribution of Python ships them.
LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "_bundled",
    "__pycache__",
}


class Document(NamedTuple):
    """A text, or one piece of a long file."""

    text: str
    ends: bool  # whether it is complete: False for a piece that the next one continues
    position: int  # what to give `Shard.read` to resume after this document


@dataclasses.dataclass(frozen=True)
class Shard:
    """Text that is read in order. `read(position)` starts at 0 or after a document."""

    name: str  # of its file, the same on every machine
    read: Callable[[int], Iterator[Document]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    description: str
    shards: list[Shard]
    files: list[tuple[str, int, int]]  # name, size, time of the last change
    texts_are_files: bool  # True if none is .jsonl or .parquet: each file holds one text


def open_corpus(source: str, column: str, flag: str) -> Corpus:
    """Finds the shards of "stdlib", a file, a folder or a glob; for hub datasets see `open_hub`."""
    if source == "stdlib":
        root, paths = standard_library()
        return corpus_of(root, paths, column, "files of Python's standard library")
    path = Path(source).expanduser()
    if path.is_dir():
        root, paths = path, sorted(file for file in path.rglob("*") if file.suffix in READERS)
    else:
        names = [path] if path.is_file() else glob.glob(str(path), recursive=True)
        found = [Path(name) for name in names]
        root, paths = path.parent, sorted(file for file in found if file.suffix in READERS)
        if not found:
            raise ValueError(
                f"{flag} {source} does not exist: give stdlib, a file, a folder, a glob in quotes, "
                "or hf:NAME."
            )
    paths = [file for file in paths if file.is_file()]
    if not paths:
        raise ValueError(f"{flag} {source} holds no file that ends in {', '.join(READERS)}.")
    return corpus_of(root, paths, column, f"files of {source}" if len(paths) > 1 else str(path))


def standard_library() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - LEFT_OUT  # which os.walk then does not enter
        paths += [Path(folder, name) for name in names if name.endswith(".py")]
    if len(paths) < 50:
        raise ValueError(
            f"--data.source stdlib finds {len(paths)} Python files in {root}, and the standard "
            "library has hundreds: install it in source form (on Debian: libpython3-stdlib)."
        )
    return root, sorted(paths)


def corpus_of(root: Path, paths: list[Path], column: str, what: str) -> Corpus:
    shards, files = [], []
    for path in paths:
        name, stat = os.path.relpath(path, root), path.stat()
        files.append((name, stat.st_size, stat.st_mtime_ns))
        span = stat.st_size if path.suffix == ".parquet" else SPAN
        read = READERS.get(path.suffix, read_text)
        for start in range(0, stat.st_size, span or 1):
            stop = min(start + span, stat.st_size)
            shards.append(Shard(name, functools.partial(read, path, column, start, stop)))
    size = sum(size for _, size, _ in files) / 1e6
    count = f"{len(files):,} " if len(files) > 1 else ""
    texts = not {path.suffix for path in paths} & {".jsonl", ".parquet"}
    return Corpus(f"{count}{what} ({size:,.1f} MB)", shards, files, texts)


def line_start(file, offset: int, limit: int = -1) -> int:
    """Where the first line at or after the offset starts; after `limit` bytes without a line, where
    the next character starts, so that a file without lines is cut too."""
    if offset == 0:
        return 0
    file.seek(offset - 1)
    file.readline(limit)
    for _ in range(3):  # on to the first byte of a character of UTF-8
        following = file.peek(1)[:1]
        if following and following[0] & 0xC0 == 0x80:
            file.read(1)
    return file.tell()


def read_text(path: Path, column: str, start: int, stop: int, position: int) -> Iterator[Document]:
    """Pieces of the file; the positions are offsets."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        stop = min(line_start(file, stop, PIECE), size)
        here = position or line_start(file, start, PIECE)
        while here < stop:
            after = min(line_start(file, here + PIECE, PIECE), stop)
            file.seek(here)
            text = file.read(after - here).decode(errors="replace")
            yield Document(text, after == size, after)
            here = after


def read_jsonl(path: Path, column: str, start: int, stop: int, position: int) -> Iterator[Document]:
    """A document a line; the positions are offsets."""
    with path.open("rb") as file:
        here = position or line_start(file, start)
        file.seek(here)
        while here < stop and (line := file.readline()):
            where = f"{path}, line at byte {here:,}"
            here += len(line)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: not JSON: {error}.") from None
            if not isinstance(row, dict):
                raise ValueError(f"{where}: not a JSON object but {line[:40]!r}.")
            # JSON can hold halves of surrogate pairs, and UTF-8 cannot.
            text = field(row, column, where).encode(errors="replace").decode()
            yield Document(text, True, here)


def read_parquet(path: Path, column: str, start: int, stop: int, rows: int) -> Iterator[Document]:
    """A document a row; the positions count rows. Row groups before the position stay unread."""
    with open_parquet(path) as file:
        field(dict.fromkeys(file.schema_arrow.names, ""), column, str(path))
        row = 0
        for group in range(file.num_row_groups):
            if rows >= row + file.metadata.row_group(group).num_rows:
                row += file.metadata.row_group(group).num_rows
                continue
            for batch in file.iter_batches(256, row_groups=[group], columns=[column]):
                for value in batch.slice(max(0, rows - row)).column(0).to_pylist():
                    rows = max(rows, row) + 1
                    yield Document(field({column: value}, column, str(path)), True, rows)
                row += len(batch)


READERS = {".txt": read_text, ".jsonl": read_jsonl, ".parquet": read_parquet}


def open_parquet(path: Path):
    try:
        return pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from None


def field(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise ValueError(
            f"--data.column {column} is not in {where}, where there are: {', '.join(row)}."
        )
    text = row[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"--data.column {column} of {where} is not text but {text!r:.40}.")
    return text


def open_hub(source: str, column: str, flag: str) -> dict[str, Corpus]:
    """The splits of hf:NAME or hf:NAME:CONFIG, by name."""
    import datasets  # which takes a second

    name, _, config = source.removeprefix("hf:").partition(":")
    try:
        splits = datasets.load_dataset(name, config or None, streaming=True)
    except (OSError, ValueError) as error:  # no network, no such dataset, no such configuration
        reason = " ".join(str(error).split())
        raise ValueError(f"{flag} {source} cannot be opened: {reason}") from None
    corpora = {}
    for split, dataset in splits.items():
        count = dataset.num_shards
        shards = [
            Shard(f"{split} {i}", functools.partial(read_hub, dataset, source, column, i))
            for i in range(count)
        ]
        files = [(f"{source} {split}", count, 0)]
        corpora[split] = Corpus(f"{source} ({split}, streamed)", shards, files, False)
    return corpora


def read_hub(dataset, source: str, column: str, index: int, rows: int) -> Iterator[Document]:
    """A document a row of one of the dataset's files; the positions count rows.

    Why not the dataset's own state_dict: with some releases it loses its place at a second resume
    (huggingface/datasets#8308), and skipping rows reads no more of the file than it does.
    """
    shard = dataset.shard(dataset.num_shards, index)
    for row in shard.skip(rows):
        rows += 1
        yield Document(field(row, column, source), True, rows)
