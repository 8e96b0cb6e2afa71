"""The members of a study: each is what the trainer would make of it, alone or with others."""

import dataclasses
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers import ROOT
from helpers.needs import NEEDS_MUON, marked, needs

needs("flax")

from flax import nnx

from benchmarks import ensemble, studies
from benchmarks.ensemble import Member
from benchmarks.workloads import Data, Workload
from examples import optimizers
from examples.llama.model import Llama, LlamaConfig
from examples.settings import Settings
from gpa_optax import iterates

MODEL = LlamaConfig(257, dim=16, layers=1, heads=2, kv_heads=1, hidden=32)
SMALL = Workload(MODEL, length=16, batch_size=4)


def member(optimizer="adamw", steps=8, seed=0, learning_rate=1e-2, **rest):
    return Member(optimizer, steps, seed, learning_rate, workload=SMALL, **rest)


@pytest.fixture(scope="module")
def text():
    """Each is mostly the one before it plus 1."""
    rng = np.random.default_rng(0)
    jumps = np.where(rng.random(20_000) < 0.1, rng.integers(0, 50, 20_000), 1)
    stream = (np.cumsum(jumps) % 50).astype(np.uint16)
    return Data(stream[:10_000], stream[10_000:])


def test_the_loss_is_the_trainers(text):
    pytest.importorskip("grain")
    pytest.importorskip("tyro")
    from examples.llama.config import next_token

    like = ensemble.structure(member(learning_rate=1.0))
    program = ensemble.program(like, together=False, at_y=False)
    parts = SMALL.parts(text, 512)
    rates = {"learning_rate": 1.0, "weight_decay": 0.1, "final": 0.0}
    params, opt_state = program.initial(np.uint32(0), rates, None)
    params["embed"]["embedding"] *= 40  # so that the logits are not all alike
    found = program.evaluate((params, opt_state), rates, parts)["loss"]
    model = Llama(MODEL, nnx.Rngs(0))
    nnx.update(model, params)
    theirs = next_token(model, {"tokens": parts.reshape(-1, 17)}, None)["loss"].mean()
    assert abs(found - np.log(257)) > 0.1
    assert float(found) == pytest.approx(float(theirs), abs=1e-5)


SAME = {
    "adamw": {"schedule": "cosine", "final": 0.1},
    "gpa-adamw": {"schedule": "constant", "average": "lr-weighted", "mu_y": 0.8, "b1": 0.0},
    "gpa-muon": {"schedule": "linear", "average": "annealed", "window": 0.3, "mu_y": 0.5},
    "ema-adamw": {"schedule": "wsd", "decay": 0.4, "average": "warmed-up", "mu_x": 0.7},
    "schedule-free-adamw": {"schedule": "constant", "b1": 0.0, "mu_y": 0.9},
    "diloco-adamw": {"schedule": "linear", "sync_period": 4, "outer_learning_rate": 0.5},
}


@pytest.mark.parametrize("name", marked(NEEDS_MUON, SAME, "gpa-muon"))
def test_an_optimizer_is_the_trainers(name):
    steps, rng = 10, np.random.default_rng(2)
    knobs = SAME[name]
    settings = Settings(learning_rate=3e-2, warmup=0.3, weight_decay=0.2, **knobs)
    built = (
        optimizers.named_optimizer(name, settings, steps),
        ensemble.optimizer_of(
            (run := member(name, steps, 0, 3e-2, warmup=0.3, weight_decay=0.2, knobs=knobs)),
            run.settings,
        ),
    )
    start = nnx.to_pure_dict(nnx.state(Llama(MODEL, nnx.Rngs(0)), nnx.Param))
    gradients = [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), start)
        for _ in range(steps)
    ]
    found = []
    for optimizer in built:
        params, opt_state = start, optimizer.init(start)
        update = jax.jit(optimizer.update)
        for gradient in gradients:
            updates, opt_state = update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
        found.append(optimizer.eval_params(opt_state, params))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


# The growing mu_y at each update, from 0, and the knobs; a run has 20 updates, of warmup 4.
GROWING = {
    "constant, lr_weighted after the warmup, (t + 1)^2": lambda k: 0.9,
    "ScheduleFree+'s average": lambda k: 1 - math.exp(
        math.log(0.1) + min(k / 10, 1) * (math.log(0.035) - math.log(0.1))
    ),
    "AMUSE's mu_y": lambda k: 0.6 if k + 1 <= 4 else 1 - 0.4 * (3 / k) ** 0.8,
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
def test_the_screen_has_late_averages_and_a_growing_mu_y(name):
    base, knobs = studies.SCREEN[name]
    run = member(base, 20, 0, 3e-2, warmup=0.2, knobs=knobs)
    optimizer = ensemble.optimizer_of(run, run.settings)
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=6), jnp.float32)}
    opt_state, update = optimizer.init(params), jax.jit(optimizer.update)
    late, total = name != "AMUSE's mu_y", 0.0
    for k in range(20):
        before = iterates(opt_state, params).x["kernel"]
        gradient = {"kernel": jnp.asarray(rng.normal(size=6), jnp.float32)}
        updates, opt_state = update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        x, y, z = (tree["kernel"] for tree in iterates(opt_state, params))
        weight = min(k / 4, 1) ** 2 * ((k + 1) ** 2 if late else 1) * (not late or k >= 4)
        total += weight
        w, mu_y = weight / total if total else 1.0, GROWING[name](k)
        np.testing.assert_allclose(x, before + w * (z - before), atol=2e-6)
        np.testing.assert_allclose(y, mu_y * x + (1 - mu_y) * z, atol=2e-6)
        assert float(opt_state[1].last_mu_y) == pytest.approx(mu_y, abs=1e-6)


@NEEDS_MUON
@pytest.mark.parametrize("at", ["x", "z"])
def test_the_pull_pushes_the_params_away_from_their_average(at):
    run = member("pulled-muon", 20, 0, 3e-2, warmup=0.2, knobs={"at": at, "pull": 0.1, "mu_x": 0.8})
    alone = member("muon", 20, 0, 3e-2, warmup=0.2)
    rng = np.random.default_rng(0)
    z = x = {"bias": jnp.asarray(rng.normal(size=6), jnp.float32)}  # no matrix, so AdamW
    optimizer, base = (ensemble.optimizer_of(one, one.settings) for one in (run, alone))
    params, opt_state, base_state = z, optimizer.init(z), base.init(z)
    for k in range(20):
        gradient = {"bias": jnp.asarray(rng.normal(size=6), jnp.float32)}
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
        step, base_state = base.update(gradient, base_state, z)
        pull = 0.1 * min(k / 4, (20 - k) / 16)  # as the learning rate
        z = jax.tree.map(lambda z, s, x, pull=pull: z + s + pull * (z - x), z, step, x)
        x = jax.tree.map(lambda x, z: 0.8 * x + 0.2 * z, x, z)
        np.testing.assert_allclose(params["bias"], z["bias"], atol=2e-6)
        evaluated = optimizer.eval_params(opt_state, params)["bias"]
        np.testing.assert_allclose(evaluated, (x if at == "x" else z)["bias"], atol=2e-6)
    assert float(jnp.abs(x["bias"] - z["bias"]).max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("annealed", {}),
        pytest.param("pulled-muon", {}, marks=NEEDS_MUON),
        pytest.param("gpa-muon", {}, marks=NEEDS_MUON),
        studies.SCREEN["AMUSE's mu_y"],
    ],
)
def test_members_trained_together_are_what_they_are_alone(name, knobs, text):
    members = [
        member(name, seed=1, learning_rate=1e-2, knobs=knobs),
        member(name, seed=2, learning_rate=3e-2, weight_decay=0.0, knobs=knobs),
    ]
    together = ensemble.train_group(members, text, at_y=True)
    for one, result in zip(members, together, strict=True):
        [alone] = ensemble.train([one], text, at_y=True)
        assert result.member == one
        assert result.curve["step"] == alone.curve["step"]
        for line in ("loss", "loss at y"):
            assert result.curve[line] == pytest.approx(alone.curve[line], abs=2e-4)
        assert result.final == pytest.approx(alone.final, abs=2e-4)
    assert together[0].final != together[1].final


def test_members_learn_and_are_returned_in_order(text):
    members = [member("annealed", 100), member("anytime", 100), member("annealed", 100, seed=3)]
    results = ensemble.train(members, text)
    assert [result.member for result in results] == members
    assert all(result.final < 3.0 < np.log(50) for result in results)
    assert results[0].curve["step"] == [10, 20, 30, 40, *range(50, 101, 2)]


def test_a_member_that_diverges_is_told_and_leaves_the_others_alone(text):
    good, bad = member("adamw", 100), member("adamw", 100, learning_rate=1e38)
    results = ensemble.train_group([good, bad], text, at_y=False)
    assert results[0].final < 3.0
    assert results[1].final == math.inf
    assert len(results[1].curve["step"]) < len(results[0].curve["step"])
    [alone] = ensemble.train([bad], text)
    assert alone.final == math.inf
    assert alone.curve == results[1].curve


def test_a_seed_decides_the_windows_and_none_comes_twice():
    stream = np.zeros(10_000)
    first = SMALL.rows(stream, seed=0, steps=100)
    assert first.shape == (100, 4)
    assert len(np.unique(first)) == 400
    assert not (first % 16).any()
    assert first.max() + 17 <= 10_000
    np.testing.assert_array_equal(SMALL.rows(stream, seed=0, steps=50), first[:50])
    assert (SMALL.rows(stream, seed=1, steps=100) != first).any()


def test_a_run_longer_than_the_corpus_is_an_error_that_names_the_numbers(text):
    expected = r"200 steps of 4 windows need 800 windows, and 10,000 tokens have 624 of 16: .*156"
    with pytest.raises(ValueError, match=expected):
        ensemble.train([member(steps=200)], text)
    short = text._replace(held_out=text.held_out[:5000])
    with pytest.raises(ValueError, match="512 held-out windows of 16 tokens, and 5,000 tokens"):
        ensemble.train([member()], short)


def test_fine_tuning_starts_where_pretraining_ended(text):
    from benchmarks.pretrain import trained

    start = trained(member(steps=100), text)
    at_once, untrained = (
        ensemble.train([member(learning_rate=1e-6)], data)[0].final
        for data in (text._replace(start=start), text)
    )
    assert at_once < 3.0 < untrained


def test_an_identity_holds_what_is_not_default():
    plain = Member("gpa-adamw", 1000, 2000, 8e-3)
    assert plain.identity == "a41644e4291df451"
    defaults = Member("gpa-adamw", 1000, 2000, 8e-3, 0.1, 0.1, {"mu_y": 0.9}, Workload())
    assert defaults == plain
    changed = Member("gpa-adamw", 1000, 2000, 8e-3, knobs={"mu_y": 0.8, "b1": 0.9})
    assert changed.changes() == {
        "optimizer": "gpa-adamw",
        "steps": 1000,
        "seed": 2000,
        "learning_rate": 8e-3,
        "knobs": {"mu_y": 0.8, "b1": 0.9},
    }
    wider = dataclasses.replace(plain, workload=Workload(dataclasses.replace(MODEL, dim=96)))
    assert len({run.identity for run in (plain, changed, wider, member("gpa-adamw"))}) == 4


def test_what_no_optimizer_has_is_an_error():
    with pytest.raises(ValueError, match=r"optimizer must be one of annealed, .* got 'adam'"):
        member("adam")
    with pytest.raises(ValueError, match=r"anytime has no knob window: it has mu_y, b2"):
        member("anytime", knobs={"window": 0.1})


def test_it_runs_where_the_trainers_dependencies_are_missing():
    code = """
import sys
absent = ("grain", "tyro", "tensorboardX", "tokenizers")
sys.modules |= dict.fromkeys(absent)
import benchmarks.ensemble
"""
    root = ROOT
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
