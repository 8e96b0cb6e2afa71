"""Digests of a checkpoint's files.

Orbax restores garbled arrays without complaint, so files are checked against their digests before
anything reads them.
"""

import concurrent.futures
import hashlib
import json
from pathlib import Path

from orbax.checkpoint.path import atomicity

DIGESTS = "digests.json"
# Orbax writes these two files after all the others. They record when that was, and nothing is
# restored from them.
LAST = ("_CHECKPOINT_METADATA", "commit_success.txt")


class DamagedError(ValueError):
    """A checkpoint that must not be restored."""


class WithDigests(atomicity.AtomicRenameTemporaryPath):
    """The folder that a checkpoint, or an item of it, is written in. When everything is written,
    the process that renames it adds the digests: a checkpoint without them was never complete."""

    async def finalize(self) -> None:
        if self.get_final().name.isdecimal():  # a step, not an item
            folder = Path(self.get())
            (folder / DIGESTS).write_text(json.dumps(digests(folder), indent=1) + "\n")
        await super().finalize()


def digests(folder: Path, item: str = "") -> dict[str, str]:
    """SHA-256 of each file that a restored checkpoint depends on, by its path in the folder; for
    all items, or for one.

    Files are hashed, not arrays: so the position in the data has a digest too, and the check is the
    same whatever devices and processes write or read the arrays.
    """
    files = (path for path in (folder / item).rglob("*") if path.is_file())
    names = sorted(str(path.relative_to(folder)) for path in files)
    names = [name for name in names if name not in (DIGESTS, *LAST)]

    def digest(name: str) -> str:
        with (folder / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with concurrent.futures.ThreadPoolExecutor() as pool:  # hashing lets other threads run
        return dict(zip(names, pool.map(digest, names), strict=True))


def check_digests(folder: Path, item: str = "") -> None:
    """Checks the digests of all files, or of one item's."""

    def damaged(why: str) -> DamagedError:
        return DamagedError(f"The checkpoint {folder} is damaged: {why}.")

    try:
        wanted = json.loads((folder / DIGESTS).read_bytes())
        wanted = {name: digest for name, digest in wanted.items() if name.startswith(item)}
    except FileNotFoundError:
        raise damaged(f"it has no {DIGESTS}, which is written when all the rest is") from None
    except (ValueError, AttributeError):
        raise damaged(f"its {DIGESTS} is not what was written") from None
    found = digests(folder, item)
    for name in sorted(wanted.keys() | found.keys()):
        if name not in found:
            raise damaged(f"its file {name} is missing")
        if found[name] != wanted.get(name):
            size = (folder / name).stat().st_size
            raise damaged(f"its file {name} ({size:,} bytes) is not what was written")
