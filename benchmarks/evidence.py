"""Resumes the studies of `benchmarks.studies`, the most important first.

python -m benchmarks.evidence                      # all of them, for many hours

python -m benchmarks.evidence blocks length --workers 1

Each run is made once, and is stored in benchmarks/results/evidence when it ends. A study that was
stopped resumes where it was. The studies need the corpus (`python -m benchmarks.corpus`); runs on a
corpus that is not there are left out and listed.
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
    """The runs to make next whose corpus is there; prints which corpora are missing."""
    members = missing(store, names)
    made, lacking = [], set()
    for member in members:
        name = f"{member.workload.text}-{member.workload.model.vocab_size}"
        if (folder / f"{name}.json").exists():
            made.append(member)
        else:
            lacking.add(name)
    for name in sorted(lacking):
        print(f"Left out: the runs on {name}, which is not in {folder}.")
    return made


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
