"""What users reported of comparable optimizers is not so here.

Of Schedule-Free, lookahead, the EMA and `reduce_on_plateau` in Optax, of solvers in JAXopt and of
averages in training code: each test tells the report that it answers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpa_optax import averaging, eval_params, gpa, gpa_adamw, iterates, single_worker_diloco
from helpers.acceptance import alone_and_around_every_base, each, parabola, rosenbrock
from helpers.acceptance import make as make_named
from helpers.loops import assert_close, run
from helpers.wrapped import LR, MU_X, MU_Y, everything, gradient, make


@each
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_multisteps_finds_updates_in_the_dtype_of_the_gradients(name, dtype):
    """The report: Schedule-Free's and Adafactor's were float32 where params are bfloat16, and the
    branches of `optax.MultiSteps` did not fit together."""
    optimizer = optax.MultiSteps(make_named(name), every_k_schedule=4)
    params, _, loss = parabola(dtype)
    opt_state = optimizer.init(params)
    for micro_step in range(4):
        updates, opt_state = jax.jit(optimizer.update)(jax.grad(loss)(params), opt_state, params)
        assert updates.dtype == dtype
        assert bool((updates == 0).all()) == (micro_step < 3)


@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "both"])
@pytest.mark.parametrize("make", [make, lambda: single_worker_diloco(optax.adam(LR), 3)])
def test_no_array_is_donated_twice(make, dtypes, params):
    """The report: a state that holds the initial params themselves, or one array in two places, and
    then "attempt to donate the same buffer twice" when params and state are donated together."""
    if dtypes != "float32":
        params["a"] = params["a"].astype(jnp.bfloat16)
    if dtypes == "bfloat16":
        params["b"] = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params["b"])
    expected, expected_state = run(make(), params, gradient, 5)
    optimizer = make()

    def step(t, params, opt_state):
        updates, opt_state = optimizer.update(gradient(t, params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    step = jax.jit(step, donate_argnums=(1, 2))
    opt_state = optimizer.init(params)
    for t in range(5):
        given = (params, opt_state)
        params, opt_state = step(t, params, opt_state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given) if leaf.ndim)
    assert_close(params, expected, 0)
    assert_close(eval_params(opt_state, params), eval_params(expected_state, expected), 0)


@pytest.mark.parametrize("make", [gpa, lambda base: single_worker_diloco(base, 4)])
@pytest.mark.parametrize(
    "name", ["prodigy", "dog", "dowg", "cocob", "mechanize", "madgrad", "lbfgs"]
)
def test_no_array_is_donated_twice_of_bases_that_keep_the_initial_params(name, make):
    """The same, where the base keeps what its `init` was given."""
    if name == "lbfgs":
        base = optax.lbfgs(0.1, linesearch=None)
    elif not hasattr(optax.contrib, name):
        pytest.skip("in later versions of Optax")
    else:
        arguments = {"mechanize": (optax.sgd(0.1),), "cocob": (), "prodigy": ()}
        base = getattr(optax.contrib, name)(*arguments.get(name, (0.1,)))
    optimizer, params = make(base), {"w": jnp.ones(3), "b": jnp.ones(2)}
    # These two store one array twice themselves.
    init = jax.jit(optimizer.init) if name in ("cocob", "lbfgs") else optimizer.init
    opt_state, grads = init(params), jax.tree.map(jnp.copy, params)
    update = jax.jit(optimizer.update, donate_argnums=(1, 2))
    for _ in range(2):
        updates, opt_state = update(grads, opt_state, jax.tree.map(jnp.copy, params))
        params = optax.apply_updates(params, updates)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


SCALARS = {
    "Python": 1.5,
    "NumPy": np.float32(1.5),
    "float32": jnp.asarray(1.5),
    "bfloat16": jnp.asarray(1.5, jnp.bfloat16),
}


@pytest.mark.parametrize("kind", SCALARS)
@pytest.mark.parametrize("make", [make, lambda: single_worker_diloco(optax.adam(LR), 3)])
def test_a_scalar_trains_as_an_array_of_one_entry(make, kind):
    """The report: params of no dimensions, or numbers of Python, were refused or changed their
    shape or dtype on the way."""
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    found, opt_state = run(make(), SCALARS[kind], gradient, 10)
    expected, expected_state = run(make(), jnp.full(1, 1.5, dtype), gradient, 10)
    x, expected_x = eval_params(opt_state, found), eval_params(expected_state, expected)
    for scalar, array in ((found, expected), (x, expected_x)):
        assert (scalar.shape, scalar.dtype) == ((), dtype)
        assert float(scalar) == float(array[0])


@pytest.mark.parametrize("mu_x", [0.9967, "lr-weighted"])
@pytest.mark.parametrize("mu_y", [0.0, 0.7, 0.99])
def test_a_learning_rate_of_zero_at_the_start_moves_no_bit_and_divides_nothing(mu_y, mu_x, params):
    """The report: Schedule-Free's weight of a step is the square of its learning rate over the sum
    of them, 0 / 0 where a warmup starts at 0, and from then on everything is NaN."""
    warmup = optax.join_schedules(
        [optax.constant_schedule(0.0), optax.linear_schedule(0.0, LR, 5)], [3]
    )
    if mu_x == "lr-weighted":
        mu_x = averaging.lr_weighted(warmup, 8)
    optimizer = gpa_adamw(warmup, mu_x=mu_x, mu_y=mu_y, weight_decay=0.1)
    found, opt_state = run(optimizer, params, gradient, 4)  # the fourth is the line's first, of 0
    for sequence in (found, *iterates(opt_state, found)):
        for leaf, start in zip(jax.tree.leaves(sequence), jax.tree.leaves(params), strict=True):
            assert np.asarray(leaf).tobytes() == np.asarray(start).tobytes()
    found, opt_state = run(optimizer, params, gradient, 12)
    for sequence in (found, *iterates(opt_state, found)):
        for leaf, start in zip(jax.tree.leaves(sequence), jax.tree.leaves(params), strict=True):
            assert np.isfinite(leaf).all()
            assert (np.asarray(leaf) != np.asarray(start)).any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_a_uniform_average_of_narrow_params_continues_beyond_256_steps(dtype):
    """The report: counted, or summed, in bfloat16 a number of steps stays at 256, and so does the
    weight of a step: x stops to follow, or follows too fast."""
    steps = 3000
    optimizer = gpa(optax.sgd(1e-3), averaging.uniform(), MU_Y)
    found, opt_state = run(optimizer, jnp.zeros(2, dtype), lambda t, p: -jnp.ones_like(p), steps)
    assert int(opt_state.count) == steps
    # z goes from 0 by 1e-3 in each step, and x is the mean of z_1 to z_3000.
    x, _, z = iterates(opt_state, found)
    np.testing.assert_allclose(z, steps * 1e-3, rtol=1e-3)
    np.testing.assert_allclose(x, (steps + 1) / 2 * 1e-3, rtol=1e-3)
    assert eval_params(opt_state, found).dtype == dtype


def test_eval_params_reads_the_average_out_of_nested_wrappers(params):
    """The report: `schedule_free_eval_params` takes the bare state alone, and fails on that of a
    chain, of injected hyperparameters or of accumulation."""
    optimizer = optax.MultiSteps(
        optax.apply_if_finite(
            optax.chain(
                optax.clip_by_global_norm(1e6),
                optax.masked(optax.inject_hyperparams(gpa)(optax.adam(LR), MU_X, MU_Y), everything),
            ),
            5,
        ),
        every_k_schedule=1,
    ).gradient_transformation()
    expected, expected_state = run(make(), params, gradient, 20)
    found, opt_state = run(optimizer, params, gradient, 20)
    assert_close(eval_params(opt_state, found), eval_params(expected_state, expected))


def test_many_steps_are_traced_once(params):
    traces = []
    optimizer = gpa(optax.adam(LR), averaging.warmed_up(0.99), optax.linear_schedule(0.5, 0.9, 20))

    @jax.jit
    def step(t, params, opt_state):
        traces.append(t)
        updates, opt_state = optimizer.update(gradient(t, params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    form = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), opt_state)
    for t in range(30):
        params, opt_state = step(t, params, opt_state)
    assert len(traces) == 1
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.weak_type), opt_state) == form


@alone_and_around_every_base
def test_nothing_is_compiled_again_at_the_second_step(name, caplog):
    """The report: a state in which some number had a weak type at first, and another afterwards,
    made `jax.jit` compile a training step twice. With an argument that nobody expects."""
    optimizer, (params, _, loss) = make_named(name), rosenbrock(jnp.float32)

    @jax.jit
    def step(params, opt_state):
        updates, opt_state = optimizer.update(
            jax.grad(loss)(params), opt_state, params, unexpected=1
        )
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    with jax.log_compiles():
        params, opt_state = step(params, opt_state)
        assert any("step" in record.getMessage() for record in caplog.records)
        caplog.clear()
        step(params, opt_state)
    assert not caplog.records
