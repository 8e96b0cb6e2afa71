"""Resumes the studies of `benchmarks.studies`, the most important first.

python -m benchmarks.evidence                      # all of them, for many hours

python -m benchmarks.evidence blocks length --workers 1

Each run is made once, and is stored in benchmarks/results/evidence when it ends. A study that was
stopped resumes where it was. The studies need the corpus (`python -m benchmarks.corpus`); runs on
data that are not there are left out and listed.
"""

import argparse
import functools
import os
import sys
from pathlib import Path

from benchmarks import corpus
from benchmarks.ensemble import Member
from benchmarks.members import MEMBERS, train_member
from benchmarks.store import RESULTS, Store, make
from benchmarks.studies import STUDIES, missing

STORE = RESULTS / "evidence" / "llama.jsonl"


def next_members(store: Store, names: list[str], folder: Path) -> list[Member]:
    """The runs to make next whose data are there; prints which data are missing."""
    members = missing(store, names)
    lacking = [member.workload.lacks(folder) for member in members]
    for name in sorted({name for name in lacking if name}):
        print(f"Left out: the runs that need {folder / name}, which does not exist.")
    return [member for member, name in zip(members, lacking, strict=True) if not name]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("studies", nargs="*", help=f"of {', '.join(STUDIES)}; default: all")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=corpus.FOLDER, help="of the corpus")
    flags = parser.parse_args()
    if unknown := set(flags.studies) - {*STUDIES}:
        parser.error(
            f"there is no study {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}."
        )
    store = Store(STORE, kind=MEMBERS)
    train = functools.partial(train_member, folder=flags.folder)
    while members := next_members(store, flags.studies or [*STUDIES], flags.folder):
        print(f"{len(members)} runs can be made now, {len(store.records)} are stored.")
        # A few at a time: what is tuned first decides which runs are worth most.
        make(store, members[: 4 * flags.workers], flags.workers, train)
    return 0


if __name__ == "__main__":
    sys.exit(main())
