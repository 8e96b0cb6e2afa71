"""Damaged checkpoints, a full disk, files that are not what they should be, and numbers that are
not finite: the run says so, ends or continues as it should, and nothing is lost."""

import ast
import contextlib
import dataclasses
import random
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers.needs import TRAINER, needs

needs(*TRAINER)
from examples import checkpoints, digests, optimizers
from examples.commands import run_command
from examples.llama import tokenizing
from examples.llama.__main__ import main
from examples.llama.data import TextData
from examples.llama.runs import load, read_config, read_tokenizer
from examples.metrics import History, Report, records
from examples.sharding import make_mesh, place
from examples.train import State, build
from helpers import ROOT, environment
from helpers.loops import assert_same
from helpers.programs import llama, on_devices, saved, train

pytestmark = pytest.mark.processes


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    with on_devices(1, monkeypatch):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of twelve steps with checkpoints of 4, 8 and 12, and its states at the last two."""
    config = llama(tmp_path_factory.mktemp("whole"), keep=3)
    with pytest.MonkeyPatch.context() as patch, on_devices(1, patch):
        train(config)
    return config, {step: saved(config, step) for step in (8, 12)}


@pytest.fixture
def copied(whole, tmp_path):
    """The same run in a folder that may be damaged."""
    config = dataclasses.replace(whole[0], run=tmp_path / "run")
    shutil.copytree(whole[0].run, config.run)
    return config


def shapes(config):
    return build(config, config.task(), make_mesh(1, jax.devices()[:1])).state


def files_of(run, step):
    folder = run / "checkpoints" / str(step)
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def malicious(mark):
    """A pickle that creates a file when it is loaded, in pickle's oldest protocol."""
    return f"cos\nsystem\n(S'touch {mark}'\ntR.".encode()


def damage(path, how, mark):
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
        return
    path.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "emptied": b"",
            "garbage": random.Random(0).randbytes(len(content)),
            "one bit": content[:-1] + bytes([content[-1] ^ 1]),
            "pickle": malicious(mark),
        }[how]
    )


DAMAGES = ("truncated", "emptied", "missing", "garbage", "one bit", "pickle")


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_of_a_checkpoint_is_found_and_the_one_before_is_taken(
    how, copied, tmp_path
):
    state, folder = shapes(copied), copied.run / "checkpoints"
    names = files_of(copied.run, 12)
    assert len(names) > 12
    for name in set(names) - set(digests.LAST):
        shutil.copytree(folder / "12", tmp_path / "kept")
        damage(folder / "12" / name, how, tmp_path / "mark")
        said = []
        assert checkpoints.newest_good(folder, state, said.append) == 8, name
        (line,) = said
        assert line.startswith(f"The checkpoint {folder / '12'} is damaged: its file {name}") or (
            name == digests.DIGESTS and name in line
        )
        aside = copied.run / "checkpoints.damaged" / "12"
        assert line.endswith(f"It is {aside} now.")
        assert aside.exists()
        shutil.rmtree(aside)
        (tmp_path / "kept").rename(folder / "12")
    assert checkpoints.newest_good(folder, state, print) == 12
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("name", digests.LAST)
def test_what_orbax_writes_last_is_not_needed(name, whole, copied, tmp_path):
    for how in DAMAGES:
        path = copied.run / "checkpoints" / "12" / name
        content = path.read_bytes()
        damage(path, how, tmp_path / "mark")
        assert checkpoints.newest_good(copied.run / "checkpoints", shapes(copied), print) == 12
        assert_same(saved(copied, 12), whole[1][12])
        path.write_bytes(content)
    assert not (tmp_path / "mark").exists()


def test_a_resumed_run_falls_back_says_so_and_ends_as_the_whole_one(whole, copied, tmp_path):
    (copied.run / "checkpoints" / "12" / "state" / "manifest.ocdbt").write_bytes(b"")
    text = " ".join(train(copied).split())
    assert "state/manifest.ocdbt (0 bytes) is not what was written." in text
    assert "resumes from step 8." in text
    assert (copied.run / "checkpoints.damaged" / "12" / "state" / "manifest.ocdbt").exists()
    assert_same(saved(copied, 12), whole[1][12])
    assert History.read(copied.run).train_loss == History.read(whole[0].run).train_loss


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_loss_of_an_older_checkpoint_does_not_keep_a_run_from_resuming(
    how, copied, tmp_path
):
    folder = copied.run / "checkpoints"
    damage(folder / "4" / "metrics" / "metrics", how, tmp_path / "mark")
    assert checkpoints.newest_good(folder, shapes(copied), print) == 12
    with checkpoints.opened(folder, keep=3) as manager:
        assert manager.latest_step() == 12


def test_without_a_good_checkpoint_the_run_ends_and_nothing_is_renamed(copied):
    before = {step: files_of(copied.run, step) for step in (4, 8, 12)}
    for step in before:
        (copied.run / "checkpoints" / str(step) / "digests.json").write_text("{}")
    for _ in range(2):  # also when the command is given again
        with pytest.raises(digests.DamagedError) as error:
            train(copied)
        message = str(error.value)
        assert message.startswith(f"The checkpoint {copied.run / 'checkpoints' / '12'} is damaged")
        assert "No other can be restored either; --no-resume renames" in message
    assert {step: files_of(copied.run, step) for step in (4, 8, 12)} == before
    assert History.read(copied.run).done == 12


def test_a_checkpoint_of_another_model_is_refused_with_the_leaf(whole, copied, tmp_path):
    wide = dataclasses.replace(
        copied, run=tmp_path / "wide", model=dataclasses.replace(copied.model, hidden=64)
    )
    train(wide)
    folder = copied.run / "checkpoints"
    shutil.rmtree(folder / "12")
    shutil.copytree(wide.run / "checkpoints" / "12", folder / "12")
    with pytest.raises(digests.DamagedError) as error:
        checkpoints.check(folder / "12", shapes(copied))
    assert str(error.value) == (
        f"The checkpoint {folder / '12'} is of another model or optimizer: "
        "opt_state/1/base_state/0/nu/blocks/mlp/down/kernel is float32[2,64,16] there, and "
        "float32[2,32,16] here."
    )
    assert "It is" in train(copied)
    assert_same(saved(copied, 12), whole[1][12])


@pytest.mark.parametrize("name", ["state/d", "state/_METADATA", "digests.json"])
def test_sampling_and_exporting_refuse_a_damaged_checkpoint(name, copied, capfd, tmp_path):
    path = copied.run / "checkpoints" / "12" / name
    path = max(path.iterdir()) if path.is_dir() else path
    damage(path, "garbage", tmp_path / "mark")
    for command in (["sample"], ["export"]):
        out = [str(tmp_path / "out")] if command == ["export"] else []
        assert run_command(main, [*command, str(copied.run), *out]) == 2
        said = capfd.readouterr().err
        assert said.startswith(f"The checkpoint {copied.run / 'checkpoints' / '12'} is damaged: ")
        assert said.endswith(" There are others: --checkpoint 4, 8.\n")
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert (copied.run / "checkpoints" / "12").exists()  # reading a run does not change it
    assert load(copied.run, 8)


# Files that are loaded.


def test_a_pickle_is_refused_by_everything_that_loads_and_is_not_executed(copied, tmp_path, capfd):
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    mark, given = tmp_path / "mark", tmp_path / "given"
    given.write_bytes(malicious(mark))
    subprocess.run([sys.executable, "-m", "pickle", given], check=True, capture_output=True)
    assert mark.exists()  # so it is one
    mark.unlink()

    def replaced(name):
        (copied.run / name).write_bytes(given.read_bytes())
        return copied.run

    loaders = {
        "tokenizer.json of a run": lambda: read_tokenizer(replaced("tokenizer.json")),
        "metrics.jsonl": lambda: records(replaced("metrics.jsonl") / "metrics.jsonl"),
        "a given tokenizer": lambda: tokenizing.given(str(given), 300),
        "safetensors": lambda: load_file(given),
        "text": lambda: TextData(renamed(given, ".jsonl"), cache=tmp_path).prepare(300),
        "a table": lambda: TextData(renamed(given, ".parquet"), cache=tmp_path).prepare(300),
        "config.json of a run": lambda: read_config(replaced("config.json")),
        "config.json of a run to resume": lambda: train(copied),
    }
    for name, loader in loaders.items():
        with pytest.raises((ValueError, SafetensorError)) as error:
            loader()
        assert not mark.exists(), name
        if name != "safetensors":  # which only its tests load here
            assert any(str(p) in str(error.value) for p in (tmp_path, copied.run)), name
    # A broken cache is made again.
    cache = tmp_path / "cache" / "bpe.json"
    cache.parent.mkdir()
    cache.write_bytes(malicious(mark))
    assert tokenizing.cached(cache, tokenizing.single_bytes).get_vocab_size() == 257
    assert tokenizing.Tokenizer.from_file(str(cache)).get_vocab_size() == 257
    assert not mark.exists()


def renamed(path, suffix):
    return str(shutil.copy(path, path.with_suffix(suffix)))


FORBIDDEN = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "yaml"}


def unsafe(tree):
    """What in a program loads what may hold code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN:
            yield node.module
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name in ("eval", "exec", "__import__") or name.endswith("read_pickle"):
            yield name
        if given.get("allow_pickle", "False") != "False":
            yield f"{name} with allow_pickle"
        if name == "torch.load" and given.get("weights_only") != "True":
            yield f"{name} without weights_only"


def test_nothing_in_the_repository_loads_what_may_hold_code():
    folders = (
        "gpa_optax",
        "planning",
        "examples",
        "benchmarks",
        "notebooks",
        "clients",
        "tests",
        "docs",
        ".ci",
    )
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(paths) > 60
    found = {str(p.relative_to(ROOT)): set(unsafe(ast.parse(p.read_text()))) for p in paths}
    assert {name: what for name, what in found.items() if what} == {
        "tests/docs/test_docs.py": {"eval", "exec"},  # of the pages' own code and names
        "tests/library/test_frameworks.py": {"exec"},  # of the documentation's own blocks
        "tests/library/test_averages.py": {"exec"},  # the same
        "benchmarks/bad_input.py": {"eval"},  # of the calls that are listed there
    }


@pytest.mark.parametrize(
    "line",
    ["import pickle", "from joblib import load", "eval('1')", "np.load(f, allow_pickle=True)",
     "torch.load(f)", "yaml.load(f) if 0 else __import__('yaml')", "pd.read_pickle(f)"],
)  # fmt: skip
def test_the_search_for_such_loads_finds_one(line):
    assert list(unsafe(ast.parse(line)))


# A full disk.


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, and a function that sets its size."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        found = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, text=True
        )
        if found.returncode:
            pytest.skip(f"Mounting is not permitted: {found.stderr.strip()}")

    try:
        mount("size=1m")
    except FileNotFoundError:
        pytest.skip("There is no mount here.")
    yield disk, lambda size: mount(f"remount,size={size}")
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_disk_that_is_full_ends_the_run_with_its_cause_and_leaves_a_good_checkpoint(
    small_disk, tmp_path
):
    disk, resize = small_disk
    llama(tmp_path)  # writes the text
    command = [
        sys.executable, "-m", "examples.llama", "--run", disk / "run", "--steps", "50",
        "--batch-size", "8", "--length", "16", "--evaluate-every", "5", "--keep", "30",
        "--validation-examples", "16", "--model.vocab-size", "300", "--model.dim", "16",
        "--model.hidden", "32", "--data.source", tmp_path / "text", "--data.cache",
        tmp_path / "cache",
    ]  # fmt: skip

    def run():
        return subprocess.run(
            [str(word) for word in command], cwd=ROOT, env=environment(), timeout=300,
            capture_output=True, text=True,
        )  # fmt: skip

    full = run()
    assert full.returncode == 2, full.stderr
    # Among lines of tensorstore, whose tasks find their event loop closed.
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("A checkpoint could")]
    assert "No space left on device" in line
    last = max(int(p.name) for p in (disk / "run" / "checkpoints").iterdir() if p.name.isdecimal())
    assert f"The last checkpoint, {disk / 'run' / 'checkpoints' / str(last)}, is kept." in line
    resize("50m")
    more = run()
    assert more.returncode == 0, more.stderr
    assert f"resumes from step {last}." in more.stdout
    assert History.read(disk / "run").done == 50


def fill(path):
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1024))


def test_metrics_on_a_full_disk_end_the_run_with_their_name(small_disk, tmp_path, monkeypatch):
    disk, resize = small_disk
    stepped = Report.stepped

    def filling(self, done, *numbers):
        if done == 42:
            while not (disk / "run" / "checkpoints" / "40").exists():
                time.sleep(0.01)
            fill(disk / "other")
        stepped(self, done, *numbers)

    config = dataclasses.replace(llama(tmp_path, steps=100, evaluate_every=40), run=disk / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Report, "stepped", filling)
        with pytest.raises(OSError, match=r"No space left on device: .*metrics.jsonl"):
            train(config)
    (disk / "other").unlink()
    resize("50m")
    assert "resumes from step 40." in train(config)
    assert [step for step, _ in History.read(config.run).train_loss] == list(range(1, 101))


# Non-finite numbers.


@jax.custom_vjp
def spoiled(loss, of_loss, of_gradient):
    """The loss plus a number, with its gradient times another."""
    return loss + of_loss


spoiled.defvjp(
    lambda loss, of_loss, of_gradient: (loss + of_loss, of_gradient),
    lambda of_gradient, gradient: (gradient * of_gradient, None, None),
)


def with_spoilers(config, accumulate=1):
    """The program of a run whose batches say how to spoil its loss and gradient."""
    config = dataclasses.replace(config, accumulate=accumulate)
    task = config.task()

    def metrics(model, rows, key):
        loss = task.metrics(model, rows, key)["loss"]
        return {"loss": spoiled(loss, rows["of_loss"], rows["of_gradient"])}

    number = jax.ShapeDtypeStruct((), jnp.float32)
    example = {**task.example, "of_loss": number, "of_gradient": number}
    mesh = make_mesh(1, jax.devices()[:1])
    program = build(config, task._replace(metrics=metrics, example=example), mesh)

    def batch(seed, of_loss=0.0, of_gradient=1.0):
        tokens = np.random.default_rng(seed).integers(0, 300, (8, config.length + 1), np.int32)
        numbers = {"of_loss": np.zeros(8, np.float32), "of_gradient": np.ones(8, np.float32)}
        numbers["of_loss"][3], numbers["of_gradient"][:] = of_loss, of_gradient
        return place({"tokens": tokens, **numbers}, mesh, accumulate)

    def trained(batches):
        with jax.set_mesh(mesh):
            state, seen = program.initial(), []
            for one in batches:
                state, metrics = program.step(state, one)
                seen.append(metrics)
        return state, seen

    return batch, trained


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("optimizer", ["gpa-adamw", "adamw", "gpa-muon", "diloco-sgd"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer, accumulate, tmp_path):
    """Neither params nor moments nor counts, whatever it is that is not finite."""
    batch, trained = with_spoilers(llama(tmp_path, optimizer=optimizer), accumulate)
    nan, inf = float("nan"), float("inf")
    bad = [(nan, 1.0), (inf, 1.0), (-inf, 1.0), (0.0, nan), (0.0, inf), (0.0, 1e30)]
    mixed = [batch(0), *(batch(9, *one) for one in bad), batch(1), batch(9, *bad[0]), batch(2)]
    state, seen = trained(mixed)
    same, _ = trained([batch(0), batch(1), batch(2)])
    assert [bool(one["good"]) for one in seen] == [True, *[False] * 6, True, False, True]
    assert int(state.step) == len(mixed)  # they count as steps: their data is used up
    assert_same(state._replace(step=0 * state.step), same._replace(step=0 * same.step))


def test_a_spiked_batch_does_not_break_a_run(tmp_path):
    """A gradient a million times too large is clipped; the run is back within a few steps."""
    batch, trained = with_spoilers(llama(tmp_path, steps=60, settings={"learning_rate": 1e-2}))
    at = 30
    calm = [batch(step % 3) for step in range(60)]
    spiked = [*calm[:at], batch(at % 3, of_gradient=1e6), *calm[at + 1 :]]
    losses = []
    for batches in (calm, spiked):
        state, seen = trained(batches)
        assert all(bool(one["good"]) for one in seen)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
        losses.append(np.array([one["loss"] for one in seen]))
    assert losses[1][at + 1 :].max() < losses[0][:at].max()
    assert losses[1][-3:].mean() == pytest.approx(losses[0][-3:].mean(), rel=0.05)


def poison(steps, monkeypatch):
    """The gradients of these steps, counted in this process, are none."""
    made = []

    def building(config, task, mesh):
        program = build(config, task, mesh)

        class Step:
            def lower(self, *shapes):
                return self

            def compile(self):
                return self

            def memory_analysis(self):
                return None

            def __call__(self, state: State, batch):
                made.append(1)
                if len(made) not in steps:
                    return program.step(state, batch)
                params = jax.tree.map(lambda p: p * float("nan"), state.params)
                _, metrics = program.step(
                    jax.tree.map(jnp.copy, state)._replace(params=params), batch
                )
                return state._replace(step=state.step + 1), metrics

        return program._replace(step=Step())

    monkeypatch.setattr("examples.train.build", building)


def test_leaving_out_a_step_is_a_choice_and_no_branch(tmp_path):
    """A branch's two sides are kept apart on an H100, in temporaries as large as the model."""
    config = llama(tmp_path)
    program = build(config, config.task(), make_mesh(1, jax.devices()[:1]))
    traced = str(program.step.trace(program.state, program.batch).jaxpr)
    assert "select_n" in traced
    assert "cond[" not in traced


def test_bad_steps_are_counted_told_and_end_the_run_when_they_are_too_many(
    tmp_path, monkeypatch, capfd
):
    config = llama(tmp_path, steps=40, max_bad_steps=4, log_every=5, evaluate_every=20)
    with monkeypatch.context() as patch:
        poison({3, 11, 12, 13, *range(22, 100)}, patch)
        with pytest.raises(FloatingPointError) as error:
            train(config)
    last = config.run / "checkpoints" / "20"
    assert str(error.value) == (
        "By step 25, 4 steps in a row had a loss or gradient that is not finite; they "
        f"changed nothing. The last checkpoint, {last}, is kept; --max-bad-steps allows more."
    )
    lines = {r["step"]: r for r in records(config.run / "metrics.jsonl") if "loss" in r}
    assert {step: line.get("bad_steps") for step, line in lines.items()} == {
        5: 1, 10: None, 15: 3, 20: None, 25: 4,
    }  # fmt: skip
    assert all(np.isfinite(line["loss"]) for line in lines.values())
    assert lines[20]["learning_rate"] == pytest.approx(
        optimizers.schedule(config.settings, 40)(20 - 1 - 4)
    )
    text = train(config)  # the numbers are good again
    assert "resumes from step 20." in text
    assert History.read(config.run).done == 40


def test_a_run_that_diverges_ends_with_status_3_and_its_checkpoint_is_restored(tmp_path, capfd):
    """With a learning rate like that the params are useless soon, though finite."""
    config = llama(tmp_path)
    arguments = [
        "--run", config.run, "--steps", "60", "--batch-size", "8", "--length", "16",
        "--evaluate-every", "2", "--log-every", "1", "--validation-examples", "16",
        "--model.vocab-size", "300", "--model.dim", "16", "--model.hidden", "32",
        "--data.source", config.data.source, "--data.cache", config.data.cache,
        "--learning-rate", "1e35", "--warmup", "0",
    ]  # fmt: skip
    assert run_command(main, [str(word) for word in arguments]) == 3
    said = capfd.readouterr().err
    assert "10 steps in a row had a loss or gradient that is not finite" in said
    last = max(int(p.name) for p in (config.run / "checkpoints").iterdir())
    assert f"{config.run / 'checkpoints' / str(last)}, is kept" in said
    config = read_config(config.run)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved(config, last)))
