"""The averaging module: constants, schedules, and their precision near 1."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpa_optax import averaging, eval_params, gpa


def weights(schedule, counts):
    return np.asarray(jax.jit(jax.vmap(schedule.weight))(jnp.asarray(counts)), np.float64)


def test_from_diloco_gives_the_papers_table():
    table = {1: 0.9, 4: 0.974, 8: 0.9869, 16: 0.9934, 32: 0.9967, 64: 0.9984, 128: 0.9992}
    assert {h: round(averaging.from_diloco(h), 4) for h in table} == table


def test_from_horizon_remembers_that_many_steps():
    mu_x = averaging.from_horizon(250)
    assert mu_x == pytest.approx(0.996)
    # What is left of the initialization after one horizon is 1 / e.
    assert mu_x**250 == pytest.approx(np.exp(-1), rel=0.01)


def test_uniform_is_the_mean_of_all_iterates(rng):
    zs = rng.normal(size=(50, 3)).astype(np.float32)
    optimizer = gpa(optax.sgd(1.0), averaging.uniform(), mu_y=0.0)
    params = jnp.ones(3)
    opt_state = optimizer.init(params)
    for z in zs:
        updates, opt_state = optimizer.update(params - z, opt_state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(eval_params(opt_state, params), zs.mean(0), atol=1e-6)


@hypothesis.given(
    power=st.one_of(st.floats(0, 5), st.floats(5, 300), st.integers(0, 6).map(float)),
    count=st.integers(0, 3000),
)
def test_polynomial_weighs_by_a_power_of_the_step(power, count):
    k = np.arange(1, count + 2, dtype=np.float64)
    expected = 1 / np.sum((k / k[-1]) ** power)
    assert weights(averaging.polynomial(power), [count])[0] == pytest.approx(expected, rel=2e-6)


def test_polynomial_of_power_zero_is_uniform():
    counts = np.concatenate([np.arange(100), 10 ** np.arange(2, 9)])
    np.testing.assert_allclose(
        weights(averaging.polynomial(0), counts), weights(averaging.uniform(), counts), rtol=1e-6
    )


def test_warmed_up_is_uniform_and_then_constant():
    counts = np.arange(1000)
    np.testing.assert_allclose(
        weights(averaging.warmed_up(0.99), counts), np.maximum(1 / (counts + 1), 0.01), rtol=1e-6
    )


@pytest.mark.parametrize("warmup", [0, 20])
@pytest.mark.parametrize("peak", [0.02, 3.0])
def test_annealed_follows_the_learning_rate(peak, warmup):
    """From a start at the peak the uniform average rules first, after a warmup the window does."""
    steps, mu_x = 400, 0.95
    lr = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    counts = np.arange(steps + 1)
    found = np.asarray(jax.vmap(averaging.annealed(mu_x, lr, peak))(counts))
    rates = np.asarray(jax.vmap(lr)(counts), np.float64)
    window = np.maximum(1, rates / peak / (1 - mu_x))
    np.testing.assert_allclose(found, np.minimum(counts / (counts + 1), 1 - 1 / window), atol=1e-6)
    assert found[-1] == 0.0  # at the end the learning rate is 0, and so is the lag


WARMUPS = {
    "none": (0, lambda count: 0.3),
    "one step": (1, optax.warmup_constant_schedule(0.0, 0.3, 1)),
    "linear": (37, optax.warmup_constant_schedule(0.1, 0.3, 37)),
    # Cut short: what counts is the largest learning rate so far, and the largest of all.
    "with a peak within": (30, lambda count: 0.01 + 0.3 * jnp.exp(-(((count - 12) / 6.0) ** 2))),
}


@pytest.mark.parametrize("power", [0, 1, 2, 2.5])
@pytest.mark.parametrize("name", WARMUPS)
def test_lr_weighted_weighs_by_the_largest_learning_rate_so_far(power, name):
    warmup, lr = WARMUPS[name]
    rates = np.array([float(lr(t)) for t in range(500)])
    w = np.maximum.accumulate(rates) ** power
    expected = np.divide(w, np.cumsum(w), out=np.ones(500), where=np.cumsum(w) > 0)
    found = weights(averaging.lr_weighted(lr, warmup, power), np.arange(500))
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("start", [0, 5, 74])
@pytest.mark.parametrize("step_power", [0, 2, 9.5])
@pytest.mark.parametrize("name", WARMUPS)
def test_lr_weighted_starts_late_and_weighs_late_iterates_more(step_power, start, name):
    """The averaging of ScheduleFree+, by its own recursion: c is the weight of the newest."""
    warmup, lr = WARMUPS[name]
    rates = np.broadcast_to(jax.vmap(lr)(jnp.arange(warmup + 1)), warmup + 1).astype(float)
    total, expected = 0.0, []
    for t in range(3000):
        w = (t + 1) ** step_power * rates[: t + 1].max() ** 2 if t >= start else 0.0
        total += w
        expected.append(w / total if total else 1.0)
    how = {"step_power": step_power, "start": start}
    schedule = averaging.lr_weighted(lr, warmup, **how)
    np.testing.assert_allclose(weights(schedule, np.arange(3000)), expected, rtol=5e-6)


def test_lr_weighted_takes_a_rate_that_is_traced():
    lr, counts = WARMUPS["linear"][1], np.array([0, 4, 37, 38, 80, 2999])

    def weight(peak, counts):
        how = {"step_power": 9.5, "start": 5}
        return averaging.lr_weighted(lambda t: peak * lr(t), 37, **how).weight(counts)

    np.testing.assert_allclose(jax.jit(weight)(3.0, counts), weight(1.0, counts), rtol=2e-5)


def test_lr_weighted_takes_a_constant_and_may_be_made_under_a_trace():
    np.testing.assert_allclose(
        weights(averaging.lr_weighted(0.1, 10), np.arange(50)), 1 / np.arange(1, 51), rtol=1e-6
    )
    traced = jax.jit(lambda t: averaging.lr_weighted(optax.linear_schedule(0.0, 1.0, 9), 9)(t))
    assert traced(3) == pytest.approx(1 - 3**2 / (1 + 4 + 9), rel=1e-6)


SCHEDULES = {
    "uniform": averaging.uniform(),
    "polynomial": averaging.polynomial(2.0),
    "warmed_up": averaging.warmed_up(0.99),
    "annealed": averaging.annealed(0.99, optax.cosine_decay_schedule(0.1, 1000), 0.1),
    "lr_weighted": averaging.lr_weighted(optax.linear_schedule(0.0, 0.1, 10), 10),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_stay_in_range_and_agree_with_their_weight(name):
    schedule, counts = SCHEDULES[name], np.concatenate([np.arange(2000), [10**7, 2**31 - 1]])
    values = np.asarray(jax.vmap(schedule)(counts))
    assert ((values >= 0) & (values <= 1)).all()
    assert (weights(schedule, counts) > 0).all()  # so that mu_x < 1 whatever float32 rounds it to
    np.testing.assert_allclose(1 - values, weights(schedule, counts), atol=1e-5)


@pytest.mark.parametrize("count", [10**6, 10**7, 10**8])
@pytest.mark.parametrize(
    ("schedule", "horizon"),
    [
        (averaging.uniform(), lambda t: t + 1),
        (averaging.polynomial(1), lambda t: (t + 2) / 2),
        (averaging.lr_weighted(optax.linear_schedule(0.1, 1.0, 1), 1), lambda t: t + 0.01),
    ],
    ids=["uniform", "polynomial", "lr_weighted"],
)
def test_late_steps_keep_their_weight(schedule, horizon, count):
    """mu_x itself would be off by 19 % at step 10 million in float32."""
    optimizer = gpa(optax.sgd(1.0), schedule, mu_y=0.0)
    params = jnp.zeros(())
    opt_state = optimizer.init(params)._replace(count=jnp.asarray(count, jnp.int32))
    _, opt_state = jax.jit(optimizer.update)(jnp.asarray(-1.0), opt_state, params)  # z' = 1
    assert float(opt_state.x) * horizon(count) == pytest.approx(1.0, rel=1e-5)


def test_a_uniform_average_of_ten_million_steps_is_right():
    """float32 all along; z is drawn anew each step, and a float64 sum judges."""
    steps, lanes = 10_000_000, 8
    optimizer = gpa(optax.sgd(1.0), averaging.uniform(), mu_y=0.0)
    params = jnp.zeros(lanes)

    def draw(t):  # a cheap hash of the step: uniform in [0, 1), mean 1/2
        lane = jnp.arange(lanes, dtype=jnp.uint32)
        bits = (t.astype(jnp.uint32) * lanes + lane) * jnp.uint32(2654435761)
        return ((bits ^ (bits >> 15)) >> 8).astype(jnp.float32) / 2**24

    def step(carry, t):
        params, opt_state = carry
        updates, opt_state = optimizer.update(params - draw(t), opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), None

    counts = jnp.arange(steps, dtype=jnp.int32)
    (params, opt_state), _ = jax.jit(lambda c: jax.lax.scan(step, c, counts))(
        (params, optimizer.init(params))
    )
    mean = np.zeros(lanes)
    for chunk in np.array_split(np.asarray(counts), 20):
        mean += np.asarray(jax.jit(jax.vmap(draw))(chunk), np.float64).sum(0) / steps
    np.testing.assert_allclose(eval_params(opt_state, params), mean, atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_schedule_drives_gpa_under_jit_and_injected(name):
    schedule = SCHEDULES[name]
    params = jnp.ones(3)
    plain = gpa(optax.sgd(0.1), schedule, mu_y=0.5)
    injected = optax.inject_hyperparams(gpa)(optax.sgd(0.1), mu_x=schedule, mu_y=0.5)
    static = optax.inject_hyperparams(gpa, static_args="mu_x")(
        optax.sgd(0.1), mu_x=schedule, mu_y=0.5
    )
    results = []
    for optimizer in (plain, injected, static):
        p, opt_state = params, optimizer.init(params)
        update = jax.jit(optimizer.update)
        for _ in range(30):
            updates, opt_state = update(p, opt_state, p)
            p = optax.apply_updates(p, updates)
        results.append(eval_params(opt_state, p))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
    np.testing.assert_allclose(results[2], results[0], rtol=1e-6)
