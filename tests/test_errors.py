"""Bad input gets an error that names the argument, its value and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpa_optax import (
    averaging,
    eval_params,
    gpa,
    gpa_adamw,
    gpa_lion,
    gpa_muon,
    gpa_sgd,
    iterates,
    single_worker_diloco,
)

NAN, INF = float("nan"), float("inf")
SGD = optax.sgd(0.1)
COSINE = optax.cosine_decay_schedule(0.1, 10)

# call, error, parts of the message: the argument, the value, the remedy
ARGUMENTS = [
    (lambda: gpa(SGD, mu_x=1.0), ValueError, ["mu_x", "1.0", "[0, 1)", "0.9967"]),
    (lambda: gpa(SGD, mu_x=-0.1), ValueError, ["mu_x", "-0.1", "[0, 1)"]),
    (lambda: gpa(SGD, mu_x=NAN), ValueError, ["mu_x", "nan", "[0, 1)"]),
    (lambda: gpa(SGD, mu_x=INF), ValueError, ["mu_x", "inf", "[0, 1)"]),
    (lambda: gpa(SGD, mu_x=jnp.asarray(2.0)), ValueError, ["mu_x", "2.", "[0, 1)"]),
    (lambda: gpa(SGD, mu_x=np.float32(1)), ValueError, ["mu_x", "1.0", "[0, 1)"]),
    (lambda: gpa(SGD, mu_x="0.9"), TypeError, ["mu_x", "'0.9'", "float", "schedule"]),
    (lambda: gpa(SGD, mu_x=None), TypeError, ["mu_x", "None", "float"]),
    (lambda: gpa(SGD, mu_x=True), TypeError, ["mu_x", "True", "float"]),
    (lambda: gpa(SGD, mu_x=0.5j), TypeError, ["mu_x", "0.5j", "float"]),
    (lambda: gpa(SGD, mu_x=np.ones(2)), TypeError, ["mu_x", "float"]),
    (lambda: gpa(SGD, averaging.uniform), TypeError, ["mu_x", "uniform", "averaging.uniform()"]),
    (lambda: gpa(SGD, mu_y=lambda: 0.5), TypeError, ["mu_y", "lambda", "step count"]),
    (lambda: gpa(SGD, mu_y=1.0), ValueError, ["mu_y", "1.0", "z", "cannot be recovered", "0.99"]),
    (lambda: gpa(SGD, mu_y=1), ValueError, ["mu_y", "cannot be recovered"]),
    (lambda: gpa(SGD, mu_y=1 - 1e-9), ValueError, ["mu_y", "0.999999999", "cannot be recovered"]),
    (lambda: gpa(SGD, mu_y=1.5), ValueError, ["mu_y", "1.5", "[0, 1)"]),
    (lambda: gpa(SGD, mu_y=NAN), ValueError, ["mu_y", "nan", "[0, 1)"]),
    (lambda: gpa(SGD, base_params="x"), ValueError, ["base_params", "'x'", '"z"', '"y"']),
    (lambda: gpa(optax.adamw), TypeError, ["base_optimizer", "adamw", "optax.adamw(1e-3)"]),
    (lambda: gpa(0.1), TypeError, ["base_optimizer", "0.1", "GradientTransformation"]),
    (
        lambda: gpa(optax.MultiSteps(SGD, 2)),
        TypeError,
        ["base_optimizer", "MultiSteps", "gradient_transformation()"],
    ),
    (lambda: gpa(SGD, state_dtype=jnp.int32), TypeError, ["state_dtype", "int32", "float32"]),
    (lambda: gpa(SGD, state_dtype=bool), TypeError, ["state_dtype", "bool", "float32"]),
    (lambda: gpa(SGD, state_dtype=jnp.complex64), TypeError, ["state_dtype", "complex64"]),
    (lambda: gpa(SGD, state_dtype="float33"), TypeError, ["state_dtype", "'float33'", "float32"]),
    (lambda: gpa_adamw(0.1, mu_x=1.0), ValueError, ["mu_x", "1.0"]),
    (lambda: gpa_sgd(0.1, mu_y=1.0), ValueError, ["mu_y", "1.0"]),
    (lambda: gpa_lion(0.1, base_params="w"), ValueError, ["base_params", "'w'"]),
    (lambda: gpa_muon(0.1, state_dtype=int), TypeError, ["state_dtype"]),
    (lambda: single_worker_diloco(optax.sgd, 4), TypeError, ["inner_optimizer", "sgd"]),
    (lambda: single_worker_diloco(SGD, 0), ValueError, ["sync_period", "0", "at least 1", "32"]),
    (lambda: single_worker_diloco(SGD, 2.5), ValueError, ["sync_period", "2.5", "whole number"]),
    (lambda: single_worker_diloco(SGD, INF), ValueError, ["sync_period", "inf"]),
    (lambda: single_worker_diloco(SGD, "4"), TypeError, ["sync_period", "'4'"]),
    (lambda: single_worker_diloco(SGD, 4, -1.0), ValueError, ["outer_learning_rate", "-1.0"]),
    (lambda: single_worker_diloco(SGD, 4, 0.7, 1.0), ValueError, ["outer_momentum", "1.0", "0.9"]),
    (lambda: averaging.from_diloco(0), ValueError, ["inner_steps", "0", "32"]),
    (lambda: averaging.from_diloco(8, 1.0), ValueError, ["outer_momentum", "1.0", "0.9"]),
    (lambda: averaging.from_horizon(0.5), ValueError, ["steps", "0.5", "100"]),
    (lambda: averaging.from_horizon(INF), ValueError, ["steps", "inf"]),
    (lambda: averaging.from_horizon("100"), TypeError, ["steps", "'100'"]),
    (lambda: averaging.polynomial(-1), ValueError, ["power", "-1", "uniform"]),
    (lambda: averaging.polynomial(NAN), ValueError, ["power", "nan"]),
    (lambda: averaging.polynomial(1e6), ValueError, ["power", "1000000.0", "1000"]),
    (lambda: averaging.warmed_up(1.0), ValueError, ["mu_x", "1.0", "from_horizon"]),
    (lambda: averaging.warmed_up(COSINE), TypeError, ["mu_x", "0.99"]),
    (lambda: averaging.annealed(1.0, COSINE, 0.1), ValueError, ["mu_x", "1.0"]),
    (lambda: averaging.annealed(0.9, 0.1, 0.1), TypeError, ["learning_rate", "0.1", "warmed_up"]),
    (lambda: averaging.annealed(0.9, COSINE, 0.0), ValueError, ["peak", "0.0", "positive"]),
    (lambda: averaging.annealed(0.9, COSINE, NAN), ValueError, ["peak", "nan"]),
    (lambda: averaging.lr_weighted(COSINE, -1), ValueError, ["warmup_steps", "-1"]),
    (lambda: averaging.lr_weighted(COSINE, 2.5), ValueError, ["warmup_steps", "2.5", "whole"]),
    (lambda: averaging.lr_weighted(COSINE, 5, -2), ValueError, ["power", "-2", "2"]),
    (
        lambda: averaging.lr_weighted(0.0, 5),
        ValueError,
        ["learning_rate", "0.0", "first 5 + 1 steps"],
    ),
    (lambda: averaging.lr_weighted(-0.1, 5), ValueError, ["learning_rate", "-0.1"]),
    (lambda: averaging.lr_weighted(NAN, 5), ValueError, ["learning_rate", "nan"]),
    (lambda: averaging.lr_weighted("fast", 5), TypeError, ["learning_rate", "'fast'", "schedule"]),
]


@pytest.mark.parametrize(("call", "error", "parts"), ARGUMENTS)
def test_a_bad_argument_is_named_with_its_value_and_a_remedy(call, error, parts):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "Give" in message  # what to do


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
        (lambda lr: averaging.lr_weighted(lr, 5), "learning_rate"),
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
    assert "optax.masked" in str(caught.value)
    # The remedy works.
    mask = {"layers": [{"w": True}, {"ids": False}]}
    optax.masked(make(SGD), mask).init(params)


PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
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


def test_other_containers_with_the_same_leaves_are_told_apart():
    optimizer = gpa(SGD)
    opt_state = optimizer.init((jnp.ones(1), jnp.ones(1)))
    with pytest.raises(ValueError, match="the leaves agree, the containers do not"):
        optimizer.update([jnp.ones(1), jnp.ones(1)], opt_state, (jnp.ones(1), jnp.ones(1)))


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


def test_iterates_of_diloco_are_refused():
    with pytest.raises(ValueError, match="GPAState"):
        iterates(single_worker_diloco(SGD, 4).init(PARAMS), PARAMS)


def test_two_averages_of_one_leaf_are_refused():
    optimizer = optax.chain(gpa(SGD), gpa(SGD))
    with pytest.raises(ValueError, match=r"2 averages of the leaf at \['b'\]"):
        eval_params(optimizer.init(PARAMS), PARAMS)
