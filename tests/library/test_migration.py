"""A run can change over from AdamW to GPA and back, with its moments."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpa_optax import averaging, eval_params, gpa, gpa_adamw, iterates

SCHEDULE = optax.linear_schedule(0.05, 0.0, 40)
BASE = optax.adamw(SCHEDULE, b2=0.9, weight_decay=0.1)
BEFORE, AFTER = 12, 8


def gradient(t, params):
    """The same whatever the params, whose bfloat16 rounds otherwise with AdamW than with GPA."""
    return jax.tree.map(
        lambda p: jnp.sin(t + jnp.arange(1.0, p.size + 1)).reshape(p.shape).astype(p.dtype), params
    )


def wide(tree):
    return jax.tree.map(
        lambda leaf: leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf,
        tree,
    )


def take_steps(optimizer, params, opt_state, steps):
    update = jax.jit(optimizer.update)
    for t in steps:
        updates, opt_state = update(gradient(t, params), opt_state, params)
        params = optax.apply_updates(params, updates)
    return params, opt_state


@pytest.fixture(params=[jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def in_progress(request):
    """Params and the state of AdamW after some steps."""
    params = {"a": jnp.linspace(-1, 1, 6, dtype=request.param), "b": jnp.ones((2, 3))}
    return take_steps(BASE, params, BASE.init(params), range(BEFORE))


def into(optimizer, params, adamw_state, **more):
    new = optimizer.init(params)
    cast = jax.tree.map(lambda n, o: o.astype(n.dtype), new.base_state, adamw_state)
    return new._replace(base_state=cast, **more)


def assert_close(found, expected, atol=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=atol)


@pytest.mark.parametrize(("mu_x", "mu_y"), [(0.9, 0.0), (averaging.uniform(), 0.0), (0.0, 0.7)])
def test_where_the_params_are_the_bases_they_continue_as_adamws_would(mu_x, mu_y, in_progress):
    params, adamw_state = in_progress
    steps = range(BEFORE, BEFORE + AFTER)
    optimizer = gpa(BASE, mu_x, mu_y)
    opt_state = into(optimizer, params, adamw_state)
    form = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), opt_state)
    found, opt_state = take_steps(optimizer, params, opt_state, steps)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), opt_state) == form
    exact, its_state = wide(in_progress)  # as GPA's base sees them
    for t in steps:
        updates, its_state = BASE.update(wide(gradient(t, params)), its_state, exact)
        exact = optax.apply_updates(exact, updates)
    assert_close(iterates(opt_state, found).z, exact)


def test_the_average_begins_at_the_change_or_continues_with_the_learning_rate(in_progress):
    params, adamw_state = in_progress
    for mu_x, count, expected in (
        (averaging.uniform(), 0, 1.0),
        (averaging.annealed(0.75, SCHEDULE, 0.05), BEFORE, 1 / (4 * (1 - BEFORE / 40))),
    ):
        optimizer = gpa(BASE, mu_x, 0.7)
        opt_state = into(optimizer, params, adamw_state, count=jnp.asarray(count, jnp.int32))
        start = iterates(opt_state, params)
        found, opt_state = take_steps(optimizer, params, opt_state, [BEFORE])
        end = iterates(opt_state, found)
        for x, x_before, z in zip(*map(jax.tree.leaves, (end.x, start.x, end.z)), strict=True):
            np.testing.assert_allclose(x, x_before + expected * (z - x_before), atol=1e-6)


def test_the_second_moment_continues_without_a_first(in_progress):
    params, adamw_state = in_progress
    optimizer = gpa_adamw(SCHEDULE, mu_x=0.0, mu_y=0.9, b1=0.0, b2=0.9, weight_decay=0.1)
    new = optimizer.init(params)
    second, *rest = new.base_state
    moments = jax.tree.map(lambda n, o: o.astype(n.dtype), second.nu, adamw_state[0].nu)
    second = second._replace(count=adamw_state[0].count, nu=moments)
    assert jax.tree.structure(rest) == jax.tree.structure([*adamw_state[1:]])
    opt_state = new._replace(base_state=(second, *adamw_state[1:]))
    found, opt_state = take_steps(optimizer, params, opt_state, [BEFORE])

    exact = wide(params)
    bare = optax.adamw(SCHEDULE, b1=0.0, b2=0.9, weight_decay=0.1)
    zeroed = adamw_state[0]._replace(
        mu=jax.tree.map(jnp.zeros_like, exact), nu=moments, count=adamw_state[0].count
    )
    updates, _ = bare.update(wide(gradient(BEFORE, params)), (zeroed, *adamw_state[1:]), exact)
    assert_close(iterates(opt_state, found).z, optax.apply_updates(exact, updates))


@pytest.mark.parametrize("where", ["x", "y"])
def test_out_of_gpa_adamw_continues_with_the_moments_of_the_base(where, in_progress):
    params, adamw_state = in_progress
    optimizer = gpa(BASE, 0.9, 0.7)
    opt_state = into(optimizer, params, adamw_state)
    params, opt_state = take_steps(optimizer, params, opt_state, range(BEFORE, BEFORE + AFTER))
    start = eval_params(opt_state, params) if where == "x" else params
    state = opt_state.base_state
    assert state[0].count == BEFORE + AFTER
    found, after = take_steps(BASE, start, state, [BEFORE + AFTER])

    # AdamW's update by hand, from these moments and at this learning rate.
    t = BEFORE + AFTER
    for name, p in start.items():
        g = np.asarray(gradient(t, start)[name], np.float64)
        m = 0.9 * np.asarray(state[0].mu[name], np.float64) + 0.1 * g
        v = 0.9 * np.asarray(state[0].nu[name], np.float64) + 0.1 * g**2
        direction = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.9 ** (t + 1))) + 1e-8)
        before = np.asarray(p, np.float64)
        expected = before - 0.05 * (1 - t / 40) * (direction + 0.1 * before)
        tolerance = 1e-6 if p.dtype == jnp.float32 else 2e-2
        np.testing.assert_allclose(np.asarray(found[name], np.float64), expected, atol=tolerance)
    assert after[0].mu["a"].dtype == jnp.float32


def test_in_nnx_the_state_is_replaced_in_the_new_optimizer():
    nnx = pytest.importorskip("flax.nnx")

    def train(model, optimizer, steps):
        for t in steps:
            optimizer.update(model, gradient(t, nnx.state(model, nnx.Param)))

    model, twin = (nnx.Linear(3, 2, rngs=nnx.Rngs(0)) for _ in range(2))
    old = nnx.Optimizer(model, BASE, wrt=nnx.Param)
    plain = nnx.Optimizer(twin, BASE, wrt=nnx.Param)
    train(model, old, range(5))
    train(twin, plain, range(10))
    new = nnx.Optimizer(model, gpa(BASE, 0.9, 0.0), wrt=nnx.Param)
    new.opt_state = new.opt_state._replace(base_state=old.opt_state)
    train(model, new, range(5, 8))
    back = nnx.Optimizer(model, BASE, wrt=nnx.Param)
    back.opt_state = new.opt_state.base_state
    train(model, back, range(8, 10))
    np.testing.assert_allclose(np.asarray(model.kernel), np.asarray(twin.kernel), atol=1e-6)
