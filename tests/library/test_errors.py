"""Bad input gets an error that names the argument, its value and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.bad_input import CASES, COSINE, PARAMS, SGD
from gpa_optax import (
    averaging,
    eval_params,
    gpa,
    iterates,
    single_worker_diloco,
)
from helpers.needs import NEEDS_MUON, marked

OF_MUON = [case for case in CASES if "gpa_muon" in case.call]


@pytest.mark.parametrize(
    "case",
    marked(NEEDS_MUON, [(case,) for case in CASES], *OF_MUON),
    ids=[case.call for case in CASES],
)
def test_bad_input_is_named_with_its_value_and_a_remedy(case):
    with pytest.raises(case.error) as caught:
        case.run()
    message = str(caught.value)
    assert all(part in message for part in case.parts), message
    assert re.search(r"\b(Give|Call|Let|Leave)\b", message)  # what to do


def test_values_at_the_ends_of_the_ranges_are_fine():
    for mu in (0, 0.0, np.float32(0.5), jnp.asarray(0.99), 1 - 1e-7):
        gpa(SGD, mu_x=mu, mu_y=mu)
    single_worker_diloco(SGD, 1, 0.0, 0.0)
    single_worker_diloco(SGD, np.int64(3), COSINE)
    averaging.from_diloco(1, 0.0), averaging.from_horizon(1), averaging.polynomial(0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (averaging.polynomial, "power"),
        (lambda steps: averaging.lr_weighted(0.1, steps), "warmup_steps"),
    ],
)
def test_a_table_cannot_be_made_of_traced_values(make, name):
    with pytest.raises(TypeError, match=f"{name} must be known when the schedule is made.*Give"):
        jax.jit(lambda value: make(value)(3))(1.0)


def test_traced_values_are_the_users_own():
    @jax.jit
    def step(mu):
        optimizer = gpa(SGD, mu_x=mu, mu_y=mu)
        params = jnp.ones(2)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        return updates + averaging.warmed_up(mu)(3)

    assert np.isfinite(step(0.5)).all()
    step(1.0)  # no error: nobody can look


@pytest.mark.parametrize("make", [gpa, lambda base: single_worker_diloco(base, 4)])
@pytest.mark.parametrize("leaf", [jnp.arange(3), np.ones(2, bool), jax.random.key(0), 7])
def test_leaves_that_cannot_be_averaged_are_named_at_init(make, leaf):
    params = {"layers": [{"w": jnp.ones(2)}, {"ids": leaf}]}
    with pytest.raises(TypeError, match=re.escape("params['layers'][1]['ids']")) as caught:
        make(SGD).init(params)
    assert "None in place of such leaves" in str(caught.value)
    # The remedy works.
    make(SGD).init({"layers": [{"w": jnp.ones(2)}, {"ids": None}]})


BAD_TREES = [
    ({"w": jnp.ones((3, 2))}, ["['b']", "(2,)"]),
    ({**PARAMS, "extra": jnp.ones(7)}, ["['extra']", "(7,)"]),
    ({"w": jnp.ones((2, 3)), "b": jnp.ones(2)}, ["['w']", "(2, 3)", "(3, 2)"]),
    ({"w": jnp.ones((3, 2)), "b": None}, ["['b']", "(2,)"]),
    ({"w": {"kernel": jnp.ones((3, 2))}, "b": jnp.ones(2)}, ["['w']", "(3, 2)"]),
    (jnp.ones(2), ["(2,)"]),
]


@pytest.mark.parametrize(
    "optimizer", [gpa(SGD), single_worker_diloco(SGD, 4)], ids=["gpa", "diloco"]
)
@pytest.mark.parametrize(("tree", "parts"), BAD_TREES)
def test_trees_that_differ_from_the_state_are_named_by_leaf_and_shape(optimizer, tree, parts):
    opt_state = optimizer.init(PARAMS)
    for what, grads, params in (("gradients", tree, PARAMS), ("params", PARAMS, tree)):
        with pytest.raises(ValueError, match=f"The {what} ") as caught:
            optimizer.update(grads, opt_state, params)
        message = str(caught.value)
        assert all(part in message for part in [*parts, "Call init again"]), message
    with pytest.raises(ValueError, match="params have") as caught:
        eval_params(opt_state, tree)
    assert all(part in str(caught.value) for part in [*parts, "Give the params"])


@pytest.mark.parametrize("make", [gpa, lambda base: single_worker_diloco(base, 4)])
def test_update_without_params_says_how_to_call_it(make):
    optimizer = make(SGD)
    with pytest.raises(ValueError, match=r"needs params.*None.*update\(grads, opt_state, params\)"):
        optimizer.update(PARAMS, optimizer.init(PARAMS))


@pytest.mark.parametrize("read", [eval_params, iterates])
@pytest.mark.parametrize("state", [SGD.init(PARAMS), optax.adam(0.1).init(PARAMS), None, PARAMS])
def test_a_state_without_gpa_is_refused(read, state):
    with pytest.raises(ValueError, match=r"opt_state must hold a GPAState.*gpa_optax\.gpa"):
        read(state, PARAMS)


def test_iterates_of_an_ensemble_are_read_under_vmap():
    optimizer = gpa(SGD, mu_y=0.9)
    params = jnp.arange(9.0).reshape(3, 3)
    opt_state = jax.vmap(optimizer.init)(params)
    with pytest.raises(ValueError, match=r"an ensemble of \(3,\).*jax\.vmap\(iterates\)"):
        iterates(opt_state, params)
    np.testing.assert_array_equal(jax.vmap(iterates)(opt_state, params).z, params)
    np.testing.assert_array_equal(eval_params(opt_state, params), params)
