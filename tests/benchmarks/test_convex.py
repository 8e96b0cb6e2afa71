"""Convex problems: what the theory promises holds, and the benchmark that measures it runs."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from helpers.needs import needs

needs("sklearn", "grain", "tyro")

from benchmarks import convex
from gpa_optax import averaging, gpa, iterates

FEW = (("uniform", 0.0), ("uniform", 0.9), ("1 - 1/T", 0.0), ("0", 0.9))
UNIFORM, SCHEDULE_FREE, TOO_LONG, NO_AVERAGE = (convex.label(*method) for method in FEW)


@pytest.fixture(scope="module", autouse=True)
def few_methods():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(convex.AVERAGES, "0", lambda T: 0.0)
        patch.setattr(convex, "METHODS", FEW)
        yield


@pytest.fixture(scope="module")
def gaps():
    """On least squares at a constant rate: F - F* by method, (iterate, seed)."""
    with jax.enable_x64(True):
        rates = jnp.full((len(convex.DECAYS), 1), 0.25)
        keys = jax.random.split(jax.random.key(0), 8)
        found = convex.train(convex.least_squares(1), 1000, rates, keys)
    return {name: np.asarray(gap[:, :, 0, 0]) for name, gap in found.items()}


def test_averaging_beats_the_last_iterate_under_noise(gaps):
    for method in (UNIFORM, SCHEDULE_FREE):
        [[_, _, high]] = convex.ratios([gaps[method][0]], [gaps["SGD"][0]])
        assert high < 0.8, method


def test_mu_x_zero_is_sgd(gaps):
    np.testing.assert_allclose(gaps[NO_AVERAGE], gaps["SGD"], rtol=1e-9)


def test_x_of_a_uniform_average_is_the_mean_of_the_base(gaps):
    np.testing.assert_allclose(gaps[UNIFORM][0], gaps["SGD"][1], rtol=1e-9)


def test_a_window_as_long_as_the_run_does_not_forget_its_start(gaps):
    assert (gaps[TOO_LONG][0] > 3 * gaps["SGD"][1]).all()


@pytest.mark.parametrize("mu_x", [0.9, averaging.uniform()])
@pytest.mark.parametrize("mu_y", [0.0, 0.9])
def test_convexity_bounds_x_by_the_regret_of_the_base(x64, mu_x, mu_y):
    """The inequality at every step, from which the guarantee follows."""
    problem = convex.least_squares(4)
    gradient = jax.jit(jax.grad(problem.gap))
    optimizer = gpa(optax.sgd(0.5), mu_x, mu_y)
    y = jnp.zeros_like(problem.minimizer)
    opt_state = optimizer.init(y)
    step = jax.jit(optimizer.update)
    for t in range(100):
        x_before = opt_state.x
        noise = 0.5 * jax.random.normal(jax.random.key(t), y.shape)
        updates, opt_state = step(gradient(y) + noise, opt_state, y)
        y = optax.apply_updates(y, updates)
        x, _, z = iterates(opt_state, y)
        mu = mu_x(t) if callable(mu_x) else mu_x
        progress = mu / (1 - mu) * (problem.gap(x) - problem.gap(x_before))
        regret = gradient(y) @ (z - problem.minimizer)
        assert problem.gap(x) + progress <= regret + 1e-9


def test_newton_finds_the_minimizer(x64):
    problem = convex.logistic_regression(4)
    assert jnp.linalg.norm(jax.grad(problem.gap)(problem.minimizer)) < 1e-13
    assert problem.gap(problem.minimizer) == 0


def test_the_short_form_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr("sys.argv", ["convex", "--quick", "--out", str(out)])
    assert convex.main() == 0
    results = json.loads(out.read_text())
    assert convex.table(results) in capsys.readouterr().out
    for problem in results["problems"].values():
        tuned = problem["runs"]["constant"]
        assert (
            np.mean(tuned["SGD"]["averaged"]["tuned"][-1])
            < 0.2 * problem["scales"]["gap at the start"]
        )
    monkeypatch.setattr(
        convex,
        "CURVES",
        [c for c in convex.CURVES if c[2] in ("SGD", UNIFORM, SCHEDULE_FREE, TOO_LONG)],
    )
    convex.figure(results).savefig(tmp_path / "figure.png")


def test_a_run_that_diverges_has_no_number():
    assert convex.rounded(np.array([[1.234567, np.inf]])) == [[1.2346, None]]
    assert convex.ratios([[1.0, None]], [[1.0, 1.0]]) == [None]
    assert convex.slope([[1.0, None]], [10]) is None


def test_ratios_are_paired_and_slopes_are_fitted():
    base = [[1.0, 4.0, 9.0], [1.0, 1.0, 1.0]]
    gaps = [[0.5, 2.0, 4.5], [0.1, 0.1, 0.1]]
    np.testing.assert_allclose(convex.ratios(gaps, base), [[0.5] * 3, [0.1] * 3])
    np.testing.assert_allclose(convex.slope([[1.0, 2.0], [0.1, 0.2]], [10, 100]), [-1.0] * 3)
