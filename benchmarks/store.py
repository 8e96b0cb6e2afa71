"""Results of a study in one file: a line for each member, sorted, and each member is made once.

    store = Store(RESULTS / "length.jsonl")
    execute(members, store, workers=2)
    store[members[0]].final

A worker takes the first member that is neither stored nor being made, by any process on this
machine. What is killed is begun anew by the next call, and all that had ended is kept.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import itertools
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

import gpa_optax
from benchmarks import corpus, processor
from benchmarks.ensemble import Member, Result, Workload, train

RESULTS = Path(__file__).parent / "results" / "evidence"
LOCKS = Path("runs/locks")
COMPILED = Path("runs/compiled")  # the programs of all workers


class Store:
    """The results in a file, which need not exist yet."""

    def __init__(self, path: Path):
        self.path = path
        self.read()

    def read(self) -> None:
        """Again, because other processes may have added some."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.records = {(record := json.loads(line))["identity"]: record for line in lines}

    def add(self, results: Iterable[Result]) -> None:
        with locked(self.path.stem):
            self.read()
            for result in results:
                self.records.setdefault(result.member.identity, as_record(result))
            lines = [json.dumps(self.records[identity]) + "\n" for identity in sorted(self.records)]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                file.writelines(lines)
            os.chmod(file.name, 0o644)
            os.replace(file.name, self.path)

    def __contains__(self, member: Member) -> bool:
        return member.identity in self.records

    def __getitem__(self, member: Member) -> Result:
        return from_record(self.records[member.identity])

    def __iter__(self) -> Iterator[Result]:
        return map(from_record, self.records.values())


def as_record(result: Result) -> dict[str, Any]:
    device = jax.devices()[0]
    hardware = f"one core of {processor()}" if device.platform == "cpu" else device.device_kind
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {
        "identity": result.member.identity,
        **result.member.changes(),
        "curve": {
            name: [round(value, 6) for value in values] for name, values in result.curve.items()
        },
        "final": round(result.final, 6) if math.isfinite(result.final) else None,
        "cpu_seconds": round(result.seconds, 1),
        "hardware": hardware,
        "versions": {"gpa-optax": gpa_optax.__version__, **packages},
        "date": datetime.date.today().isoformat(),
    }


def from_record(record: dict[str, Any]) -> Result:
    fields = {field.name for field in dataclasses.fields(Member)} & record.keys()
    values = {name: record[name] for name in fields}
    if "workload" in values:
        changed = dict(values["workload"])
        model = dataclasses.replace(Workload().model, **changed.pop("model", {}))
        values["workload"] = Workload(model, **changed)
    member = Member(**values)
    if member.identity != record["identity"]:
        raise ValueError(
            f"The stored member {record['identity']} would be {member.identity} now: a default has "
            "changed. Give the old default a new name, or store it in each line."
        )
    final = math.inf if record["final"] is None else record["final"]
    return Result(member, record["curve"], final, record["cpu_seconds"])


@contextlib.contextmanager
def locked(name: str, wait: bool = True) -> Iterator[bool]:
    """Whether this process has the lock, which the system takes back when the process ends."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    with (LOCKS / name).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def execute(
    members: Sequence[Member],
    store: Store,
    workers: int,
    folder: Path = corpus.FOLDER,
    at_y: bool = False,
    niceness: int = 19,
) -> None:
    """Makes the members that the store does not have yet, in their order, on a CPU.

    Args:
      members: the most important ones first.
      store: where each result is added as its member ends.
      workers: processes, each on a core of its own.
      folder: where the corpus is.
      at_y: whether to evaluate the params as well.
      niceness: of the workers; 19 leaves the machine to whatever else runs on it.
    """
    store.read()
    if all(member in store for member in members):
        return
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    how = {"parent": os.getpid(), "folder": folder, "at_y": at_y, "niceness": niceness}
    processes = [
        context.Process(target=work, args=(members, store.path, core), kwargs=how)
        for core in itertools.islice(itertools.cycle(cores), workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    store.read()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"Workers ended with exit status {failed}; what they told is above.")


def work(
    members: Sequence[Member],
    path: Path,
    core: int,
    *,
    parent: int,
    folder: Path,
    at_y: bool,
    niceness: int,
) -> None:
    """What a worker does; it ends after its member if its parent is gone."""
    os.sched_setaffinity(0, {core})
    os.nice(niceness)
    jax.config.update("jax_compilation_cache_dir", str(COMPILED.absolute()))
    tokens = functools.lru_cache(corpus.load)
    store = Store(path)
    for number, member in enumerate(members, start=1):
        if os.getppid() != parent:
            return
        with locked(f"{path.stem}-{member.identity}", wait=False) as mine:
            store.read()
            if not mine or member in store:
                continue
            workload = member.workload
            data = tokens(folder, workload.text, workload.model.vocab_size)
            [result] = train([member], data, at_y)
            store.add([result])
        print(
            f"{number:4}/{len(members)}  {told(member)}: {result.final:.4f} in "
            f"{result.seconds:.0f} s",
            flush=True,
        )


def told(member: Member) -> str:
    """A member in a line."""
    changed = {k: v for k, v in member.changes().items() if k not in ("optimizer", "knobs")}
    parts = {**changed, **dict(member.knobs)}
    return f"{member.optimizer}, " + ", ".join(f"{k} {v}" for k, v in parts.items())
