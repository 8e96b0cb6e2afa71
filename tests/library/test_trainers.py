"""Misuse in a trainer is found, right ones are never accused; params land on x at the end."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gpa_optax import (
    averaging,
    check_step,
    end_at_x,
    eval_params,
    gpa,
    gpa_adamw,
    iterates,
    single_worker_diloco,
)
from helpers.loops import double
from helpers.wrapped import AROUND, BASES, in_every_wrapper, make


def gradient(t, params):
    """Different in each entry, as a real one."""
    return jax.tree.map(lambda p: 0.5 * p**3 + jnp.sin(t + 1.0 + 7 * p), params)


def steps(optimizer, params, count, gradient=gradient, after=lambda params: params):
    """The state and params before each of some steps, and after the last."""
    seen = [(optimizer.init(params), params)]
    update = jax.jit(optimizer.update)
    for t in range(count):
        opt_state, params = seen[-1]
        updates, opt_state = update(gradient(t, params), opt_state, params)
        seen.append((opt_state, after(optax.apply_updates(params, updates))))
    return seen


def check_all(seen):
    for before, after in itertools.pairwise(seen):
        check_step(before, after)


@in_every_wrapper
def test_a_right_trainer_passes_in_every_wrapper(name, params):
    check_all(steps(AROUND[name](make()), params, 6))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("base_params", ["z", "y"])
def test_a_right_trainer_passes_with_every_base(base, base_params, params):
    check_all(steps(gpa(BASES[base], 0.9, 0.6, base_params=base_params), params, 6))


@settings(max_examples=60)
@given(
    dtype=st.sampled_from(["float32", "bfloat16", "float16", "float64", "complex64"]),
    state_dtype=st.sampled_from([None, jnp.float32, jnp.bfloat16]),
    lr=st.floats(1e-6, 0.3),
    mu_x=st.sampled_from([0.0, 0.3, 0.9967, averaging.uniform(), averaging.warmed_up(0.99)]),
    mu_y=st.sampled_from([0.0, 0.5, 0.9, 0.99, optax.linear_schedule(0.0, 0.9, 5)]),
    scale=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 100),
)
def test_a_right_trainer_passes_whatever_it_trains(dtype, state_dtype, lr, mu_x, mu_y, scale, seed):
    with double(dtype == "float64"):
        rng = np.random.default_rng(seed)
        params = {"w": jnp.asarray(scale * rng.normal(size=(4, 3)), dtype), "b": jnp.ones(2, dtype)}
        noise = [
            jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)
            for _ in range(5)
        ]
        optimizer = gpa(optax.adam(lr), mu_x, mu_y, state_dtype=state_dtype)
        seen = steps(optimizer, params, 5, lambda t, _: noise[t])
        # With float16 params and a state that is as narrow, Adam itself may divide by 0.
        assume(all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(seen[-1])))
        check_all(seen)


def frozen(params):
    return {"a": True, "b": {"c": False, "d": False}}


WRONG = {
    "scaled": lambda tx: optax.chain(tx, optax.scale(0.3)),
    "decayed": lambda tx: optax.chain(tx, optax.add_decayed_weights(-1e-3)),
    "frozen": lambda tx: optax.chain(tx, optax.freeze(frozen)),
    "clipped": lambda tx: optax.chain(tx, optax.clip(0.01)),
    "one leaf scaled": lambda tx: optax.chain(tx, optax.masked(optax.scale(0.5), frozen)),
    "lookahead": lambda tx: optax.chain(tx, optax.ema(0.9, debias=False)),
}


@pytest.mark.parametrize("base", ["adam", "sgd"])
@pytest.mark.parametrize("name", WRONG)
def test_what_touches_the_updates_after_gpa_is_found(name, base, params):
    optimizer = WRONG[name](gpa(getattr(optax, base)(0.02), 0.9))
    *_, before, after = steps(optimizer, params, 4)
    with pytest.raises(ValueError, match=r"params\['[ab]'\].*Let gpa be the last transformation"):
        check_step(before, after)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_params_that_were_moved_by_hand_are_found_and_named(dtype, params):
    def after(params):
        return {**params, "b": jax.tree.map(lambda p: 1.1 * p, params["b"])}

    params = jax.tree.map(lambda p: p.astype(dtype), params)
    *_, before, end = steps(make(), params, 3, after=after)
    with pytest.raises(ValueError, match=r"params\['b'\]" if dtype == jnp.bfloat16 else "params"):
        check_step(before, end)


def test_a_step_that_was_left_out_passes_and_one_that_moved_anything_does_not(params):
    optimizer = optax.apply_if_finite(make(), 3)
    seen = steps(optimizer, params, 3, lambda t, p: jax.tree.map(lambda p: p * jnp.nan, p))
    check_all(seen)
    opt_state, same = seen[-1]
    moved = jax.tree.map(lambda p: p + 1e-3, same)
    with pytest.raises(ValueError, match="GPA made no update"):
        check_step((opt_state, same), (opt_state, moved))
    accumulated = optax.MultiSteps(make(), 3).gradient_transformation()
    check_all(steps(accumulated, params, 7))


def test_two_gpas_are_checked_each_with_its_own_weight(params):
    optimizer = optax.partition(
        {"fast": gpa(optax.sgd(0.1), 0.5), "slow": gpa_adamw(0.01)}, {"a": "fast", "b": "slow"}
    )
    check_all(steps(optimizer, params, 5))
    scaled = optax.partition(
        {"fast": gpa(optax.sgd(0.1), 0.5), "slow": optax.chain(gpa_adamw(0.01), optax.scale(2.0))},
        {"a": "fast", "b": "slow"},
    )
    *_, before, after = steps(scaled, params, 4)
    with pytest.raises(ValueError, match=r"params\['b'\]"):
        check_step(before, after)


def test_states_that_are_not_successive_or_not_gpas_are_told(params):
    seen = steps(make(), params, 3)
    with pytest.raises(ValueError, match=r"2 updates later.*before and after one step"):
        check_step(seen[0], seen[2])
    with pytest.raises(ValueError, match="opt_state must hold a GPAState"):
        check_step(*steps(optax.adam(0.1), params, 1))


OPTIMIZERS = {
    "gpa": make,
    "chain": lambda: optax.chain(optax.clip_by_global_norm(0.1), make()),
    "part": lambda: optax.partition({"x": make(), "y": optax.sgd(0.1)}, {"a": "x", "b": "y"}),
    "diloco": functools.partial(single_worker_diloco, optax.adam(0.1), 3),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_params_land_on_x_with_the_last_update_and_not_before(name, dtype, params):
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    expected = steps(OPTIMIZERS[name](), params, 5)
    found = steps(end_at_x(OPTIMIZERS[name](), 5), params, 5)
    for (_, ours), (_, theirs) in zip(found[:-1], expected[:-1], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    x = eval_params(*expected[-1])
    assert not np.array_equal(x["a"], expected[-1][1]["a"])  # y is somewhere else
    tolerance = float(jnp.finfo(dtype).eps)
    jax.tree.map(
        lambda ours, x: np.testing.assert_allclose(
            np.float32(ours), np.float32(x), rtol=tolerance, atol=tolerance
        ),
        found[-1][1],
        x,
    )
    jax.tree.map(np.testing.assert_array_equal, eval_params(*found[-1]), x)


def test_training_after_the_end_starts_anew_at_x(params):
    seen = steps(end_at_x(make(), 3), params, 3)
    for sequence in iterates(*seen[-1]):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6),
            sequence,
            seen[-1][1],
        )


def test_end_at_x_asks_for_an_optimizer_with_gpa_and_a_number_of_steps(params):
    with pytest.raises(ValueError, match=r"steps must be a whole number .* got 0\. Give"):
        end_at_x(make(), 0)
    with pytest.raises(TypeError, match=r"optimizer must be an optax\.GradientTransformation"):
        end_at_x(optax.adam, 3)
    with pytest.raises(ValueError, match="opt_state must hold a GPAState"):
        steps(end_at_x(optax.adam(0.1), 3), params, 1)
