"""Numbers that go wrong: gradients not finite, huge or tiny, and settings at their ends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import oracle
from gpa_optax import averaging, eval_params, gpa, iterates

OPTIMIZED = True  # see quick_compilation in conftest.py

BAD = [np.nan, np.inf, -np.inf]
STEPS = 12
# Which steps have a bad gradient.
WHEN = {
    "once": {5},
    "often": {1, 2, 5, 8, 9},
    "at first": {0},
    "from some step on": {6, 7, 8, 9, 10, 11},
}


@pytest.fixture
def params(rng):
    return {"a": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "b": jnp.ones(())}


@pytest.fixture
def gradients(rng, params):
    """One tree for each step."""
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        for _ in range(STEPS)
    ]


def spoiled(gradients, when, bad):
    """With one entry that is not finite at these steps."""
    return [
        g | {"a": g["a"].at[1, 2].set(bad)} if t in when else g for t, g in enumerate(gradients)
    ]


def train(optimizer, params, gradients):
    opt_state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grads in gradients:
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


def assert_same_bits(found, expected):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def make(lr=0.1, mu_x=0.9, mu_y=0.7):
    return gpa(optax.adamw(lr, weight_decay=0.1), mu_x, mu_y)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("when", WHEN)
def test_around_gpa_apply_if_finite_leaves_out_bad_steps_bit_for_bit(
    when, bad, dtype, params, gradients
):
    """Params, x, z, the count and the base's moments are those of a run without these steps."""
    # apply_if_finite wants updates to have the gradients' dtype, and so gradients in the params'.
    params, gradients = jax.tree.map(lambda leaf: leaf.astype(dtype), (params, gradients))
    optimizer = optax.chain(optax.clip(1.0), make(mu_x=averaging.uniform()))
    guarded = optax.apply_if_finite(optimizer, max_consecutive_errors=STEPS)
    found, opt_state = train(guarded, params, spoiled(gradients, WHEN[when], bad))
    good = [g for t, g in enumerate(gradients) if t not in WHEN[when]]
    expected, expected_state = train(optimizer, params, good)
    assert int(opt_state.total_notfinite) == len(WHEN[when])
    assert_same_bits((found, opt_state.inner_state), (expected, expected_state))
    assert_same_bits(iterates(opt_state, found), iterates(expected_state, expected))


@pytest.mark.parametrize("mu_x", [0.9, averaging.uniform()])
@pytest.mark.parametrize("when", WHEN)
def test_inside_gpa_apply_if_finite_leaves_out_the_step_of_z_alone(when, mu_x, params, gradients):
    """The base's update is zero then, weight decay included; x and y still go on towards z, and the
    count of mu_x goes on, as if a step of length 0 had been taken."""
    base = optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), max_consecutive_errors=STEPS)
    found, opt_state = train(gpa(base, mu_x, 0.7), params, spoiled(gradients, WHEN[when], np.nan))

    judge = oracle.Oracle(params, oracle.momentum)
    for t, grads in enumerate(gradients):
        mu = mu_x(t) if callable(mu_x) else mu_x
        if t not in WHEN[when]:
            judge.step(grads, 0.1, mu, 0.7)
            continue
        z = dict(judge.z)
        moments = jax.tree.map(np.array, judge.memory)
        judge.step(jax.tree.map(jnp.zeros_like, grads), 0.0, mu, 0.7)
        judge.memory = moments  # momentum has not decayed
        assert all((judge.z[name] == z[name]).all() for name in z)
    assert int(opt_state.count) == STEPS
    for sequence, expected in zip(
        iterates(opt_state, found), (judge.x, judge.y, judge.z), strict=True
    ):
        for name, value in expected.items():
            np.testing.assert_allclose(sequence[name], value, rtol=2e-6, atol=2e-6)


def test_inside_gpa_every_skipped_step_moves_x_towards_z(params, gradients):
    optimizer = gpa(optax.apply_if_finite(optax.sgd(0.1), STEPS), 0.9, 0.7)
    found, opt_state = train(optimizer, params, gradients)
    before = iterates(opt_state, found)
    bad = spoiled(gradients, {0}, np.nan)[0]
    updates, opt_state = optimizer.update(bad, opt_state, found)
    after = iterates(opt_state, optax.apply_updates(found, updates))
    np.testing.assert_allclose(after.z["a"], before.z["a"], rtol=1e-6, atol=1e-6)
    way = jax.tree.map(lambda x, z: x + 0.1 * (z - x), before.x, before.z)
    np.testing.assert_allclose(after.x["a"], way["a"], rtol=1e-6, atol=1e-6)
    assert (np.abs(before.z["a"] - before.x["a"]) > 1e-3).any()


@pytest.mark.parametrize("guard", ["around", "inside"])
def test_after_too_many_bad_steps_the_failure_comes_through(guard, params, gradients):
    """apply_if_finite gives up after max_consecutive_errors; the failure is then visible."""
    if guard == "around":
        optimizer = optax.apply_if_finite(make(), max_consecutive_errors=2)
    else:
        optimizer = gpa(optax.apply_if_finite(optax.adamw(0.1), max_consecutive_errors=2), 0.9, 0.7)
    always = spoiled(gradients, range(STEPS), np.nan)
    found, _ = train(optimizer, params, always[:2])
    assert np.isfinite(found["a"]).all()
    found, opt_state = train(optimizer, params, always[:3])
    assert np.isnan(found["a"][1, 2])
    assert np.isnan(eval_params(opt_state, found)["a"][1, 2])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("bad", BAD)
def test_without_a_guard_the_failure_shows_at_once_and_for_good(bad, dtype, params, gradients):
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    optimizer = gpa(optax.sgd(0.1), 0.9, 0.7)
    for steps in (6, STEPS):  # right after the bad step, and much later
        found, opt_state = train(optimizer, params, spoiled(gradients, {5}, bad)[:steps])
        for sequence in (found, eval_params(opt_state, found), *iterates(opt_state, found)):
            finite = np.isfinite(np.asarray(sequence["a"], np.float32))
            assert not finite[1, 2]
            assert finite.sum() == finite.size - 1  # no other entry is touched
            assert np.isfinite(np.float32(sequence["b"]))


def test_a_loss_spike_is_forgotten_as_the_base_forgets_it(params, gradients):
    """One gradient a million times too large, against the oracle."""
    spike = [jax.tree.map(lambda g: 1e6 * g, g) if t == 5 else g for t, g in enumerate(gradients)]
    found, opt_state = train(make(), params, spike)
    judge = oracle.Oracle(params, oracle.adamw)
    for grads in spike:
        judge.step(grads, 0.1, 0.9, 0.7)
    for sequence, expected in zip(
        iterates(opt_state, found), (judge.x, judge.y, judge.z), strict=True
    ):
        for name, value in expected.items():
            np.testing.assert_allclose(sequence[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("lr", [0.0, 1e-30, 1e-3, 1e30])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_extreme_gradients_do_what_they_do_to_the_base(scale, lr, base, rng):
    """z goes where the base alone goes from there, and is finite where that is."""
    optimizer = {"sgd": optax.sgd, "adamw": lambda lr: optax.adamw(lr, weight_decay=0.0)}[base](lr)
    params = jnp.array([1.0, -1e-3, 0.0])
    grads = scale * jnp.array([1.0, -1.0, 1.0])
    alone, base_state, opt_state = params, optimizer.init(params), gpa(optimizer).init(params)
    for _ in range(3):
        updates, base_state = optimizer.update(grads, base_state, alone)
        alone = optax.apply_updates(alone, updates)
        updates, opt_state = gpa(optimizer, 0.9, 0.7).update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        found = iterates(opt_state, params)
        finite = np.isfinite(alone)
        for sequence in found:
            np.testing.assert_array_equal(np.isfinite(sequence), finite)
        size = np.abs(np.where(finite, alone, 0)).max()
        np.testing.assert_allclose(
            np.where(finite, found.z, 0), np.where(finite, alone, 0), atol=1e-6 * size
        )


def test_steps_in_the_range_of_denormals_are_zero_as_in_the_base():
    """XLA's CPU backend takes numbers below 1e-38 for 0; GPA adds nothing to that."""
    for scale in (1e-39, 1e-44):
        optimizer = gpa(optax.sgd(1.0), 0.9, 0.7)
        params = jnp.zeros(3)
        found, opt_state = train(optimizer, params, [jnp.full(3, scale, jnp.float32)] * 3)
        for sequence in iterates(opt_state, found):
            assert np.isfinite(sequence).all()
            assert (np.abs(sequence) <= 3.01 * scale).all()


@pytest.mark.parametrize("mu_y", [0.0, 0.5, 0.7, 0.9, 0.99])
def test_a_learning_rate_of_zero_in_mid_run_leaves_z_but_for_rounding(mu_y, rng):
    """x and y go on towards z; each step may round z by a unit in y's last place / (1 - mu_y)."""
    optimizer = optax.inject_hyperparams(
        lambda learning_rate: gpa(optax.sgd(learning_rate), 0.9, mu_y)
    )(0.1)
    params = jnp.asarray(rng.normal(size=100), jnp.float32)
    grads = [jnp.asarray(rng.normal(size=100), jnp.float32) for _ in range(50)]
    opt_state, update = optimizer.init(params), jax.jit(optimizer.update)
    for g in grads:
        updates, opt_state = update(g, opt_state, params)
        params = optax.apply_updates(params, updates)
    before = iterates(opt_state, params).z
    opt_state.hyperparams["learning_rate"] = jnp.float32(0)
    steps = 500
    for _ in range(steps // len(grads)):
        for g in grads:
            updates, opt_state = update(g, opt_state, params)
            params = optax.apply_updates(params, updates)
    x, y, z = iterates(opt_state, params)
    if mu_y == 0:
        assert_same_bits(z, before)
    unit = float(jnp.finfo(jnp.float32).eps) * np.abs(before).max()
    assert np.abs(z - before).max() < 10 * steps**0.5 * unit / (1 - mu_y)
    np.testing.assert_allclose(x, z, atol=100 * unit / (1 - mu_y))
    np.testing.assert_allclose(y, z, atol=100 * unit / (1 - mu_y))


def test_mu_x_within_1e_7_of_1_still_moves_x(x64, rng):
    """By 1e-7 of the way, where x has the digits for it: near 0 in float32, anywhere in float64."""
    weight = 1e-7
    for start, dtype, tolerance in ((0.0, jnp.float32, 1e-5), (1.0, jnp.float64, 1e-8)):
        params = {"w": jnp.full(4, start, dtype)}
        optimizer = gpa(optax.sgd(0.5), 1 - weight, 0.7)
        opt_state, judge = optimizer.init(params), oracle.Oracle(params, oracle.sgd)
        for _ in range(50):
            grads = {"w": jnp.asarray(rng.normal(size=4) - 1, dtype)}
            updates, opt_state = optimizer.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            judge.step(grads, 0.5, 1 - weight, 0.7)
        moved = np.asarray(opt_state.x["w"], np.float64) - start
        assert (moved > 1e-6).all()
        np.testing.assert_allclose(moved, judge.x["w"] - start, rtol=tolerance)


def test_mu_x_within_1e_7_of_1_in_float32_does_not_move_an_x_of_size_1():
    """A step of the average is then below x's last place, 6e-8, and is rounded away."""
    params = jnp.ones(4)
    optimizer = gpa(optax.sgd(0.01), 1 - 1e-7, 0.7)
    found, opt_state = train(optimizer, params, [jnp.ones(4)] * 20)
    np.testing.assert_array_equal(opt_state.x, params)
    np.testing.assert_allclose(found, 1 - 0.3 * 0.2, rtol=1e-5)  # y follows z


@pytest.mark.parametrize("mu_y", [1 - 1e-2, 1 - 1e-3, 1 - 1e-4, 1 - 1e-5])
def test_mu_y_near_1_loses_digits_of_z_by_as_much_as_it_is_near(mu_y, params, gradients):
    found, opt_state = train(gpa(optax.sgd(0.1), 0.9, mu_y), params, gradients)
    judge = oracle.Oracle(params, oracle.sgd)
    for grads in gradients:
        judge.step(grads, 0.1, 0.9, float(np.float32(mu_y)))
    x, _, z = iterates(opt_state, found)
    bound = STEPS * 2.0**-23 / (1 - mu_y)
    assert np.abs(z["a"] - judge.z["a"]).max() < bound
    assert np.abs(x["a"] - judge.x["a"]).max() < bound
