"""What a user may do that would go wrong without a word: refused, or done right.

Each was tried as a program first; what was right already is tested where its subject is.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpa_optax import (
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

PARAMS = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)


def gradient(t, params):
    return jax.tree.map(lambda p: 0.5 * p + 0.1 * jnp.cos(1.0 * t), params)


def by_shape(params):
    return jax.tree.map(lambda p: jnp.ndim(p) > 1, params)


def by_path(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "bias" not in jax.tree_util.keystr(path), params
    )


DECAYING = {
    gpa_adamw: ({"weight_decay": 0.5}, "mask"),
    gpa_lion: ({"weight_decay": 0.5}, "mask"),
    gpa_muon: ({"weight_decay": 0.5}, "weight_decay_mask"),
    annealed_adamw: ({"steps": 10, "warmup_steps": 0}, "mask"),
    anytime_adamw: ({"warmup_steps": 0}, "mask"),
}


@pytest.mark.parametrize("mask", [by_shape, by_path], ids=lambda mask: mask.__name__)
@pytest.mark.parametrize(
    "alias", marked(NEEDS_MUON, DECAYING, gpa_muon), ids=lambda alias: alias.__name__
)
def test_a_mask_that_injection_takes_for_a_schedule_is_refused_and_a_static_one_decays(alias, mask):
    """Called with the step count it gives one boolean: nothing would decay, or everything."""
    arguments, name = DECAYING[alias]
    arguments = {**arguments, name: mask}
    static = {"steps", "warmup_steps", "muon_weight_dimension_numbers"} & {*arguments}
    injected = optax.inject_hyperparams(alias, static_args=static)(0.1, **arguments)
    with pytest.raises(ValueError, match=f"{name} must be a tree of booleans.*static_args"):
        injected.init(PARAMS)

    optimizer = optax.inject_hyperparams(alias, static_args={*static, name})(0.1, **arguments)
    updates, _ = optimizer.update(ZEROS, optimizer.init(PARAMS), PARAMS)
    expected, _ = alias(0.1, **arguments).update(
        ZEROS, alias(0.1, **arguments).init(PARAMS), PARAMS
    )
    np.testing.assert_allclose(updates["kernel"], expected["kernel"], atol=1e-7)
    assert (updates["kernel"] < 0).all()
    np.testing.assert_array_equal(updates["bias"], 0)


def test_lr_weighted_refuses_a_warmup_that_is_not_over():
    """It would average the rest of the warmup uniformly."""
    schedule = optax.warmup_constant_schedule(0.0, 0.1, 100)
    for steps in (1, 10, 99):
        with pytest.raises(
            ValueError, match=f"warmup_steps.*got {steps}, after which it still grow"
        ):
            averaging.lr_weighted(schedule, steps)
    for later in (schedule, lambda count: schedule(count + 1)):
        found = averaging.lr_weighted(later, 100)
        rates = np.array([later(t) for t in range(150)], np.float64) ** 2
        expected = rates / np.cumsum(rates).clip(1e-30)
        np.testing.assert_allclose(
            [found.weight(t) for t in range(2, 150)], expected[2:], rtol=1e-5
        )
    averaging.lr_weighted(optax.cosine_decay_schedule(0.1, 100), 0)
    averaging.lr_weighted(optax.warmup_cosine_decay_schedule(0.0, 0.1, 20, 100), 20)
    jax.jit(lambda peak: averaging.lr_weighted(lambda t: peak * schedule(t), 10)(5))(2.0)


SCHEDULES = {
    "line": optax.linear_schedule(0.1, 0.0, 1000),
    "cosine": optax.warmup_cosine_decay_schedule(0.0, 0.1, 3000, 100_000),
    "one cycle": optax.cosine_onecycle_schedule(777, 0.1),
    "restarts": optax.sgdr_schedule(
        [
            {"init_value": 0.0, "peak_value": 0.1, "decay_steps": 500, "warmup_steps": 20},
            {"init_value": 0.0, "peak_value": 0.05, "decay_steps": 900, "warmup_steps": 20},
        ]
    ),
    "1 / sqrt": lambda count: 0.1 * jnp.minimum((count + 1) / 400, jnp.sqrt(400 / (count + 1))),
    "constant": optax.constant_schedule(0.1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_annealed_refuses_a_peak_that_is_not_the_schedules(name):
    """The old peak of twice the rate would double the window, and ten times the peak close it."""
    averaging.annealed(0.95, SCHEDULES[name], 0.1)
    for peak in (0.05, 1.0):
        with pytest.raises(ValueError, match="peak must be the largest value of learning_rate"):
            averaging.annealed(0.95, SCHEDULES[name], peak)
        # A peak that jit traces has no value to look at.
        jax.jit(lambda peak, t: averaging.annealed(0.95, SCHEDULES[name], peak)(t))(peak, 5)


@pytest.mark.parametrize("weight", [0.01, None, lambda: 0.01])
def test_an_averaging_schedule_of_no_function_of_the_count_is_refused(weight):
    with pytest.raises(TypeError, match="weight must be a"):
        averaging.AveragingSchedule(weight)


def test_a_wrapper_that_skips_steps_is_conditionally_mask_and_not_conditionally_transform():
    """The latter hands raw gradients on, which are then added to the params."""
    optimizer = gpa_sgd(0.1, mu_x=0.9, mu_y=0.7)

    def even(step, **_):
        return step % 2 == 0

    found, opt_state = run(optax.conditionally_mask(optimizer, even), PARAMS, gradient, 10)
    expected, its_state = run(optimizer, PARAMS, lambda t, params: gradient(2 * t, params), 5)
    for ours, theirs in ((found, expected), (opt_state.inner_state.x, its_state.x)):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ours, theirs)
    wrong, _ = run(optax.conditionally_transform(optimizer, even), PARAMS, gradient, 10)
    assert (wrong["kernel"] > 2).all()


def test_freezing_in_front_leaves_weight_decay_and_freezing_in_the_base_leaves_nothing():
    mask = {"kernel": True, "bias": False}
    base = optax.adamw(0.1, weight_decay=0.5)
    in_front, _ = run(optax.chain(optax.freeze(mask), gpa(base, 0.9)), PARAMS, gradient, 10)
    assert (in_front["kernel"] < 0.9).all()
    inside, opt_state = run(gpa(optax.chain(base, optax.freeze(mask)), 0.9), PARAMS, gradient, 10)
    for sequence in iterates(opt_state, inside):
        np.testing.assert_array_equal(sequence["kernel"], PARAMS["kernel"])


def test_a_constraint_in_the_base_holds_for_all_three():
    """After GPA it would hold for the params alone: x goes below 0."""

    def pull(t, params):
        return jax.tree.map(lambda p: p + 2.0, params)

    inside = gpa(optax.chain(optax.sgd(0.5), optax.keep_params_nonnegative()), 0.9, 0.7)
    found, opt_state = run(inside, PARAMS, pull, 100)
    for sequence in iterates(opt_state, found):
        np.testing.assert_allclose(sequence["kernel"], 0.0, atol=1e-3)
        assert (sequence["kernel"] > -1e-6).all()
    after = optax.chain(gpa(optax.sgd(0.5), 0.9, 0.7), optax.keep_params_nonnegative())
    found, opt_state = run(after, PARAMS, pull, 100)
    assert (found["kernel"] == 0).all()
    assert (eval_params(opt_state, found)["kernel"] < -0.1).all()


def test_a_plateau_in_the_base_scales_z_and_keeps_the_three_equations():
    """After GPA it would scale y alone."""
    plateau = optax.contrib.reduce_on_plateau(patience=1, factor=0.5, cooldown=0)
    inside = gpa(optax.chain(optax.sgd(0.1), plateau), 0.9, 0.7)
    opt_state, params, scale = inside.init(PARAMS), PARAMS, 1.0
    plain_state = plateau.init(PARAMS)
    x = y = z = np.ones(2)
    for t in range(20):
        grads = gradient(t, params)
        _, plain_state = plateau.update(ZEROS, plain_state, value=1.0)
        scale = float(plain_state.scale)
        z = z - 0.1 * scale * np.asarray(gradient(t, y))
        x = 0.9 * x + 0.1 * z
        y = 0.7 * x + 0.3 * z
        updates, opt_state = inside.update(grads, opt_state, params, value=1.0)
        params = optax.apply_updates(params, updates)
    assert scale < 0.01
    for found, expected in zip(iterates(opt_state, params), (x, y, z), strict=True):
        np.testing.assert_allclose(found["bias"], expected, atol=1e-5)


def test_lbfgs_without_a_line_search_needs_its_params_where_the_gradients_are():
    """Its pairs of differences are those of y; with z they do not belong together."""
    curvature = jnp.array([1.0, 10.0, 100.0])
    base = optax.chain(optax.scale_by_lbfgs(), optax.scale(-1.0))
    losses = {}
    for point in ("y", "z"):
        optimizer = gpa(base, 0.5, 0.5, base_params=point)
        params, opt_state = run(optimizer, jnp.ones(3), lambda t, p: curvature * p, 60)
        losses[point] = float(jnp.sum(curvature * eval_params(opt_state, params) ** 2))
    assert losses["y"] < 1e-12
    assert losses["z"] > 1.0


def test_params_that_are_changed_in_place_after_init_do_not_change_the_state():
    """NumPy's arrays can be; the state must not share their memory."""
    optimizer = gpa_sgd(0.1, mu_x=0.9, mu_y=0.7)
    params = jax.tree.map(np.array, PARAMS)
    opt_state = optimizer.init(params)
    for t in range(10):
        grads = jax.tree.map(np.asarray, gradient(t, params))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        for name in params:
            params[name] += np.asarray(updates[name])
    expected, its_state = run(optimizer, PARAMS, gradient, 10)
    x, wanted = eval_params(opt_state, params), eval_params(its_state, expected)
    for name in PARAMS:
        np.testing.assert_allclose(params[name], expected[name], atol=1e-6)
        np.testing.assert_allclose(x[name], wanted[name], atol=1e-6)


@pytest.mark.parametrize("opaque", [False, True])
def test_sam_around_gpa_is_gpa_with_the_gradients_of_sam(opaque):
    optimizer, radius = gpa_sgd(0.1, mu_x=0.9, mu_y=0.7), 0.05

    def half(params, _=None):
        return jax.tree.map(lambda p: 0.5 * p, params)

    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(radius))
    sam = optax.contrib.sam(optimizer, adversary, sync_period=2, opaque_mode=opaque)
    found, opt_state = PARAMS, sam.init(PARAMS)
    for _ in range(10 if opaque else 20):
        more = {"grad_fn": half} if opaque else {}
        updates, opt_state = sam.update(half(found), opt_state, found, **more)
        found = optax.apply_updates(found, updates)
    expected, its_state = PARAMS, optimizer.init(PARAMS)
    for _ in range(10):
        norm = optax.tree.norm(half(expected))
        worst = jax.tree.map(lambda p, g: p + radius * g / norm, expected, half(expected))
        updates, its_state = optimizer.update(half(worst), its_state, expected)
        expected = optax.apply_updates(expected, updates)
    x, wanted = eval_params(opt_state, found), eval_params(its_state, expected)
    for name in PARAMS:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-6)
        np.testing.assert_allclose(x[name], wanted[name], atol=1e-6)


def test_a_sync_period_given_as_a_float_counts_beyond_the_integers_of_float32():
    optimizer = single_worker_diloco(optax.sgd(0.1), 4.0)
    opt_state = optimizer.init(PARAMS)._replace(count=jnp.asarray(2**24 + 1, jnp.int32))
    synchronized = []
    for _ in range(8):
        before = opt_state.slow
        _, opt_state = optimizer.update(PARAMS, opt_state, PARAMS)
        if not np.array_equal(before["bias"], opt_state.slow["bias"]):
            synchronized.append(int(opt_state.count) - 2**24)
    assert synchronized == [4, 8]
