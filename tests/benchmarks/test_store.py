"""The store of the studies: nothing is lost, nothing is made twice."""

import dataclasses
import functools
import hashlib
import json
import lzma
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import ROOT
from helpers.needs import needs

needs("flax")

from benchmarks import store
from benchmarks.ensemble import Member, Result
from benchmarks.members import MEMBERS, train_member
from benchmarks.store import make
from benchmarks.workloads import Workload
from examples.llama.model import LlamaConfig

pytestmark = pytest.mark.processes

SMALL = Workload(
    LlamaConfig(257, dim=16, layers=1, heads=2, kv_heads=1, hidden=32), length=16, batch_size=4
)
RUNS = [
    Member(name, 50, seed, rate, knobs=knobs, workload=SMALL)
    for name, knobs in (("annealed", {"window": 0.1}), ("adamw", {}))
    for rate in (1e-2, 3e-2)
    for seed in (0, 1)
]


TRAIN = functools.partial(train_member, folder=Path("runs/corpus"))
Store = functools.partial(store.Store, kind=MEMBERS)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder, with a small corpus in runs/corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "runs/corpus"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    stream = (np.cumsum(rng.random(20_000) < 0.9) % 50).astype("<u2")
    (folder / "python-257.xz").write_bytes(lzma.compress(stream.tobytes()))
    about = {"sha256": hashlib.sha256(stream).hexdigest(), "vocab_size": 257}
    about["train"] = {"tokens": 10_000}
    (folder / "python-257.json").write_text(json.dumps(about))
    return tmp_path


def result(member, final=2.5):
    return Result(member, {"step": [25, 50], "loss": [3.0000001, final]}, final, 1.23)


def decisive(path):
    """The lines of a store without what differs from run to run."""
    records = map(json.loads, path.read_text().splitlines())
    return [{k: v for k, v in record.items() if k != "cpu_seconds"} for record in records]


def test_what_is_stored_comes_back(elsewhere):
    kept = Store(elsewhere / "study.jsonl")
    members = [Member("adamw", 50, 0, 1e-2), *RUNS]
    for member in members:
        kept.add([result(member)])
    kept.add([result(dataclasses.replace(RUNS[0], seed=9), math.inf)])
    again = Store(elsewhere / "study.jsonl")
    for member in members:
        assert again[member].member == member
        assert again[member].final == 2.5
        assert again[member].curve["loss"] == [3.0, 2.5]
    assert again[dataclasses.replace(RUNS[0], seed=9)].final == math.inf
    assert dataclasses.replace(RUNS[0], seed=10) not in again
    lines = (elsewhere / "study.jsonl").read_text().splitlines()
    identities = [json.loads(line)["identity"] for line in lines]
    assert identities == sorted(identities)
    assert '"workload"' not in next(line for line in lines if members[0].identity in line)


def test_two_stores_of_one_file_lose_nothing_of_each_other(elsewhere):
    first, second = Store(elsewhere / "study.jsonl"), Store(elsewhere / "study.jsonl")
    first.add([result(RUNS[0])])
    second.add([result(RUNS[1])])
    second.add([result(RUNS[0], final=9.0)])  # made a second time: the first one counts
    first.read()
    assert RUNS[1] in first
    assert first[RUNS[0]].final == 2.5


def test_a_default_that_changed_since_is_an_error(elsewhere, monkeypatch):
    kept = Store(elsewhere / "study.jsonl")
    kept.add([result(RUNS[0])])
    line = json.loads(kept.paths[0].read_text())
    line["knobs"] = {"window": 0.05}  # as if that were the default now
    kept.paths[0].write_text(json.dumps(line))
    with pytest.raises(ValueError, match=r"would be .* now: a default has changed"):
        Store(kept.paths[0])[RUNS[0]]


def test_what_another_process_makes_is_left_to_it(elsewhere):
    with store.locked("study-a") as mine, store.locked("study-a", wait=False) as second:
        assert mine
        assert not second
    with store.locked("study-a", wait=False) as third:
        assert third


def test_a_study_that_is_killed_resumes_and_makes_nothing_twice(elsewhere, capfd):
    whole, cut = (Store(elsewhere / f"{name}.jsonl") for name in ("whole", "cut"))
    make(whole, RUNS, 1, TRAIN, niceness=0)
    assert len(decisive(whole.paths[0])) == len(RUNS)

    code = (
        "from pathlib import Path\n"
        "import sys\n"
        f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(ROOT / 'tests')!r}]\n"
        "if __name__ == '__main__':\n"
        "    from test_store import RUNS, TRAIN, Store, make\n"
        "    make(Store(Path('cut.jsonl')), RUNS, 2, TRAIN, niceness=0)\n"
    )
    Path("study.py").write_text(code)
    process = subprocess.Popen([sys.executable, "study.py"], start_new_session=True)
    while len(Store(cut.paths[0]).records) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = cut.paths[0].read_text().splitlines()
    assert 2 <= len(before) < len(RUNS)
    capfd.readouterr()
    make(cut, RUNS, 2, TRAIN, niceness=0)
    made = capfd.readouterr().out.splitlines()
    assert len(made) == len(RUNS) - len(before)
    assert all("50" in line and " in " in line for line in made)
    assert decisive(cut.paths[0]) == decisive(whole.paths[0])
    assert set(before) <= set(cut.paths[0].read_text().splitlines())
    written = cut.paths[0].stat().st_mtime_ns
    make(cut, RUNS, 1, TRAIN, niceness=0)
    assert cut.paths[0].stat().st_mtime_ns == written
