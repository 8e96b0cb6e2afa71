"""The aliases are GPA around the base, with all of the base's arguments in its order."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gpa_optax
from benchmarks.oracle import Oracle, adamw
from gpa_optax import (
    GPAState,
    SingleWorkerDiLoCoState,
    annealed_adamw,
    anytime_adamw,
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
from helpers.loops import run
from helpers.needs import NEEDS_MUON, marked

ALIASES = {
    gpa_adamw: optax.adamw,
    gpa_sgd: optax.sgd,
    gpa_lion: optax.lion,
    gpa_muon: optax.contrib.muon,
}
by_alias = pytest.mark.parametrize(
    "alias", marked(NEEDS_MUON, ALIASES, gpa_muon), ids=lambda alias: alias.__name__
)

PARAMS = {"w": jnp.eye(4, 3) + 0.1, "b": jnp.ones(3)}


def gradient(t, params):
    return jax.tree.map(lambda p: p - 0.3 + 0.1 * jnp.cos(1.0 * t), params)


def mask(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


@by_alias
def test_signature_is_the_bases_after_mu_x_and_mu_y(alias):
    ours = inspect.signature(alias).parameters
    theirs = inspect.signature(ALIASES[alias]).parameters
    own = {"mu_x", "mu_y", "base_params", "state_dtype"}
    # By keyword, so that optax.adamw(1e-3, 0.9, 0.999) cannot become mu_x and mu_y unnoticed.
    assert [name for name, p in ours.items() if p.kind != p.KEYWORD_ONLY] == ["learning_rate"]
    assert [*ours][:3] == ["learning_rate", "mu_x", "mu_y"]
    assert [name for name in ours if name not in own] == [*theirs]
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
    defaults = inspect.signature(gpa).parameters
    assert all(ours[name].default == defaults[name].default for name in own - {"mu_x"})
    for parameters in (ours, defaults):
        mu_x = [parameters["mu_x"].default(t) for t in (0, 1, 1000)]
        np.testing.assert_allclose(mu_x, [0.0, 0.5, 0.9967], rtol=1e-6)


# Every argument of every base, away from its default.
ARGUMENTS = [
    (gpa_adamw, {"b1": 0.8}),
    (gpa_adamw, {"b2": 0.9}),
    (gpa_adamw, {"eps": 1e-2}),
    (gpa_adamw, {"eps_root": 1e-2}),
    (gpa_adamw, {"mu_dtype": jnp.bfloat16}),
    (gpa_adamw, {"weight_decay": 0.5}),
    (gpa_adamw, {"weight_decay": 0.5, "mask": mask}),
    (gpa_adamw, {"nesterov": True}),
    (gpa_adamw, {"b1": 0.0, "b2": 0.9}),
    (gpa_adamw, {"b1": 0.0, "eps": 1e-2}),
    (gpa_adamw, {"b1": 0.0, "weight_decay": 0.5}),
    (gpa_adamw, {"b1": 0.0, "weight_decay": 0.5, "mask": mask}),
    (gpa_sgd, {"momentum": 0.9}),
    (gpa_sgd, {"momentum": 0.9, "nesterov": True}),
    (gpa_sgd, {"momentum": 0.9, "accumulator_dtype": jnp.bfloat16}),
    (gpa_lion, {"b1": 0.5}),
    (gpa_lion, {"b2": 0.5}),
    (gpa_lion, {"mu_dtype": jnp.bfloat16}),
    (gpa_lion, {"weight_decay": 0.5}),
    (gpa_lion, {"weight_decay": 0.5, "mask": mask}),
    (gpa_muon, {"ns_coeffs": (2.0, -1.5, 0.5)}),
    (gpa_muon, {"ns_steps": 2}),
    (gpa_muon, {"beta": 0.5}),
    (gpa_muon, {"eps": 0.3}),
    (gpa_muon, {"weight_decay": 0.5}),
    (gpa_muon, {"weight_decay": 0.5, "weight_decay_mask": lambda p: {"w": False, "b": False}}),
    (gpa_muon, {"mu_dtype": jnp.bfloat16}),
    (gpa_muon, {"nesterov": False}),
    (gpa_muon, {"adaptive": True}),
    (gpa_muon, {"preconditioning": "spectral"}),
    (gpa_muon, {"adam_b1": 0.5}),
    (gpa_muon, {"adam_b2": 0.5}),
    (gpa_muon, {"adam_eps_root": 1e-2}),
    (gpa_muon, {"adam_weight_decay": 0.5}),
    (gpa_muon, {"adam_learning_rate": 0.3}),
    (
        gpa_muon,
        {"muon_weight_dimension_numbers": {"w": None, "b": None}},
    ),
    (gpa_muon, {"consistent_rms": 0.2}),
]


@pytest.mark.parametrize(
    ("alias", "arguments"),
    marked(NEEDS_MUON, ARGUMENTS, gpa_muon),
    ids=lambda v: getattr(v, "__name__", None) or "-".join(v),
)
def test_every_argument_reaches_the_base(alias, arguments):
    found, opt_state = run(alias(0.05, mu_x=0.9, mu_y=0.6, **arguments), PARAMS, gradient, 8)
    by_hand = gpa(ALIASES[alias](0.05, **arguments), 0.9, 0.6)
    expected, expected_state = run(by_hand, PARAMS, gradient, 8)
    for name in PARAMS:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
        x, wanted = eval_params(opt_state, found), eval_params(expected_state, expected)
        np.testing.assert_allclose(x[name], wanted[name], atol=1e-6)

    # And the last argument makes a difference, in the result or in what is stored.
    *fewer, _ = arguments
    without = run(
        alias(0.05, mu_x=0.9, mu_y=0.6, **{k: arguments[k] for k in fewer}), PARAMS, gradient, 8
    )
    pairs = zip(jax.tree.leaves((found, opt_state)), jax.tree.leaves(without), strict=True)
    assert any(a.dtype != b.dtype or not np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("alias", [gpa_adamw, gpa_lion, anytime_adamw])
def test_a_schedule_of_weight_decay_asks_for_an_optax_that_counts(alias, monkeypatch):
    """Optax 0.2.6 takes one, and calls it with count 0 at every update."""
    monkeypatch.setattr(optax, "__version__", "0.2.6")
    more = {"warmup_steps": 5} if alias is anytime_adamw else {}
    alias(0.1, weight_decay=0.1, **more)
    with pytest.raises(ImportError, match=r"A schedule of weight_decay needs optax 0\.2\.7"):
        alias(0.1, weight_decay=optax.linear_schedule(0.1, 0.0, 10), **more)


def test_gpa_muon_asks_for_the_optax_that_has_its_arguments(monkeypatch):
    """Where it is called; optax 0.2.6 has a muon without the newest of them."""

    def older_muon(learning_rate, ns_coeffs=(), ns_steps=5, *, nesterov=True):
        raise AssertionError("not reached")

    monkeypatch.setattr(gpa_optax._aliases, "muon", older_muon)
    monkeypatch.setattr(optax, "__version__", "0.2.6")
    with pytest.raises(ImportError, match=r"gpa_muon needs optax 0\.2\.8 .*this is optax 0\.2\.6"):
        gpa_muon(0.1)


@by_alias
def test_gpas_own_arguments_reach_it(alias):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    naive = alias(0.05, state_dtype=jnp.bfloat16).init(params)
    assert naive.y is None
    assert naive.x["w"].dtype == jnp.bfloat16
    decay = {} if alias is gpa_sgd else {"weight_decay": 0.9}
    results = [
        run(alias(0.1, mu_x=0.9, mu_y=0.6, base_params=which, **decay), PARAMS, gradient, 8)[0]["w"]
        for which in "zy"
    ]
    assert np.allclose(*results, atol=1e-6) == (alias is gpa_sgd)


@by_alias
def test_floats_and_schedules_work_for_all_three(alias):
    constant = run(alias(0.05, mu_x=0.9, mu_y=0.6), PARAMS, gradient, 10)
    scheduled = run(
        alias(lambda t: 0.05, mu_x=optax.constant_schedule(0.9), mu_y=lambda t: 0.6 + 0.0 * t),
        PARAMS,
        gradient,
        10,
    )
    for (found, state), (expected, expected_state) in ((scheduled, constant),):
        x, wanted = eval_params(state, found), eval_params(expected_state, expected)
        for name in PARAMS:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
            np.testing.assert_allclose(x[name], wanted[name], atol=1e-6)
    linear = optax.linear_schedule(0.05, 0.0, 10)
    moving, state = run(
        alias(linear, mu_x=averaging.uniform(), mu_y=optax.linear_schedule(0, 0.9, 9)),
        PARAMS,
        gradient,
        10,
    )
    assert float(state.last_mu_y) == pytest.approx(0.9)
    assert not np.allclose(moving["w"], constant[0]["w"])


@by_alias
def test_all_three_can_be_injected_and_changed(alias):
    optimizer = optax.inject_hyperparams(
        lambda learning_rate, mu_x, mu_y: alias(learning_rate, mu_x=mu_x, mu_y=mu_y)
    )(learning_rate=0.05, mu_x=0.9, mu_y=0.6)
    found, opt_state = run(optimizer, PARAMS, gradient, 5)
    expected, expected_state = run(alias(0.05, mu_x=0.9, mu_y=0.6), PARAMS, gradient, 5)
    update = jax.jit(optimizer.update)
    changed = alias(0.01, mu_x=0.5, mu_y=0.1)
    for step in range(5):
        opt_state.hyperparams.update(
            learning_rate=jnp.asarray(0.01), mu_x=jnp.asarray(0.5), mu_y=jnp.asarray(0.1)
        )
        updates, opt_state = update(gradient(step, found), opt_state, found)
        found = optax.apply_updates(found, updates)
        updates, expected_state = changed.update(gradient(step, expected), expected_state, expected)
        expected = optax.apply_updates(expected, updates)
    for name in PARAMS:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)


@pytest.mark.parametrize("alias", [gpa_adamw, gpa_sgd, gpa_lion])
def test_an_alias_itself_can_be_injected(alias):
    optimizer = optax.inject_hyperparams(alias)(0.05, mu_x=0.9, mu_y=0.6)
    found, opt_state = run(optimizer, PARAMS, gradient, 5)
    assert {"learning_rate", "mu_x", "mu_y"} <= set(opt_state.hyperparams)
    expected, _ = run(alias(0.05, mu_x=0.9, mu_y=0.6), PARAMS, gradient, 5)
    np.testing.assert_allclose(found["w"], expected["w"], atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_adamw_without_b1_keeps_no_first_moment_and_steps_alike(weight_decay):
    arguments = {"b1": 0.0, "b2": 0.95, "weight_decay": weight_decay, "mask": mask}
    found, opt_state = run(gpa_adamw(0.05, mu_x=0.9, mu_y=0.9, **arguments), PARAMS, gradient, 30)
    by_hand = gpa(optax.adamw(0.05, **arguments), 0.9, 0.9)
    expected, expected_state = run(by_hand, PARAMS, gradient, 30)
    for name in PARAMS:
        x, wanted = eval_params(opt_state, found), eval_params(expected_state, expected)
        np.testing.assert_allclose(x[name], wanted[name], atol=1e-6)

    def buffers(state):
        return sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)

    size = sum(p.size for p in jax.tree.leaves(PARAMS))
    assert buffers(opt_state) == 2 * size  # v and x, as many as AdamW's m and v
    assert buffers(optax.adamw(0.05).init(PARAMS)) == 2 * size
    assert buffers(expected_state) == 3 * size


def test_adamw_without_b1_but_with_eps_root_is_adamw():
    """What scale_by_rms cannot do is left to scale_by_adam."""
    arguments = {"b1": 0.0, "eps_root": 1e-2}
    found, _ = run(gpa_adamw(0.05, mu_x=0.9, mu_y=0.9, **arguments), PARAMS, gradient, 8)
    expected, _ = run(gpa(optax.adamw(0.05, **arguments), 0.9, 0.9), PARAMS, gradient, 8)
    np.testing.assert_allclose(found["w"], expected["w"], atol=1e-6)


def test_static_zeros_save_the_buffer_under_injection_as_well():
    optimizer = optax.inject_hyperparams(gpa_adamw, static_args=("b1", "eps_root"))(0.05, b1=0.0)
    found, opt_state = run(optimizer, PARAMS, gradient, 3)
    assert not hasattr(opt_state.inner_state.base_state[0], "mu")
    expected, _ = run(gpa_adamw(0.05, b1=0.0), PARAMS, gradient, 3)
    np.testing.assert_allclose(found["w"], expected["w"], atol=1e-6)


def test_no_hyperparameter_is_called_like_a_field_of_a_state():
    """Or optax.tree.set(state, mu_y=...) around inject_hyperparams would overwrite both."""
    functions = (*ALIASES, annealed_adamw, anytime_adamw, gpa, single_worker_diloco)
    named = {name for function in functions for name in inspect.signature(function).parameters}
    assert not named & {*GPAState._fields, *SingleWorkerDiLoCoState._fields}


def test_an_injected_mu_y_is_the_one_that_optax_finds_and_sets():
    optimizer = optax.inject_hyperparams(gpa_sgd)(0.3, mu_x=0.9, mu_y=0.7)
    params = jnp.array([1.0, -2.0])
    opt_state = optimizer.init(params)
    for t in range(6):
        if t == 3:
            z = iterates(opt_state, params).z
            opt_state = optax.tree.set(opt_state, mu_y=jnp.asarray(0.2))
            np.testing.assert_array_equal(iterates(opt_state, params).z, z)
        updates, opt_state = optimizer.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
        assert optax.tree.get(opt_state, "mu_y") == np.float32(0.7 if t < 3 else 0.2)


STEPS, WARMUP, PEAK = 40, 8, 0.05


def trapezoid(t):
    return PEAK * min(t / WARMUP, (STEPS - t) / (STEPS - WARMUP))


def plateau(t):
    return PEAK * min(t / WARMUP, 1)


def annealed_weight(t):
    return max(1 / (t + 1), 1 / max(1, 0.1 * STEPS * trapezoid(t) / PEAK))


def anytime_weight(t):
    total = sum(plateau(s) ** 2 for s in range(t + 1))
    return plateau(t) ** 2 / total if total else 1


@pytest.mark.parametrize("base_params", ["z", "y"])
@pytest.mark.parametrize(
    ("make", "lr", "weight"),
    [
        (functools.partial(annealed_adamw, PEAK, STEPS, WARMUP, window=0.1), trapezoid,
         annealed_weight),
        (functools.partial(anytime_adamw, PEAK, WARMUP), plateau, anytime_weight),
    ],
    ids=["annealed", "anytime"],
)  # fmt: skip
def test_whole_settings_are_the_oracles_with_their_schedule_and_average(
    make, lr, weight, base_params
):
    optimizer = make(
        mu_y=0.8, b2=0.9, eps=1e-3, weight_decay=0.2, mask=mask, base_params=base_params
    )
    found, opt_state = run(optimizer, PARAMS, gradient, STEPS)
    judges = {
        name: Oracle({name: PARAMS[name]}, adamw, base_params, b1=0.0, b2=0.9, eps=1e-3,
                     weight_decay=0.2 * (name == "w"))
        for name in PARAMS
    }  # fmt: skip
    for name, judge in judges.items():
        for t in range(STEPS):
            judge.step(gradient(t, judge.y), lr(t), 1 - weight(t), 0.8)
        np.testing.assert_allclose(found[name], judge.y[name], atol=2e-5)
        np.testing.assert_allclose(iterates(opt_state, found).x[name], judge.x[name], atol=2e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda peak: annealed_adamw(peak, 10, 2),
        lambda peak: anytime_adamw(peak, 2),
        lambda peak: gpa_adamw(
            lambda t: peak * jnp.minimum(t / 2, 1),
            mu_x=averaging.lr_weighted(lambda t: peak * jnp.minimum(t / 2, 1), 2),
        ),
    ],
)
def test_vmap_maps_over_learning_rates(make):
    def x(peak):
        found, opt_state = run(make(peak), PARAMS, gradient, 10)
        return eval_params(opt_state, found)

    peaks = jnp.array([0.01, 0.1])
    together = jax.vmap(x)(peaks)
    for i, peak in enumerate(peaks):
        jax.tree.map(
            lambda found, expected: np.testing.assert_allclose(found[i], expected, rtol=1e-5),
            together,
            x(peak),
        )


def test_whole_settings_keep_no_first_moment_and_adjust_an_injected_learning_rate():
    for make, arguments in ((annealed_adamw, (0.1, 10, 2)), (anytime_adamw, (0.1, 2))):
        leaves = jax.tree.leaves(make(*arguments).init(PARAMS))
        assert sum(leaf.size for leaf in leaves if leaf.ndim) == 2 * sum(
            leaf.size for leaf in PARAMS.values()
        )
        static = {"steps", "warmup_steps"} & {*inspect.signature(make).parameters}
        injected = optax.inject_hyperparams(make, static_args=static)
        found, _ = run(injected(*arguments), PARAMS, gradient, 10)
        expected, _ = run(make(*arguments), PARAMS, gradient, 10)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)
