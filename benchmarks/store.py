"""The runs of studies in JSONL files: a line for each run, sorted, and each run is made once.

    store = Store(RESULTS / "evidence" / "llama.jsonl", kind=MEMBERS)
    make(store, members, workers=2, train=functools.partial(train_member, folder=corpus.FOLDER))
    store[members[0]].final

The kinds of runs are defined in members.py and runs.py.

A study is a plain function that looks up its runs by `results_of`, which raises `Missing` with
those that have not been made yet. A worker takes the first run that is neither stored nor being
made by any process on this machine. Runs that were killed are started again by the next call, and
runs that had ended are kept.
"""

import contextlib
import datetime
import fcntl
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

import gpa_optax
from benchmarks import processor
from examples.files import write_whole

RESULTS = Path(__file__).parent / "results"
LOCKS = Path("runs/locks")
PATIENCE = 30.0  # seconds to wait where all runs are being made elsewhere
COMPILED = Path("runs/compiled")  # the programs of all workers


def measured(name: str) -> Any:
    """What a benchmark that has one file of results measured; None if it was not run yet."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


class Kind(NamedTuple):
    """What a store holds, and how a line records it. A run is what is known before it is made, a
    result what is known afterwards."""

    identity: Callable[[Any], str]
    """Runs with equal identities are the same run."""
    record: Callable[[Any], dict[str, Any]]
    """What a line says of a result, besides its machine, versions and date."""
    result: Callable[[dict[str, Any]], tuple[Any, Any]]
    """The run and the result in a line."""
    told: Callable[[Any], str]
    """A result, for the console."""


class Store:
    """The results in files, which need not exist yet.

    If there are several files, a line is in the one named after its "workload".
    """

    def __init__(self, *paths: Path, kind: Kind):
        self.paths, self.kind = paths, kind
        self.read()

    @property
    def name(self) -> str:
        """Of its locks."""
        path = self.paths[0].absolute()
        return f"{path.parent.name}-{path.stem}"

    def read(self) -> None:
        """Reads the files again, because other processes may have added results."""
        lines = [line for p in self.paths if p.exists() for line in p.read_text().splitlines()]
        self.records = {(record := json.loads(line))["identity"]: record for line in lines}

    def add(self, results: Iterable[Any]) -> None:
        with locked(self.name):
            self.read()
            for record in map(self.kind.record, results):
                self.records.setdefault(record["identity"], record | circumstances())
            for path in self.paths:
                lines = [
                    json.dumps(self.records[identity]) + "\n"
                    for identity in sorted(self.records)
                    if self.path_of(self.records[identity]) == path
                ]
                if lines:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_whole(path, "".join(lines))

    def path_of(self, record: Mapping[str, Any]) -> Path:
        named = [path for path in self.paths if path.stem == record.get("workload")]
        return (*named, self.paths[0])[0]

    def __contains__(self, run: Any) -> bool:
        return self.kind.identity(run) in self.records

    def __getitem__(self, run: Any) -> Any:
        return self.decoded(self.records[self.kind.identity(run)])

    def __iter__(self) -> Iterator[Any]:
        return map(self.decoded, self.records.values())

    def decoded(self, record: dict[str, Any]) -> Any:
        run, result = self.kind.result(record)
        if (identity := self.kind.identity(run)) != record["identity"]:
            raise ValueError(
                f"The stored run {record['identity']} would be {identity} now: a default has "
                "changed. Give the old default a new name, or store it in each line."
            )
        return result


def circumstances() -> dict[str, Any]:
    """Where and when a run is made, and with what."""
    device = jax.devices()[0]
    packages = {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    cpu = device.platform == "cpu"
    return {
        "hardware": f"one core of {processor()}" if cpu else device.device_kind,
        "versions": {"gpa-optax": gpa_optax.__version__, **packages},
        "date": datetime.date.today().isoformat(),
    }


def rounded(curve: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: [round(value, 6) for value in values] for name, values in curve.items()}


class Missing(Exception):
    """Runs that a study needs and that have not been made yet, the most important first."""

    def __init__(self, runs: Sequence[Any]):
        super().__init__(f"{len(runs)} runs are missing")
        self.runs = runs


def results_of(store: Any, runs: Iterable[Any]) -> list[Any]:
    """The results of runs.

    Raises:
      Missing: if the store lacks some, each once.
    """
    runs = list(runs)
    if missing := dict.fromkeys(run for run in runs if run not in store):
        raise Missing([*missing])
    return [store[run] for run in runs]


def together(studies: Mapping[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """What several studies return, by name; raises all that is missing in any of them."""
    outcomes, missing = {}, []
    for name, study in studies.items():
        try:
            outcomes[name] = study()
        except Missing as more:
            missing += more.runs
    if missing:
        raise Missing(missing)
    return outcomes


def settled(study: Callable[..., Any], *arguments: Any) -> Any:
    """What a study returns, or None while it needs runs that are not there."""
    try:
        return study(*arguments)
    except Missing:
        return None


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


def make(
    store: Store,
    runs: Sequence[Any],
    workers: int,
    train: Callable[[Any], Any],
    niceness: int = 19,
) -> None:
    """Makes the runs that the store does not have yet, in their order, on a CPU.

    Args:
      store: where each result is added as its run ends.
      runs: the most important ones first.
      workers: processes, each on a core of its own.
      train: returns the result of a run; a function of a module, since other processes call it.
      niceness: of the workers; 19 leaves the machine to whatever else runs on it.
    """
    store.read()
    if all(run in store for run in runs):
        return
    before = len(store.records)
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    how = {"parent": os.getpid(), "train": train, "niceness": niceness}
    processes = [
        context.Process(target=work, args=(store.paths, store.kind, runs, core), kwargs=how)
        for core in itertools.islice(itertools.cycle(cores), workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    store.read()
    if failed := [process.exitcode for process in processes if process.exitcode]:
        raise RuntimeError(f"Workers ended with exit status {failed}; their output is above.")
    if len(store.records) == before:  # other processes are making all of them
        time.sleep(PATIENCE)


def work(
    paths: Sequence[Path],
    kind: Kind,
    runs: Sequence[Any],
    core: int,
    *,
    parent: int,
    train: Callable[[Any], Any],
    niceness: int,
) -> None:
    """The loop of a worker; it ends after its present run if its parent is gone."""
    os.sched_setaffinity(0, {core})
    os.nice(niceness)
    jax.config.update("jax_compilation_cache_dir", str(COMPILED.absolute()))
    store = Store(*paths, kind=kind)
    for number, run in enumerate(runs, start=1):
        if os.getppid() != parent:
            return
        with locked(f"{store.name}-{kind.identity(run)}", wait=False) as mine:
            store.read()
            if not mine or run in store:
                continue
            result = train(run)
            store.add([result])
        print(f"{number:4}/{len(runs)}  {kind.told(result)}", flush=True)
