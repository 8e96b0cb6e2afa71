"""The measurements for a GPU: rehearsed on the CPU, and compiled for an H100 that is not here."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tyro")  # of the examples, whose versions of jax and flax these need
from benchmarks import ensemble
from benchmarks.accelerator import __main__ as command
from benchmarks.accelerator import gain, right, step, tables, timing, update, worker
from benchmarks.accelerator.plan import Conditions, LeftOut
from benchmarks.accelerator.results import Results
from benchmarks.kernels import in_place, kernels
from benchmarks.members import MEMBERS
from benchmarks.store import Store
from benchmarks.studies import TUNING
from benchmarks.updates import entries, shapes
from helpers import ROOT, environment
from helpers.needs import needs_cuda_plugin
from planning.machines import compile_for, find

pytestmark = pytest.mark.processes

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
    paths = {"PYTHONPATH": str(lacking)} if lacking else {}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator", *map(str, flags)],
        cwd=ROOT,
        env=environment() | paths,
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
    # On a machine that does other things as well, 8 minutes may be too few for all parts.
    return folder, run("--quick", "--minutes", 30, "--out", folder, lacking=lacking)


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
    assert content["left_out"] == {}
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
        # On the CPU several per leaf; as many run as the program has.
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


def test_where_what_they_compare_with_fails_the_times_still_count(tmp_path, monkeypatch):
    def out_of_memory():
        raise MemoryError("out of memory")

    def some(measurement, original=update.optax_updates):
        found = original(measurement, only=(update.ADAMW, update.GPA))
        monkeypatch.setattr(found[0], "prepare", out_of_memory)
        return found

    copy = SimpleNamespace(name="copy", multiple=1, prepare=out_of_memory, release=lambda: None)
    monkeypatch.setattr(timing, "copy_of", lambda size: copy)
    monkeypatch.setattr(update, "optax_updates", some)
    monkeypatch.setattr(update, "TORCH_ADAMW", ())
    under = Conditions(tmp_path, tmp_path, True, None, time.time() + 60, print)
    found = {"adamw, tiny, float32": update.measure("adamw, tiny, float32", under)}
    (result,) = found.values()
    assert result["failed_updates"].keys() == {"copy", update.ADAMW}
    assert result["updates"].keys() == {update.GPA}
    assert result["updates"][update.GPA]["seconds"][1] > 0
    assert update.bars(found) == []
    assert update.GPA in update.told(result)


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
    worker.work("right", tmp_path, tmp_path, True, False, now, deadline=now + 0.5)
    _, content = stored(tmp_path, "right")
    assert list(content["measurements"]) == ["sgd"]
    others = right.measurements(quick=True)[1:]
    assert content["left_out"] == dict.fromkeys(others, "no time was left")
    assert "left out: kernels: no time was left" in capsys.readouterr().out


def test_the_parts_share_the_time_and_one_that_does_not_end_is_stopped(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "GRACE", 0.1)
    flags = ["--quick", "--minutes", "0", "--out", str(tmp_path), "--parts", "right", "step"]
    monkeypatch.setattr(sys, "argv", ["accelerator", *flags])
    monkeypatch.setenv(command.MEMORY[0], "0.5")
    start = time.time()
    assert command.main() == 1
    assert time.time() - start < 5
    said = capsys.readouterr().out
    assert said.count("stopped: it did not end in time") == 2


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path):
    said = run("--parts", "step", "update", "--out", tmp_path, status=worker.NO_GPU)
    assert said.count("--quick rehearses all of it on a CPU") == 1
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


def test_the_rehearsal_trains_members_and_stores_each(rehearsed):
    folder, said = rehearsed
    _, content = stored(folder, "gain")
    ((name, found),) = content["measurements"].items()
    made = Store(folder / gain.FILE, kind=MEMBERS)
    some = gain.USUAL, gain.LONGER, gain.FORMS[0]
    wanted = [member for one in some for member in gain.members(name, one, gain.SEEDS[:4])]
    assert {member.identity for member in wanted} == made.records.keys()
    assert found["members"] == len(wanted) == 24
    for member in wanted:
        result = made[member]
        assert result.member == member
        assert result.curve["loss"][0] > result.curve["loss"][-1] > 1
    for row in found["contrasts"].values():
        assert f"{row['final']:.4f} at a learning rate of {row['learning_rate']:.3g}" in said


def test_members_are_never_made_twice(rehearsed, tmp_path, monkeypatch):
    path = rehearsed[0] / gain.FILE
    *kept, last = path.read_text().splitlines()  # a line for each
    (tmp_path / gain.FILE).write_text("".join(line + "\n" for line in kept))
    trained, original = [], ensemble.train_group

    def train_group(group, *rest, **how):
        trained.extend(group)
        return original(group, *rest, **how)

    monkeypatch.setattr(ensemble, "train_group", train_group)
    for _ in range(2):
        under = Conditions(tmp_path, tmp_path, True, None, time.time() + 600, print)
        found = gain.measure("4k, 50 steps", under)
    assert [member.identity for member in trained] == [json.loads(last)["identity"]]
    assert not found["partial"]
    [again] = trained
    # Alone it is another program, whose rounding the later steps amplify.
    before, now = (
        Store(folder / gain.FILE, kind=MEMBERS)[again] for folder in (path.parent, tmp_path)
    )
    assert now.curve["loss"][0] == pytest.approx(before.curve["loss"][0], abs=1e-4)
    assert now.curve["loss"][-1] == pytest.approx(before.curve["loss"][-1], abs=0.1)


def test_as_many_seeds_are_begun_as_there_is_time_for(tmp_path):
    name, peaks = "0.125M, 1,000 steps", None
    here = gain.Training(Store(tmp_path / gain.FILE, kind=MEMBERS), gain.rehearsal())
    whole = gain.groups(name, 8)
    assert [len(group) for group in whole] == [32] * 5
    takes = sum(here.seconds(group, peaks) for group in whole)
    for part, seeds in ((1.01, 8), (0.51, 4), (0.26, 2)):
        assert here.plan(name, part * takes, peaks) == gain.groups(name, seeds)
    # Not all of the fewest, and none.
    assert here.plan(name, 0.13 * takes, peaks) == gain.groups(name, 2)[:2]
    assert here.plan(name, 0.01 * takes, peaks) == []
    # What a group took is what is expected of the next ones, also of another size.
    here.slowdown[whole[0][0].workload] = 20.0
    assert here.plan(name, 1.01 * takes, peaks) == gain.groups(name, 2)[:2]
    large = gain.groups("1M, 5,000 steps", 2)[0]
    here.slowdown.clear()
    assert here.seconds(large, peaks) * 10 == pytest.approx(
        gain.Training.seconds(SimpleNamespace(slowdown={whole[0][0].workload: 20.0}), large, peaks)
    )


def test_without_time_for_members_it_says_what_they_would_take(tmp_path):
    under = Conditions(tmp_path, tmp_path, True, None, time.time(), print)
    with pytest.raises(LeftOut, match=r"its first 8 members take \d+ s, 0 s are left"):
        gain.measure("4k, 50 steps", under)


def test_without_the_corpus_it_says_how_to_make_it(tmp_path):
    with pytest.raises(LeftOut, match=r"make it with python -m benchmarks.corpus"):
        gain.read(tmp_path)


def test_members_of_large_models_are_trained_as_many_at_a_time_as_fit():
    name = "30M, 2,100 steps"
    size, steps = gain.parsed(name)
    tokens = steps * size.workload.batch_size * size.workload.length
    assert 34e6 < tokens < gain.TOKENS[0]
    groups = gain.groups(name, 2)
    assert [len(group) for group in groups] == [3] * 10
    assert {member.seed for group in groups[:5] for member in group} == {gain.SEEDS[0]}
    sizes = [entries(shapes(gain.SIZES[name].workload.model)) for name in gain.SIZES]
    assert np.allclose(sizes, [0.125e6, 1e6, 16e6, 30e6], rtol=0.08)


def made_up(name, losses, worse=gain.LONGER):
    """Results that end where `losses` says, by optimizer, rate and seed, after a straight line; one
    contender ends 0.01 higher."""
    found = {}
    for one in gain.contenders(name):
        for member in gain.members(name, one):
            loss = losses(one.optimizer, member.learning_rate, member.seed)
            loss += 0.01 * (one == worse)
            curve = {"step": [500, 750, 1000], "loss": [loss + 1, loss + 0.5, loss]}
            found[member] = ensemble.Result(member, curve, loss, 0.0)
    return found


def test_learning_rates_are_chosen_on_the_tuning_seeds_and_shown_on_the_others():
    name = "0.125M, 1,000 steps"

    def losses(optimizer, rate, seed):
        # On the tuning seeds 8e-3 is AdamW's best and 3.2e-2 annealed's; on the others 4e-3 is.
        if seed in TUNING:
            return 3 + abs(math.log(rate / (8e-3 if optimizer == "adamw" else 3.2e-2)))
        noise = 0.01 * (seed % 2)
        if optimizer == "adamw":
            return 2.5 + noise
        return 2.4 if rate == pytest.approx(3.2e-2) else 2.3 - noise

    found = gain.contrasts(name, made_up(name, losses))
    assert found["adamw"]["learning_rate"] == 8e-3
    assert found["adamw"]["seeds"] == 6
    assert found["adamw"]["warmup"] == 0.2
    row = found["annealed"]
    assert row["learning_rate"] == 3.2e-2
    assert row["difference"] == pytest.approx(2.4 - 2.505)
    # From 2.505 + 0.5 at 750 steps the line is at AdamW's end after (0.395 / 0.5) of 250 steps.
    assert row["saving"] == pytest.approx(0.25 - 0.25 * 0.395 / 0.5, abs=1e-6)
    low, high = row["interval"]
    assert low < row["difference"] < high
    assert row["by_rule"]["learning_rate"] == 1.6e-2
    assert row["by_rule"]["difference"] == pytest.approx(2.295 - 2.505)
    (bar,) = gain.bars({name: {"contrasts": found}})
    assert (bar.limit, bar.measured) == (0.20, row["by_rule"]["saving"])


def test_adamw_has_the_better_of_its_warmups_and_the_rule_the_usual_one():
    name = "0.125M, 1,000 steps"

    def losses(optimizer, rate, seed):
        return 3 + abs(math.log(rate / 8e-3))

    found = gain.contrasts(name, made_up(name, losses, worse=gain.USUAL))
    assert (found["adamw"]["warmup"], found["adamw"]["final"]) == (0.5, 3)
    assert found["annealed"]["by_rule"]["learning_rate"] == 1.6e-2
    assert found["annealed"]["by_rule"]["difference"] == pytest.approx(math.log(2))


def test_a_contender_that_diverges_is_worse_than_anything():
    name = "0.125M, 1,000 steps"

    def losses(optimizer, rate, seed):
        diverges = optimizer == "annealed" and seed not in TUNING
        return math.inf if diverges else 2.5

    row = gain.contrasts(name, made_up(name, losses))["annealed"]
    assert row["difference"] == math.inf
    assert "saving" not in row


def test_a_table_has_what_was_measured_beside_what_was_expected(rehearsed, tmp_path):
    assert all("not yet" in line for line in tables.plan(tmp_path)[1])
    assert not tables.updates(tmp_path)[1]
    renamed = {
        "right": {},
        "update": {"adamw, tiny, float32": "adamw, 160m, float32"},
        "step": {"tiny, 4 sequences": "160m, 16 sequences"},
        "gain": {"4k, 50 steps": "0.125M, 1,000 steps"},
    }
    for part, names in renamed.items():
        path, content = stored(rehearsed[0], part)
        content["device"]["kind"] = "NVIDIA H100 80GB HBM3"
        measured = content["measurements"]
        content["measurements"] = {names.get(name, name): measured[name] for name in measured}
        content["measurements"].pop("muon, tiny, bfloat16", None)
        if part == "update":  # as where the copy and AdamW, which it is compared with, failed
            row = content["measurements"]["adamw, 160m, float32"]["updates"]["lookahead(adamw)"]
            del row["ratio"], row["share_of_copy"]
        (tmp_path / path.name).write_text(json.dumps(content))
    step_found = stored(tmp_path, "step")[1]["measurements"]["160m, 16 sequences"]
    step_found["sequences"] = 16
    plan = {(line[0], line[1]): line for line in tables.plan(tmp_path)[1]}
    measured = plan["adamw, 160m, float32", "`gpa(adamw)`"]
    seconds = stored(tmp_path, "update")[1]["measurements"]["adamw, 160m, float32"]["updates"]
    assert measured[-1] == f"{1e3 * seconds['gpa(adamw)']['seconds'][1]:,.2f}"
    assert measured[-2] == "1.94"
    # Of a batch that had to be halved nothing was expected.
    assert plan["160m, 16 sequences", "AdamW"][-1] == "not yet"
    assert plan["0.125M, 1,000 steps", gain.MEMBER][-1] != "not yet"
    for name, table in tables.TABLES.items():
        headings, lines = table(tmp_path)
        assert lines, name
        assert all(len(line) == len(headings) for line in lines)


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


def test_a_batch_that_does_not_fit_is_halved(monkeypatch, tmp_path):
    tried, original = [], step.compiled

    def compiled(measurement):
        tried.append(measurement)
        if "4 sequences" in measurement:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")
        return original(measurement)

    monkeypatch.setattr(step, "compiled", compiled)
    under = Conditions(tmp_path, tmp_path, True, None, time.time(), print)
    found = step.measure("tiny, 4 sequences", under)
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

    def test_the_largest_members_fit(self):
        jitted, arguments = gain.programs("30M, 2,100 steps")["annealed, advance"]
        self.compiled(jitted, arguments)

    @pytest.mark.long
    @pytest.mark.parametrize("part", PARTS)
    def test_every_program_compiles(self, part):
        module = worker.PARTS[part]
        measurements = module.measurements(quick=False)
        if part == "gain":  # longer runs of a size differ in their numbers
            measurements = [f"{name}, {size.steps[0]:,} steps" for name, size in gain.SIZES.items()]
        for name in measurements:
            if name != right.KERNELS:  # those of updates
                for jitted, arguments in module.programs(name).values():
                    self.compiled(jitted, arguments)
        if part == "update":
            large = jax.ShapeDtypeStruct((2**30,), jnp.float32)
            self.compiled(timing.COPY, (large,))
        if part == "step":
            matrix = jax.ShapeDtypeStruct((8192, 8192), jnp.bfloat16)
            self.compiled(timing.PRODUCT, (matrix, matrix))
