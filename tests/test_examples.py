"""The comparison runs from the command line, tells the truth, and survives an interrupt."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("tyro")
pytest.importorskip("tokenizers")
from flax import nnx

from examples import compare
from examples.llama import data
from examples.llama.model import Llama, LlamaConfig, rotate
from examples.llama.sampling import sample
from examples.optimizers import AdamW, GPAAdamW
from examples.training import Run, train

ROOT = Path(__file__).parent.parent
SMALL = LlamaConfig(vocab_size=300, dim=16, layers=2, heads=4, kv_heads=2, hidden=32)
SMALL_FLAGS = "--model.vocab-size 300 --model.dim 16 --model.hidden 32 --batch-size 4 --length 16"


@pytest.fixture(scope="module")
def corpus():
    return data.standard_library(300)


@pytest.fixture
def model():
    return Llama(SMALL, nnx.Rngs(0))


def command(tmp_path, *flags):
    return [sys.executable, "-m", "examples.compare", "llama", *SMALL_FLAGS.split(),
            "--validation-windows", "8", "--out", str(tmp_path), *flags]  # fmt: skip


def test_the_comparison_runs_end_to_end(tmp_path):
    done = subprocess.run(
        command(tmp_path, "--steps", "30"), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    for part in ("AdamW", "GPA-AdamW", "Steps saved", "Sampled from the averaged model"):
        assert part in done.stdout, done.stdout
    results = json.loads((tmp_path / "compare.json").read_text())
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    adamw, gpa = results["runs"]["adamw"], results["runs"]["gpa-adamw"]
    assert adamw["done"] == gpa["done"] == 30
    assert results["target"] == adamw["validation_loss"]["params"][-1][1]
    # The same initialization, and the same data: the first loss is one number.
    first = {losses[0][1] for run in (adamw, gpa) for losses in run["validation_loss"].values()}
    assert len(first) == 1
    assert first.pop() == pytest.approx(np.log(300), abs=0.2)
    for run in (adamw, gpa):
        assert all(losses[-1][1] < losses[0][1] for losses in run["validation_loss"].values())
        assert run["seconds_per_step"] > 0
        assert run["step_bytes"] > run["optimizer_bytes"] > 0
    # Without b1 GPA keeps v and x where AdamW keeps m and v; what differs are scalars.
    assert abs(gpa["optimizer_bytes"] - adamw["optimizer_bytes"]) < 100


def test_an_interrupt_prints_what_there_is(tmp_path):
    process = subprocess.Popen(
        command(tmp_path, "--steps", "1000000", "--evaluations", "100000"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    for line in process.stdout:  # the run reports as it goes
        if "validation loss" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    assert "Interrupted. What there is so far:" in out
    assert "No comparison" in out
    results = json.loads((tmp_path / "compare.json").read_text())
    assert results["target"] is None
    assert 0 < results["runs"]["adamw"]["done"] < 1_000_000
    assert len(results["runs"]["adamw"]["validation_loss"]["params"]) > 1


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--model.heads", "3"], "must be a multiple of --model.heads (3)"),
        (["--model.vocab-size", "100"], "--model.vocab-size must be at least 257"),
        (["--model.dim", "12"], "must be even for rotary positions"),
        (["--gpa-adamw.mu-y", "1.0"], "mu_y must be below 1"),
        (["--gpa-adamw.window", "-0.1"], "--gpa-adamw.window must be positive"),
        (["--adamw.learning-rate", "0"], "--adamw.learning-rate must be positive"),
        (["--length", "1000000000"], "--length must be below the"),
    ],
)
def test_bad_flags_end_in_one_sentence(tmp_path, flags, named, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    arguments = command(tmp_path, *flags)[3:]
    try:
        status = compare.main(arguments)
    except SystemExit as stop:  # by tyro, for what is wrong with a flag by itself
        status = stop.code
    printed = capsys.readouterr()
    assert status == 2
    assert named in printed.out + printed.err
    assert not list(tmp_path.iterdir())


def run_of(losses, steps=100, name="x"):
    return Run(steps, done=steps, validation_loss={"y": losses, name: losses})


@pytest.mark.parametrize(
    ("gpa_losses", "says"),
    [
        ([(0, 5.0), (50, 3.1), (75, 3.0), (100, 2.9)], "at step 75 of 100, 25% fewer steps"),
        ([(0, 5.0), (50, 3.5), (100, 3.2)], "did not reach AdamW's final loss: 3.2000 against 3.0"),
        ([(0, 5.0), (100, 3.0)], "at step 100 of 100, 0% fewer steps"),
    ],
)
def test_the_verdict_is_the_winner_whoever_that_is(gpa_losses, says):
    adamw = Run(100, done=100, validation_loss={"params": [(0, 5.0), (100, 3.0)]})
    runs = {"adamw": adamw, "gpa-adamw": run_of(gpa_losses)}
    assert says in compare.verdict(runs)


def test_files_are_split_and_nothing_is_in_both_parts(corpus):
    again = data.standard_library(300)
    np.testing.assert_array_equal(corpus.validation, again.validation)
    end = corpus.tokenizer.token_to_id(data.END_OF_FILE)

    def files(tokens):
        return {bytes(part) for part in np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]}

    train, validation = files(corpus.train), files(corpus.validation)
    assert len(validation) > 30
    # Empty and one-line files may repeat; real ones must not.
    assert not {file for file in train & validation if len(file) > 1000}


def test_the_tokenizer_gives_the_text_back(corpus):
    text = "def f(x):\n    return 'äöü €' * x  # \t\x00\n"
    assert corpus.tokenizer.decode(corpus.tokenizer.encode(text).ids) == text


def test_batches_depend_on_the_seed_alone(corpus):
    first, same, other = (next(data.random_windows(corpus.train, 4, 8, seed)) for seed in (0, 0, 1))
    assert first.shape == (4, 9)
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_the_model_is_causal(model):
    tokens = jnp.arange(12)[None] % 300
    logits = model(tokens)
    assert logits.shape == (1, 12, 300)
    assert logits.dtype == jnp.float32
    changed = model(tokens.at[0, 7].set(99))
    np.testing.assert_allclose(logits[:, :7], changed[:, :7], atol=1e-5)
    assert not np.allclose(logits[:, 7:], changed[:, 7:], atol=1e-3)


def test_rotary_positions_depend_on_distance_alone(rng):
    """The product of a rotated query and key is a function of how far apart they stand."""
    q, k = (np.tile(rng.normal(size=8), (1, 10, 1, 1)) for _ in range(2))
    q, k = rotate(jnp.asarray(q), 10_000.0)[0, :, 0], rotate(jnp.asarray(k), 10_000.0)[0, :, 0]
    products = np.asarray(q @ k.T)
    for distance in range(-5, 6):
        diagonal = np.diagonal(products, distance)
        np.testing.assert_allclose(diagonal, diagonal[0], atol=1e-4)
    assert products[0, 0] != pytest.approx(products[0, 1], abs=1e-3)


def test_sampling_continues_the_prompt_past_the_window(model, corpus):
    text = sample(model, corpus.tokenizer, "def f(", tokens=40, window=16, seed=0)
    assert text.startswith("def f(")
    assert len(corpus.tokenizer.encode(text).ids) > 16
    assert text == sample(model, corpus.tokenizer, "def f(", tokens=40, window=16, seed=0)


@pytest.mark.parametrize("settings", [AdamW(), GPAAdamW()])
def test_each_optimizer_learns_a_batch_by_heart(settings, model):
    batch = jax.random.randint(jax.random.key(0), (4, 17), 0, 300)
    run = Run(steps=150)
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

    def batches():
        while True:
            yield batch

    train(model, compare.next_token_loss, settings.recipe(150), batches(), batch[None], run, 50)
    *_, best = run.validation_loss.values()
    assert best[-1][1] < 1.5 < 5.0 < best[0][1]
    for kept, old in zip(
        jax.tree.leaves(nnx.state(model, nnx.Param)), jax.tree.leaves(before), strict=True
    ):
        np.testing.assert_array_equal(kept, old)  # train leaves the model alone
    evaluated = nnx.clone(model)
    nnx.update(evaluated, run.weights)
    assert float(compare.next_token_loss(evaluated, batch)) == pytest.approx(best[-1][1], rel=1e-4)


def test_norms_do_not_decay(model):
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = AdamW(learning_rate=1.0, weight_decay=0.5).recipe(100).optimizer
    opt_state = tx.init(params)
    zero = jax.tree.map(jnp.zeros_like, params)
    for _ in range(3):  # warmup starts at 0
        updates, opt_state = tx.update(zero, opt_state, params)
    decayed = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(decayed["norm"]["scale"], params["norm"]["scale"])
    assert not np.allclose(decayed["embed"]["embedding"], params["embed"]["embedding"])
