"""Dtypes, and what the float32 master copy is for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpa_optax import averaging, eval_params, gpa, gpa_adamw, iterates, single_worker_diloco
from helpers.loops import run

OPTIMIZED = True  # see quick_compilation in conftest.py

LOW = [jnp.bfloat16, jnp.float16]


def dtypes(tree):
    return {
        str(leaf.dtype)
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    }


@pytest.mark.parametrize("grad_dtype", [None, jnp.float32])
@pytest.mark.parametrize("dtype", [*LOW, jnp.float32])
def test_updates_come_in_the_params_dtype_and_the_state_keeps_its_own(dtype, grad_dtype):
    params = {"w": jnp.ones((3, 2), dtype), "b": jnp.ones(2, dtype)}
    grads = jax.tree.map(lambda p: p.astype(grad_dtype or dtype), params)
    optimizer = gpa(optax.adamw(1e-2), averaging.warmed_up(0.9))
    opt_state = optimizer.init(params)
    form = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), opt_state)
    for _ in range(3):
        updates, opt_state = optimizer.update(grads, opt_state, params)
        assert dtypes(updates) == {jnp.dtype(dtype).name}
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), opt_state) == form
        params = optax.apply_updates(params, updates)
    assert dtypes(opt_state) == {"float32"}  # x, y, mu_y, and the base's moments
    assert dtypes(eval_params(opt_state, params)) == {jnp.dtype(dtype).name}
    assert (opt_state.y is None) == (dtype == jnp.float32)


def test_float64_params_have_a_float64_state(x64):
    params = jnp.ones(3, jnp.float64)
    found, opt_state = run(gpa_adamw(1e-2), params, lambda t, p: p, 3)
    assert found.dtype == jnp.float64
    assert dtypes(opt_state) == {"float64"}


def test_float32_params_stay_float32_in_x64_mode(x64):
    params = jnp.ones(3, jnp.float32)
    optimizer = gpa(optax.adamw(optax.linear_schedule(0.1, 0.0, 10)), averaging.uniform())
    found, opt_state = run(optimizer, params, lambda t, p: p, 3)
    assert found.dtype == opt_state.x.dtype == jnp.float32


def test_a_tree_of_several_dtypes():
    params = {"low": jnp.ones(2, jnp.bfloat16), "full": jnp.ones(3, jnp.float32)}
    found, opt_state = run(gpa(optax.sgd(0.1)), params, lambda t, p: p, 3)
    assert {name: leaf.dtype for name, leaf in found.items()} == {
        name: leaf.dtype for name, leaf in params.items()
    }
    assert dtypes(opt_state) == {"float32"}


@pytest.mark.parametrize(
    ("params_dtype", "state_dtype", "has_y"),
    [
        (jnp.bfloat16, jnp.float32, True),
        (jnp.bfloat16, jnp.bfloat16, False),
        (jnp.float32, jnp.float32, False),
        (jnp.float32, jnp.bfloat16, False),  # x alone is narrow
        (jnp.float32, "float32", False),
    ],
)
def test_state_dtype_decides_what_is_stored(params_dtype, state_dtype, has_y):
    optimizer = gpa(optax.sgd(0.1), 0.5, state_dtype=state_dtype)
    found, opt_state = run(optimizer, jnp.ones(4, params_dtype), lambda t, p: p, 3)
    assert found.dtype == params_dtype
    assert opt_state.x.dtype == jnp.dtype(state_dtype)
    assert (opt_state.y is not None) == has_y
    if has_y:
        assert opt_state.y.dtype == jnp.dtype(state_dtype)


@pytest.mark.parametrize("dtype", LOW)
def test_the_master_copy_tracks_float32_where_a_naive_state_stalls(dtype):
    """Tiny steps down a slope: each is far below half a unit in the last place of the params."""
    steps, lr = 2000, 1e-4 if dtype == jnp.bfloat16 else 1e-5
    start = jnp.ones(4)

    def descend(params, **arguments):
        optimizer = gpa(optax.sgd(lr), 0.95, 0.7, **arguments)
        found, opt_state = run(optimizer, params, lambda t, p: jnp.ones_like(p), steps)
        return np.asarray(eval_params(opt_state, found), np.float32)

    exact = descend(start)
    way = float(start[0] - exact[0])
    assert way == pytest.approx(steps * lr, rel=0.02)
    np.testing.assert_allclose(
        descend(start.astype(dtype)), exact, rtol=float(jnp.finfo(dtype).eps)
    )
    naive = descend(start.astype(dtype), state_dtype=dtype)
    assert (np.abs(naive - exact) > 0.5 * way).all()


@pytest.mark.parametrize("dtype", LOW)
def test_low_precision_params_are_the_cast_of_the_master_copy(dtype, rng):
    params = jnp.asarray(rng.normal(size=50), dtype)
    optimizer = gpa(optax.adamw(1e-3), 0.9)
    opt_state = optimizer.init(params)
    for _ in range(100):
        updates, opt_state = optimizer.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
        # The difference of two low-precision numbers can round, where one is much the smaller.
        error = np.abs(np.asarray(opt_state.y) - np.asarray(params, np.float32))
        assert (error <= float(jnp.finfo(dtype).eps) * (1e-2 + np.abs(opt_state.y))).all()
    np.testing.assert_array_equal(iterates(opt_state, params).y, opt_state.y)


@pytest.mark.parametrize("mu_y", [0.7, 0.99])
def test_a_narrow_state_leaves_z_where_it_is(mu_y, rng):
    """x is rounded to bfloat16, y is formed from that x, and so z comes back: also at first."""
    params = jnp.asarray(rng.normal(size=100), jnp.float32)
    optimizer = gpa(optax.sgd(0.1), 0.9, mu_y, state_dtype=jnp.bfloat16)
    opt_state = optimizer.init(params)
    np.testing.assert_array_equal(iterates(opt_state, params).z, params)
    start = params
    for step in range(20):
        grads = params if step == 0 else jnp.zeros_like(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        z = iterates(opt_state, params).z
        np.testing.assert_allclose(z, 0.9 * start, rtol=1e-3, atol=1e-4)


def test_float64_without_x64_is_float32():
    """As everywhere in JAX; a copy that is no more precise would be one buffer too many."""
    optimizer = gpa(optax.sgd(0.1), state_dtype=jnp.float64)
    opt_state = optimizer.init(jnp.ones(2))
    assert opt_state.x.dtype == jnp.float32
    assert opt_state.y is None


@pytest.mark.parametrize("state_dtype", [None, jnp.bfloat16])
def test_wider_gradients_do_not_widen_the_state(state_dtype):
    params = jnp.ones(3, jnp.bfloat16)
    optimizer = gpa(optax.adamw(1e-2), 0.9, state_dtype=state_dtype)
    opt_state = optimizer.init(params)
    form = jax.tree.map(lambda leaf: leaf.dtype, opt_state)
    updates, opt_state = optimizer.update(jnp.ones(3, jnp.float32), opt_state, params)
    assert updates.dtype == jnp.bfloat16
    assert jax.tree.map(lambda leaf: leaf.dtype, opt_state) == form


def test_mu_y_zero_is_exact_to_the_last_bit(rng):
    """y is z then, however far x is; the textbook form x + (y - x) would round."""
    params = jnp.asarray(rng.normal(size=100) * 10.0 ** rng.integers(-6, 6, size=100), jnp.bfloat16)
    optimizer = gpa(optax.sgd(0.1), 0.9, mu_y=0.0)
    opt_state, z = optimizer.init(params), params.astype(jnp.float32)
    for _ in range(5):
        grads = jnp.asarray(rng.normal(size=100), jnp.float32)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        z = optax.apply_updates(z, -0.1 * grads)
        np.testing.assert_array_equal(opt_state.y, z)
        np.testing.assert_array_equal(iterates(opt_state, params).z, z)


def test_diloco_keeps_its_slow_weights_in_float32():
    params = jnp.ones(4, jnp.bfloat16)
    optimizer = single_worker_diloco(optax.sgd(0.01), 2)
    found, opt_state = run(optimizer, params, lambda t, p: p, 6)
    assert found.dtype == jnp.bfloat16
    assert opt_state.slow.dtype == jnp.float32
    assert eval_params(opt_state, found).dtype == jnp.bfloat16


def test_the_step_count_saturates():
    """From two steps before int32's largest value on; schedules see that value for ever."""
    last = np.iinfo(np.int32).max
    mu_y = optax.linear_schedule(0.5, 0.9, 10)
    for mu_x in (averaging.uniform(), averaging.polynomial(2), averaging.warmed_up(0.99)):
        optimizer = gpa(optax.adamw(optax.linear_schedule(0.1, 0.01, 10)), mu_x, mu_y)
        params = jnp.ones(2)
        opt_state = optimizer.init(params)
        base_state = optax.tree.set(opt_state.base_state, count=jnp.asarray(last - 2, jnp.int32))
        opt_state = opt_state._replace(
            count=jnp.asarray(last - 2, jnp.int32), base_state=base_state
        )
        for count in (last - 1, last, last, last):
            updates, opt_state = optimizer.update(params, opt_state, params)
            params = optax.apply_updates(params, updates)
            assert opt_state.count == count
            assert opt_state.last_mu_y == np.float32(0.9)
            for sequence in iterates(opt_state, params):
                assert (np.abs(sequence - 1) < 0.2).all()
            assert (updates < 0).all()  # the learning rate is its last, 0.01
