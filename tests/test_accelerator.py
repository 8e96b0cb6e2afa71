"""The measurements for a GPU: rehearsed on the CPU, and compiled for an H100 that is not here."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("tyro")  # of the examples, whose versions of jax and flax these need
from test_costs import needs_cuda_plugin, programs_are_not_stored  # noqa: F401

from benchmarks.accelerator import __main__ as command
from benchmarks.accelerator import right, step, timing, update, worker
from benchmarks.accelerator.results import Results
from benchmarks.kernels import in_place, kernels
from planning.machines import compile_for, find

ROOT = Path(__file__).parent.parent
PARTS = list(worker.PARTS)
# What a machine with a GPU may lack. flax and torch try some of it; this repository must not.
LACKING = """
import builtins, sys

ABSENT = {"grain", "matplotlib", "tensorboard", "tensorboardX", "tyro"}
OURS = {"benchmarks", "examples", "gpa_optax", "planning"}
NOT_OURS = ABSENT | {"PIL", "orbax", "pyarrow", "rich", "safetensors", "sklearn"}

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def checked(name, globals=None, locals=None, fromlist=(), level=0, original=builtins.__import__):
    importer = str((globals or {}).get("__name__")).partition(".")[0]
    if importer in OURS and level == 0 and name.partition(".")[0] in NOT_OURS:
        raise ModuleNotFoundError(f"{importer} imports {name}", name=name)
    return original(name, globals, locals, fromlist, level)

sys.meta_path.insert(0, Absent())
builtins.__import__ = checked
"""


def run(*flags, lacking=None, status=0):
    """The command in a process of its own; what it said."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    if lacking:
        environment["PYTHONPATH"] = str(lacking)
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", *map(str, flags)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def stored(folder, part):
    (path,) = folder.glob(f"{part}-*.json")
    return path, json.loads(path.read_text())


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """The folder of a whole rehearsal, and what it said."""
    lacking = tmp_path_factory.mktemp("lacking")
    (lacking / "sitecustomize.py").write_text(LACKING)
    folder = tmp_path_factory.mktemp("rehearsed")
    return folder, run("--quick", "--out", folder, lacking=lacking)


def test_the_blocked_imports_are_blocked(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(LACKING)
    for code in ("import tyro", "import examples.config", "import examples.plots"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert "ModuleNotFoundError" in done.stderr, code


@pytest.mark.parametrize("part", PARTS)
def test_a_rehearsal_needs_no_more_than_jax_optax_flax_and_numpy(part, rehearsed):
    folder, said = rehearsed
    _, content = stored(folder, part)
    assert list(content["measurements"]) == worker.PARTS[part].measurements(quick=True)
    assert content["left_out"] == []
    assert content["quick"]
    assert content["device"]["platform"] == "cpu"
    assert content["versions"]["jax"] == jax.__version__
    for name, found in content["measurements"].items():
        assert "failed" not in found, found
        assert f"{part:<6}  {name} ..." in said


def test_the_rehearsal_is_right(rehearsed):
    _, content = stored(rehearsed[0], "right")
    assert len(content["bars"]) == 2 * len(right.BASES)
    for base in right.BASES:
        for case in content["measurements"][base]["cases"]:
            assert case["same_bits"]
            assert all(0 < case["errors"][name] < right.TOLERANCE for name in "xyz")
    for row in content["measurements"][right.KERNELS]["updates"].values():
        # On the CPU several a leaf; as many run as the program has.
        assert row["ran"] == row["compiled"] > row["leaves"]


def test_the_rehearsal_measures_every_update(rehearsed):
    _, content = stored(rehearsed[0], "update")
    for name, found in content["measurements"].items():
        planned = update.expected(name, None)
        assert found["updates"].keys() | found["failed_updates"].keys() == planned.keys()
        for failed in found["failed_updates"]:
            assert failed.startswith("torch")
            assert not importlib.util.find_spec("torch")
        for row in found["updates"].values():
            low, median, high = row["seconds"]
            assert 0 < low <= median <= high
            assert row["share_of_copy"] > 0
    rows = content["measurements"]["adamw, tiny, float32"]["updates"]
    assert rows["optax.adamw"]["ratio"] == [1, 1, 1]
    scalars = 1e-3
    for name, least in {"optax.adamw": 28, "gpa(adamw)": 36, "gpa_adamw, b1=0": 28}.items():
        assert rows[name]["bytes_per_param"] == pytest.approx(least, rel=scalars)
    # Slow weights, their momentum: 16 bytes more in each 32nd update.
    assert rows["single_worker_diloco"]["bytes_per_param"] == pytest.approx(28.5, rel=scalars)


def test_the_rehearsal_measures_steps(rehearsed):
    _, content = stored(rehearsed[0], "step")
    (found,) = content["measurements"].values()
    assert found["steps"].keys() == {step.BACKWARD, *step.OPTIMIZERS}
    for row in found["steps"].values():
        tokens = found["sequences"] * found["length"]
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"][1])
        assert row["memory_by_analysis"] > 0
    assert found["profiles"]["AdamW"]["kernels"] > 0


def test_what_was_measured_is_not_measured_again(rehearsed):
    path, before = stored(rehearsed[0], "right")
    assert "measured before" not in rehearsed[1]
    del before["measurements"]["sgd"]
    path.write_text(json.dumps(before))
    said = run("--quick", "--out", rehearsed[0], "--parts", "right")
    assert said.count("measured before") == len(right.measurements(quick=True)) - 1
    assert "sgd ..." in said
    _, after = stored(rehearsed[0], "right")
    assert after["measurements"].pop("sgd")["cases"]
    assert after["measurements"] == before["measurements"]


@pytest.mark.parametrize("other", [{"code": "other"}, {"quick": False}, {"versions": {}}])
def test_results_of_something_else_are_measured_anew(other, tmp_path):
    results = Results(tmp_path, "right", quick=True, again=False)
    results.add("sgd", {"cases": []})
    assert Results(tmp_path, "right", quick=True, again=False).measurements.keys() == {"sgd"}
    assert not Results(tmp_path, "right", quick=True, again=True).measurements
    results.path.write_text(json.dumps(results.content | other))
    assert not Results(tmp_path, "right", quick=True, again=False).measurements


def test_what_failed_is_measured_again(tmp_path):
    results = Results(tmp_path, "right", quick=True, again=False)
    results.add("sgd", {"failed": "out of memory"})
    assert not Results(tmp_path, "right", quick=True, again=False).measurements


def test_a_part_stops_after_the_measurement_in_hand(tmp_path, capsys):
    now = time.time()
    worker.work("right", tmp_path, True, False, now, deadline=now + 0.5)
    _, content = stored(tmp_path, "right")
    assert list(content["measurements"]) == ["sgd"]
    assert content["left_out"] == right.measurements(quick=True)[1:]
    assert "no time was left for: adamw; lion; muon; kernels" in capsys.readouterr().out


def test_the_parts_share_the_time_and_one_that_does_not_end_is_stopped(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "GRACE", 0.1)
    flags = ["--quick", "--minutes", "0", "--out", str(tmp_path), "--parts", "right", "step"]
    monkeypatch.setattr(sys, "argv", ["accelerator", *flags])
    monkeypatch.setenv(command.MEMORY, "0.5")
    start = time.time()
    assert command.main() == 1
    assert time.time() - start < 5
    said = capsys.readouterr().out
    assert said.count("stopped: it did not end in time") == 2


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path):
    said = run("--parts", "step", "--out", tmp_path, status=1)
    assert "--quick rehearses all of it on a CPU" in said
    assert not list(tmp_path.iterdir())


def test_a_missed_bar_is_reported_as_missed(rehearsed):
    _, content = stored(rehearsed[0], "update")
    found = {"adamw, 160m, float32": content["measurements"]["adamw, tiny, float32"]}
    rows = found["adamw, 160m, float32"]["updates"]
    rows["gpa(adamw)"] |= {"ratio": [1.3, 1.31, 1.4], "share_of_copy": 0.91}
    rows["torch's AdamW, fused"] = {"ratio": [0.9, 0.99, 1.0]}
    ratio, share, torch = update.bars(found)
    assert (ratio.met, share.met, torch.met) == (False, True, False)
    assert str(ratio) == (
        "MISSED: gpa(adamw) / optax.adamw, 160m, float32 is 1.31, at most 1.3 wanted"
    )
    assert str(share).startswith("met: gpa(adamw) / a copy's bandwidth")
    assert ratio.to_json() == {
        "what": "gpa(adamw) / optax.adamw, 160m, float32",
        "limit": 1.30, "measured": 1.31, "at_most": True, "essential": False, "met": False,
    }  # fmt: skip
    # Time is no mistake.
    assert not worker.wrong([ratio, share, torch])


def test_a_trajectory_that_is_wrong_is_a_mistake(rehearsed):
    _, content = stored(rehearsed[0], "right")
    case = content["measurements"]["lion"]["cases"][0]
    assert not worker.wrong(right.bars_of_a_base("lion", [case]))
    for change in ({"errors": {"x": 3e-5}}, {"same_bits": False}):
        bars = right.bars_of_a_base("lion", [case | change])
        assert worker.wrong(bars)
        assert any("MISSED" in str(bar) for bar in bars)


def test_params_may_differ_by_their_own_rounding_and_by_no_more():
    for error, met in ((0.0078, True), (0.0079, False)):
        case = {"errors": {"params": error}, "dtype": "bfloat16", "same_bits": True}
        assert right.bars_of_a_base("sgd", [case])[0].met == met


class Slow:
    """Something that takes so long, or fails."""

    def __init__(self, name, seconds=0.0, error=None, multiple=1):
        self.name, self.seconds, self.error, self.multiple = name, seconds, error, multiple
        self.runs, self.turns, self.held = 0, [], False

    def prepare(self):
        self.held = True
        self.runs = 0

    def run(self):
        self.runs += 1
        if self.error:
            raise self.error
        time.sleep(self.seconds)

    def wait(self):
        pass

    def release(self):
        self.held = False
        self.turns.append(self.runs)


def test_in_turns_each_has_as_many_runs_as_fill_its_row():
    one, other = Slow("one", 0.001), Slow("other", 0.004, multiple=8)
    times, failed = timing.take_turns([one, other], rounds=4, row=0.04, deadline=time.time() + 60)
    assert not failed
    assert [len(found) for found in times.values()] == [4, 4]
    assert 0.001 < min(times["one"]) < 0.003
    assert 0.004 < min(times["other"]) < 0.008
    assert (other.turns[-1] - timing.WARM_UP) % 8 == 0
    assert not one.held
    assert not other.held


def test_one_that_fails_does_not_stop_the_others_and_says_why():
    memory = Slow("memory", error=RuntimeError("RESOURCE_EXHAUSTED: Out of memory, 9 GiB"))
    other = Slow("other", error=ModuleNotFoundError("No module named 'torch'"))
    times, failed = timing.take_turns([memory, other, Slow("fine")], 3, 0.001, time.time() + 60)
    assert times.keys() == {"fine"}
    assert failed == {
        "memory": "out of memory",
        "other": "ModuleNotFoundError: No module named 'torch'",
    }
    assert not memory.held


def test_after_the_deadline_there_are_three_rounds():
    times, _ = timing.take_turns([Slow("one")], rounds=9, row=0.001, deadline=time.time())
    assert len(times["one"]) == 3


def test_a_batch_that_does_not_fit_is_halved(monkeypatch):
    tried, original = [], step.compiled

    def compiled(measurement):
        tried.append(measurement)
        if "4 sequences" in measurement:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return original(measurement)

    monkeypatch.setattr(step, "compiled", compiled)
    found = step.measure("tiny, 4 sequences", True, None, time.time())
    assert tried == ["tiny, 4 sequences", "tiny, 2 sequences"]
    assert found["sequences"] == 2


def test_a_copy_and_a_product_are_what_they_say():
    copy, product = timing.copy_of(4096), timing.product_of(64)
    for one in (copy, product):
        one.prepare()
        before = one.arguments[0]
        one.run()
        after = one.results[0]
        assert after.unsafe_buffer_pointer() != before.unsafe_buffer_pointer()
    assert copy.results[0].nbytes == 4096
    assert jnp.allclose(product.results[0], before @ product.rest[0], atol=0.1)


@pytest.mark.usefixtures("programs_are_not_stored")
@needs_cuda_plugin
class TestOnAnH100:
    """By its compiler, which runs on any CPU."""

    @staticmethod
    def compiled(jitted, arguments):
        target = find("h100:1")
        found = compile_for(target, jitted, *arguments)
        memory = found.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        assert needed < target.memory * 2**30
        return found

    @pytest.mark.parametrize("name", [n for n in update.measurements(False) if "adamw" in n])
    def test_an_update_is_one_kernel_a_leaf(self, name):
        jitted, arguments = update.programs(name)[update.GPA]
        found = self.compiled(jitted, arguments)
        hlo = found.as_text()
        assert kernels(hlo).number == len(jax.tree.leaves(arguments[2]))
        assert in_place(hlo) == 1
        assert found.memory_analysis().temp_size_in_bytes < 64 * 1024
        moved = update.expected(name, None)[update.GPA]["bytes"]
        assert kernels(hlo).bytes == pytest.approx(moved, rel=1e-4)

    def test_a_step_fits(self):
        (name,) = step.measurements(quick=False)
        self.compiled(*step.programs(name)["GPA-AdamW"])

    @pytest.mark.long
    @pytest.mark.parametrize("part", PARTS)
    def test_every_program_compiles(self, part):
        module = worker.PARTS[part]
        for name in module.measurements(quick=False):
            if name != right.KERNELS:  # those of updates
                for jitted, arguments in module.programs(name).values():
                    self.compiled(jitted, arguments)
        if part == "update":
            large = jax.ShapeDtypeStruct((2**30,), jnp.float32)
            self.compiled(timing.COPY, (large,))
        if part == "step":
            matrix = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
            self.compiled(timing.PRODUCT, (matrix, matrix))
