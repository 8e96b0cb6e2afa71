"""The library agrees with the float64 oracle, for every base, decay point and schedule."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import oracle
from gpa_optax import gpa, iterates

STEPS = 500

BASES = {
    "sgd": lambda lr: optax.sgd(lr),
    "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
    "adamw": lambda lr: optax.adamw(lr, weight_decay=0.1),
    "lion": lambda lr: optax.lion(lr, weight_decay=0.1),
}


# Each maps the step count to (lr, mu_x, mu_y), for numbers of Python and of JAX (where int / int
# would be float32 even in x64 mode).
def constants(t):
    return 0.01, 0.97, 0.7


def schedules(t):
    return 0.02 / (1 + 0.01 * t), 1 - 2 / (t + 3.0), 0.9 / (1 + 0.002 * t)


def jumps(t):
    """All three change at once in mid-run, as a user does who turns knobs."""
    return (0.01, 0.9, 0.8) if t < 200 else (0.004, 0.99, 0.2) if t < 350 else (0.008, 0.95, 0.95)


def make_optimizer(base, base_params, settings):
    if settings is jumps:

        def factory(learning_rate, mu_x, mu_y):
            return gpa(BASES[base](learning_rate), mu_x, mu_y, base_params=base_params)

        return optax.inject_hyperparams(factory)(*jumps(0))
    if settings is schedules:
        lr, mu_x, mu_y = (lambda t, i=i: schedules(t)[i] for i in range(3))
    else:
        lr, mu_x, mu_y = constants(0)
    return gpa(BASES[base](lr), mu_x, mu_y, base_params=base_params)


def check_against_oracle(base, base_params, settings, dtype, tolerance, rng):
    shapes = {"matrix": (4, 3), "vector": (5,), "scalar": ()}
    start = {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    # Noise and a pull towards 0: a wrong y would be felt through its own gradients.
    noise = [{n: rng.normal(size=s).astype(dtype) for n, s in shapes.items()} for _ in range(STEPS)]

    optimizer = make_optimizer(base, base_params, settings)
    params = jax.tree.map(jnp.asarray, start)
    opt_state = optimizer.init(params)
    judge = oracle.Oracle(start, oracle.BASES[base], base_params)

    @jax.jit
    def step(params, opt_state, noise):
        gradients = jax.tree.map(lambda p, n: 0.3 * p + n, params, noise)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    for t in range(STEPS):
        if settings is jumps:
            names = ("learning_rate", "mu_x", "mu_y")
            for name, value in zip(names, jumps(t), strict=True):
                opt_state.hyperparams[name] = jnp.asarray(value, dtype)
        params, opt_state = step(params, opt_state, noise[t])
        judge.step({n: 0.3 * judge.y[n] + noise[t][n] for n in shapes}, *settings(t))
        if t % 50 == 49:
            found = iterates(opt_state, params)
            for sequence, expected in ((found.x, judge.x), (found.y, judge.y), (found.z, judge.z)):
                for name, value in expected.items():
                    error = np.abs(np.asarray(sequence[name]) - value) / (1 + np.abs(value))
                    assert error.max() < tolerance, (t, name, error.max())


@pytest.mark.parametrize("settings", [constants, schedules, jumps])
@pytest.mark.parametrize("base_params", ["z", "y"])
@pytest.mark.parametrize("base", BASES)
def test_float32_agrees_with_the_oracle_to_2e_5(base, base_params, settings, rng):
    check_against_oracle(base, base_params, settings, np.float32, 2e-5, rng)


@pytest.mark.parametrize("settings", [constants, schedules, jumps])
@pytest.mark.parametrize("base_params", ["z", "y"])
@pytest.mark.parametrize("base", BASES)
def test_float64_agrees_with_the_oracle_to_1e_12(base, base_params, settings, rng, x64):
    check_against_oracle(base, base_params, settings, np.float64, 1e-12, rng)


mus = st.floats(0, 0.99)
shapes = st.lists(st.integers(1, 4), max_size=3).map(tuple)
trees = st.recursive(
    shapes.map(lambda shape: np.zeros(shape, np.float32)),
    lambda leaf: (
        st.lists(leaf, max_size=3)
        | st.lists(leaf, max_size=3).map(tuple)
        | st.dictionaries(st.sampled_from("abcd"), leaf, max_size=3)
        | st.just(None)
    ),
    max_leaves=6,
)


@st.composite
def schedule_or_constant(draw, values):
    first = draw(values)
    if draw(st.booleans()):
        return first, lambda t: first
    last = draw(values)

    def linear(t):  # for JAX's and Python's numbers
        return first + (last - first) * (t / 20)

    return linear, linear


@hypothesis.given(
    tree=trees,
    base=st.sampled_from(sorted(BASES)),
    base_params=st.sampled_from("zy"),
    lr=schedule_or_constant(st.floats(0, 0.1)),
    mu_x=schedule_or_constant(mus),
    mu_y=schedule_or_constant(mus),
    seed=st.integers(0, 2**16),
)
def test_any_tree_and_setting_agrees_with_the_oracle(tree, base, base_params, lr, mu_x, mu_y, seed):
    rng = np.random.default_rng(seed)
    tree = {"root": tree}  # None alone would be no params at all
    treedef = jax.tree.structure(tree)
    draw = functools.partial(
        jax.tree.map, lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), tree
    )
    params = draw()
    optimizer = gpa(BASES[base](lr[0]), mu_x[0], mu_y[0], base_params=base_params)
    opt_state = optimizer.init(params)
    judge = oracle.Oracle(dict(enumerate(jax.tree.leaves(params))), oracle.BASES[base], base_params)
    update = jax.jit(optimizer.update)
    for t in range(20):
        gradients = draw()
        updates, opt_state = update(gradients, opt_state, params)
        assert jax.tree.structure(updates) == treedef
        params = optax.apply_updates(params, updates)
        judge.step(
            dict(enumerate(jax.tree.leaves(gradients))), *(s[1](t) for s in (lr, mu_x, mu_y))
        )
    for found, expected in zip(
        iterates(opt_state, params), (judge.x, judge.y, judge.z), strict=True
    ):
        for i, leaf in enumerate(jax.tree.leaves(found)):
            # z is y's distance from x, amplified by 1 / (1 - mu_y) <= 100, and so is its rounding.
            np.testing.assert_allclose(leaf, expected[i], atol=1e-4, rtol=1e-4)
