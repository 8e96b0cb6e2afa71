"""Anything that a user may put together agrees with the oracle, and anything wrong is told clearly.

The long form is `pytest -m long tests/library/test_fuzz.py`.
"""

import dataclasses
import re
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import event
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_leaves_with_path

import gpa_optax
from benchmarks import oracle
from gpa_optax import averaging, eval_params, gpa, iterates
from helpers.loops import double

STEPS = 3
# Few shapes, because each operation is compiled for each shape and dtype.
SHAPES = [(), (2,), (2, 3), (0,)]
FLOATING = [jnp.float32, jnp.bfloat16, jnp.complex64, jnp.float16, jnp.float64]
REFUSED = [jnp.int32, jnp.uint8, jnp.bool_]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What stands in a drawn tree for an array."""

    shape: tuple[int, ...]
    dtype: Any
    frozen: bool

    def array(self, rng: np.random.Generator) -> jax.Array:
        values = rng.normal(size=self.shape)
        if self.dtype == jnp.complex64:
            values = values + 1j * rng.normal(size=self.shape)
        return jnp.asarray(values, jax.dtypes.canonicalize_dtype(self.dtype))


def trees(dtypes):
    leaves = st.builds(
        Leaf,
        st.sampled_from(SHAPES),
        st.sampled_from(dtypes),
        st.sampled_from([False] * 4 + [True]),
    )
    return st.recursive(
        leaves | st.none(),
        lambda node: (
            st.lists(node, max_size=3)
            | st.lists(node, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from("abcd"), node, max_size=3)
            | st.builds(Pair, node, node)
        ),
        max_leaves=5,
    )


def settings_of(low, high):
    """A constant or a line, as (for gpa, function of the step for the oracle)."""

    def line(ends):
        first, last = ends

        def schedule(t):
            return first + (last - first) * (t / STEPS)

        return schedule, schedule

    values = st.floats(low, high)
    return values.map(lambda v: (v, lambda t: v)) | st.tuples(values, values).map(line)


UNIFORM = (averaging.uniform(), lambda t: t / (t + 1))
BASES = {
    "sgd": lambda lr: optax.sgd(lr),
    "momentum": lambda lr: optax.sgd(lr, momentum=0.9),
    "adamw": lambda lr: optax.adamw(lr, weight_decay=0.1),
    "lion": lambda lr: optax.lion(lr, weight_decay=0.1),
}
# All leave the updates as they are.
WRAPPERS = {
    "chain": lambda tx: optax.chain(optax.identity(), tx),
    "named_chain": lambda tx: optax.named_chain(("zero_nans", optax.zero_nans()), ("gpa", tx)),
    "masked": lambda tx: optax.masked(tx, lambda p: jax.tree.map(lambda _: True, p)),
    "partition": lambda tx: optax.partition(
        {"all": tx}, lambda p: jax.tree.map(lambda _: "all", p)
    ),
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "conditionally_transform": lambda tx: optax.conditionally_transform(
        tx, lambda step, **_: step >= 0
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    tree: Any
    seed: int
    base: str
    base_params: str
    lr: Any
    mu_x: Any
    mu_y: Any
    state_dtype: Any
    inject: bool
    wrappers: list[str]
    sharded: bool
    x64: bool


def cases(dtypes, x64):
    return st.builds(
        Case,
        tree=trees(dtypes).map(lambda tree: {"root": tree}),
        seed=st.integers(0, 2**16),
        base=st.sampled_from(sorted(BASES)),
        base_params=st.sampled_from("zy"),
        lr=settings_of(0, 0.1),
        mu_x=settings_of(0, 0.999) | st.just(UNIFORM),
        mu_y=settings_of(0, 0.9),
        state_dtype=st.sampled_from([None, None, jnp.float32, jnp.bfloat16, jnp.float64]),
        inject=st.booleans(),
        wrappers=st.lists(st.sampled_from(sorted(WRAPPERS)), max_size=3),
        sharded=st.sampled_from([False] * 7 + [True]),
        x64=st.sampled_from(x64),
    )


def form(tree):
    return jax.tree.structure(tree), [
        (jnp.shape(leaf), jnp.result_type(leaf)) for leaf in jax.tree.leaves(tree)
    ]


def optimizer_of(case, frozen):
    arguments = {"base_params": case.base_params, "state_dtype": case.state_dtype}
    if case.inject:

        def factory(learning_rate, mu_y):
            return gpa(BASES[case.base](learning_rate), case.mu_x[0], mu_y, **arguments)

        # Not in the params' dtype, which may be narrow.
        optimizer = optax.inject_hyperparams(factory, hyperparam_dtype=jnp.float32)(
            case.lr[0], case.mu_y[0]
        )
    else:
        optimizer = gpa(BASES[case.base](case.lr[0]), case.mu_x[0], case.mu_y[0], **arguments)
    if any(jax.tree.leaves(frozen)):
        labels = jax.tree.map(lambda f: "frozen" if f else "trained", frozen)
        optimizer = optax.partition({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)
    for name in case.wrappers:
        optimizer = WRAPPERS[name](optimizer)
    return optimizer


def place(tree):
    """Over two devices, along the first axis where that is divisible."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
    return jax.tree.map(
        lambda leaf: jax.device_put(
            leaf,
            NamedSharding(mesh, PartitionSpec("data" if leaf.shape[:1] == (2,) else None))
            if leaf.ndim
            else NamedSharding(mesh, PartitionSpec()),
        ),
        tree,
    )


def check(case: Case) -> None:
    with double(case.x64), jax.disable_jit():  # which would compile the conditions of each case
        rng = np.random.default_rng(case.seed)
        is_leaf = lambda node: isinstance(node, Leaf)  # noqa: E731
        params = jax.tree.map(lambda leaf: leaf.array(rng), case.tree, is_leaf=is_leaf)
        frozen = jax.tree.map(lambda leaf: leaf.frozen, case.tree, is_leaf=is_leaf)
        sharded = case.sharded and jax.device_count() > 1
        if sharded:
            params = place(params)
        start, shape = params, form(params)
        optimizer = optimizer_of(case, frozen)
        opt_state = optimizer.init(params)
        state_form = form(opt_state)
        names = [keystr(path) for path, _ in tree_leaves_with_path(params)]
        judge = oracle.Oracle(
            dict(zip(names, jax.tree.leaves(params), strict=True)),
            oracle.BASES[case.base],
            case.base_params,
        )
        for t in range(STEPS):
            grads = jax.tree.map(lambda leaf: leaf.array(rng), case.tree, is_leaf=is_leaf)
            if sharded:
                grads = place(grads)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            assert form(updates) == shape
            assert form(opt_state) == state_form
            params = optax.apply_updates(params, updates)
            assert form(params) == shape
            judge.step(
                dict(zip(names, jax.tree.leaves(grads), strict=True)),
                *(setting[1](t) for setting in (case.lr, case.mu_x, case.mu_y)),
            )
        x = eval_params(opt_state, params)
        assert form(x) == shape
        if sharded:
            for leaf, p in zip(jax.tree.leaves(x), jax.tree.leaves(start), strict=True):
                assert leaf.sharding.is_equivalent_to(p.sharding, p.ndim)
        compare(case, iterates(opt_state, params), start, frozen, judge)
        event(f"leaves: {len(names)}")


def compare(case, found, start, frozen, judge):
    leaves = zip(jax.tree.leaves(start), jax.tree.leaves(frozen), strict=True)
    for i, (p, is_frozen) in enumerate(leaves):
        sequences = [jax.tree.leaves(sequence)[i] for sequence in found]
        name = list(judge.x)[i]
        if is_frozen:
            for sequence in sequences:
                np.testing.assert_array_equal(sequence, p)
            continue
        # z comes back with an error of about 1 / (1 - mu_y) <= 10 times that of what is stored.
        narrow = case.state_dtype == jnp.bfloat16
        tolerance = 0.15 if narrow else 1e-4
        for sequence, expected in zip(sequences, (judge.x, judge.y, judge.z), strict=True):
            np.testing.assert_allclose(
                np.asarray(sequence).astype(expected[name].dtype),
                expected[name],
                atol=tolerance,
                rtol=tolerance,
            )


@hypothesis.given(cases(FLOATING[:3], x64=[False]))
@hypothesis.settings(max_examples=50)
def test_anything_put_together_agrees_with_the_oracle(case):
    check(case)


@pytest.mark.long
@hypothesis.given(cases(FLOATING, x64=[False, True]))
@hypothesis.settings(max_examples=5_000)
def test_five_thousand_things_put_together_agree_with_the_oracle(case):
    check(case)


@hypothesis.given(
    trees(FLOATING[:3] + REFUSED).map(lambda tree: {"root": tree}), st.integers(0, 2**16)
)
@hypothesis.settings(max_examples=60)
def test_a_leaf_that_cannot_be_averaged_is_named(tree, seed):
    rng = np.random.default_rng(seed)
    is_leaf = lambda node: isinstance(node, Leaf)  # noqa: E731
    params = jax.tree.map(lambda leaf: leaf.array(rng), tree, is_leaf=is_leaf)
    bad = [
        keystr(path)
        for path, leaf in tree_leaves_with_path(params)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if not bad:
        gpa(optax.sgd(0.1)).init(params)
        return
    with pytest.raises(TypeError, match=re.escape(f"params{bad[0]} has dtype")):
        gpa(optax.sgd(0.1)).init(params)


def two_arguments(a, b):
    return 0.5


SGD = optax.sgd(0.1)
# Of functions only those whose arguments or values are those of a schedule: what another returns is
# known when it is called, which is after the call that is tried here.
VALUES = st.one_of(
    st.floats(),
    st.integers(-3, 3),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
    st.complex_numbers(),
    st.floats(0, 1).map(np.float32),
    st.floats(0, 1).map(jnp.asarray),
    st.sampled_from([np.ones(2), np.ones((1, 1)), [0.5], {"mu": 0.5}, (), object(), b"x"]),
    st.sampled_from([averaging.uniform, averaging.uniform(), two_arguments]),
    st.sampled_from([SGD, "float32", "z", "y", np.dtype("int8")]),
)
ARGUMENTS = {
    gpa: ["base_optimizer", "mu_x", "mu_y", "base_params", "state_dtype"],
    gpa_optax.single_worker_diloco: [
        "inner_optimizer",
        "sync_period",
        "outer_learning_rate",
        "outer_momentum",
    ],
    averaging.from_diloco: ["inner_steps", "outer_momentum"],
    averaging.from_horizon: ["steps"],
    averaging.polynomial: ["power"],
    averaging.warmed_up: ["mu_x"],
    averaging.annealed: ["mu_x", "learning_rate", "peak"],
    averaging.lr_weighted: ["learning_rate", "warmup_steps", "power"],
}
GOOD = {
    "base_optimizer": SGD,
    "inner_optimizer": SGD,
    "sync_period": 4,
    "inner_steps": 8,
    "steps": 100,
    "power": 1,
    "mu_x": 0.9,
    "learning_rate": optax.constant_schedule(0.1),
    "peak": 0.1,
    "warmup_steps": 3,
}
calls = st.sampled_from(sorted(ARGUMENTS, key=lambda f: f.__name__)).flatmap(
    lambda function: st.tuples(
        st.just(function),
        st.dictionaries(st.sampled_from(ARGUMENTS[function]), VALUES, min_size=1, max_size=2),
    )
)


def check_call(call):
    """A call succeeds, and what it gives works, or it tells which argument is wrong."""
    function, given = call
    good = {name: GOOD[name] for name in ARGUMENTS[function] if name in GOOD}
    try:
        made = function(**good | given)
        if isinstance(made, optax.GradientTransformation):
            params = jnp.ones(2)
            updates, _ = made.update(params, made.init(params), params)
            assert form(updates) == form(params)
        elif isinstance(made, averaging.AveragingSchedule):
            assert np.shape(made(3)) == ()
        else:
            assert 0 <= made < 1
        event("accepted")
    except (TypeError, ValueError) as error:
        message = str(error)
        assert any(re.search(rf"\b{name}\b", message) for name in given), message
        assert re.search(r"\b(Give|Call|Leave)\b", message), message
        event(f"refused by {function.__name__}")


@hypothesis.given(calls)
@hypothesis.settings(max_examples=200)
def test_a_bad_argument_is_refused_clearly(call):
    check_call(call)


@pytest.mark.long
@hypothesis.given(calls)
@hypothesis.settings(max_examples=10_000)
def test_ten_thousand_bad_arguments_are_refused_clearly(call):
    check_call(call)
