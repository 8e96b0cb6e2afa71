"""GPA with Flax NNX, Flax Linen, Equinox, and trees of every kind."""

import dataclasses
import operator
import re
import textwrap
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gpa_optax import eval_params, gpa, gpa_adamw, iterates, single_worker_diloco
from helpers import ROOT
from helpers.loops import assert_same, run

flax = pytest.importorskip("flax")
from flax import linen, nnx
from flax.training.train_state import TrainState

INPUTS = jax.random.normal(jax.random.key(0), (8, 3))
TARGETS = jnp.sin(INPUTS.sum(1, keepdims=True))


class NNXModel(nnx.Module):
    def __init__(self, rngs, param_dtype=jnp.float32):
        self.first = nnx.Linear(3, 8, rngs=rngs, param_dtype=param_dtype)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(jax.nn.relu(self.norm(self.first(x))))


def nnx_loss(model):
    return jnp.mean((model(INPUTS) - TARGETS) ** 2)


def optimizers():
    plain = gpa(optax.sgd(0.01, momentum=0.9), 0.9, 0.7)
    return {
        "gpa": plain,
        "chain": optax.chain(optax.clip_by_global_norm(1.0), plain),
        "masked": optax.chain(
            optax.masked(plain, lambda p: jax.tree.map(lambda leaf: leaf.ndim > 1, p)),
            optax.masked(optax.sgd(0.01), lambda p: jax.tree.map(lambda leaf: leaf.ndim <= 1, p)),
        ),
    }


@pytest.mark.parametrize("name", optimizers())
def test_nnx_optimizer(name):
    """The model trains at y; a second model, for evaluation, is given x."""
    if name == "masked" and not hasattr(nnx, "List"):
        pytest.skip("before Flax 0.12 nnx.Optimizer cannot hold the state of optax.masked")
    model = NNXModel(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optimizers()[name], wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        value, grads = nnx.value_and_grad(nnx_loss)(model)
        optimizer.update(model, grads)
        return value

    # The same by hand, in plain optax on arrays.
    pure = jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tx = optimizers()[name]
    pure_state = tx.init(pure)
    twin = NNXModel(nnx.Rngs(0))
    for _ in range(10):
        grads = nnx.to_pure_dict(nnx.grad(nnx_loss)(twin))
        updates, pure_state = tx.update(grads, pure_state, pure)
        pure = optax.apply_updates(pure, updates)
        nnx.update(twin, pure)
        train_step(model, optimizer)

    params = nnx.state(model, nnx.Param)
    x = eval_params(optimizer.opt_state, params)
    assert isinstance(x, nnx.State)
    expected = eval_params(pure_state, pure)
    for found, wanted in zip(jax.tree.leaves(x), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    for found, wanted in zip(
        jax.tree.leaves(eval_params(optimizer, params)), jax.tree.leaves(x), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    y_and_z = iterates(optimizer.opt_state, params)
    for found, wanted in zip(jax.tree.leaves(y_and_z.y), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(found, wanted)

    evaluated = nnx.clone(model)
    nnx.update(evaluated, x)
    assert not np.allclose(evaluated.first.kernel, model.first.kernel)
    assert np.isfinite(nnx_loss(evaluated))


def test_nnx_optimizer_with_bfloat16_params_keeps_the_master_copy():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
    optimizer = nnx.Optimizer(model, gpa_adamw(0.01, mu_x=0.9), wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(model, nnx.grad(nnx_loss)(model))
    params = nnx.state(model, nnx.Param)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    exact = iterates(optimizer.opt_state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(exact)} == {jnp.dtype(jnp.float32)}
    for y, p in zip(jax.tree.leaves(exact.y), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(y.astype(jnp.bfloat16)), np.asarray(p))


class LinenModel(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(1)(jax.nn.relu(linen.Dense(8)(x)))


def test_linen_train_state():
    model = LinenModel()
    params = model.init(jax.random.key(0), INPUTS)["params"]
    state = TrainState.create(
        apply_fn=model.apply,
        params=params,
        tx=optax.chain(optax.clip_by_global_norm(1.0), gpa(optax.adam(0.01), 0.9)),
    )

    def loss(params):
        return jnp.mean((model.apply({"params": params}, INPUTS) - TARGETS) ** 2)

    @jax.jit
    def train_step(state):
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(50):
        state = train_step(state)
    x = eval_params(state.opt_state, state.params)
    assert jax.tree.structure(x) == jax.tree.structure(params)
    assert loss(x) < loss(params)
    np.testing.assert_array_equal(
        x["Dense_0"]["kernel"], eval_params(state, state.params)["Dense_0"]["kernel"]
    )


def test_equinox_module_filtered_to_arrays():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 1, 8, depth=1, key=jax.random.key(0))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), gpa(optax.adam(0.01), 0.9))
    opt_state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_value_and_grad
    def loss(model):
        return jnp.mean((jax.vmap(model)(INPUTS) - TARGETS) ** 2)

    @eqx.filter_jit
    def train_step(model, opt_state):
        value, grads = loss(model)
        updates, opt_state = optimizer.update(
            grads, opt_state, eqx.filter(model, eqx.is_inexact_array)
        )
        return eqx.apply_updates(model, updates), opt_state, value

    first = None
    for _ in range(50):
        model, opt_state, value = train_step(model, opt_state)
        first = value if first is None else first
    params, static = eqx.partition(model, eqx.is_inexact_array)
    averaged = eqx.combine(eval_params(opt_state, params), static)
    assert isinstance(averaged, eqx.nn.MLP)
    assert loss(averaged)[0] < first
    assert not np.allclose(averaged.layers[0].weight, model.layers[0].weight)


class Pair(NamedTuple):
    left: Any
    right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: Any
    bias: Any


TREES = {
    "dict": {"b": jnp.ones(2), "a": {"c": jnp.ones((2, 2))}},
    "tuple": (jnp.ones(2), (jnp.ones(3), jnp.ones(()))),
    "list": [jnp.ones(2), [jnp.ones(1)]],
    "namedtuple": Pair(jnp.ones(2), Pair(jnp.ones(1), jnp.ones(3))),
    "dataclass": Layer(jnp.ones((2, 3)), jnp.ones(3)),
    "frozen dict": flax.core.freeze({"a": {"b": jnp.ones(2)}}),
    "None leaves": {"a": None, "b": (jnp.ones(2), None)},
    "array": jnp.ones((2, 2)),
    "zero-size": {"a": jnp.ones((0, 3)), "b": jnp.ones(2)},
    "empty dict": {},
    "empty in a tree": {"a": {}, "b": (), "c": jnp.ones(1)},
    "numpy": {"a": np.ones(3, np.float32)},
}


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize("name", TREES)
def test_any_pytree(name, jit):
    params = TREES[name]
    optimizer = gpa(optax.adam(0.1), 0.9)
    opt_state = optimizer.init(params)
    update = jax.jit(optimizer.update) if jit else optimizer.update
    grads = jax.tree.map(jnp.ones_like, params)
    updates, opt_state = update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    for tree in (eval_params(opt_state, params), *iterates(opt_state, params)):
        assert jax.tree.structure(tree) == jax.tree.structure(TREES[name])
        for leaf, start in zip(jax.tree.leaves(tree), jax.tree.leaves(TREES[name]), strict=True):
            assert np.shape(leaf) == np.shape(start)
            assert (np.asarray(leaf) < np.asarray(start)).all()


def test_complex_params_are_averaged_like_their_real_and_imaginary_parts(rng):
    start = rng.normal(size=5) + 1j * rng.normal(size=5)
    params = jnp.asarray(start, jnp.complex64)
    found, opt_state = run(gpa(optax.sgd(0.1), 0.9, 0.6), params, lambda t, p: p * (0.5 + 1j), 40)
    as_pair = jnp.stack([params.real, params.imag])
    turn = jnp.array([[0.5, -1.0], [1.0, 0.5]])
    expected, expected_state = run(
        gpa(optax.sgd(0.1), 0.9, 0.6), as_pair, lambda t, p: turn @ p, 40
    )
    for sequence, pair in zip(
        iterates(opt_state, found), iterates(expected_state, expected), strict=True
    ):
        assert sequence.dtype == jnp.complex64
        np.testing.assert_allclose(sequence, pair[0] + 1j * pair[1], atol=1e-5)
    assert eval_params(opt_state, found).dtype == jnp.complex64


def test_complex_params_with_adamw_and_split_by_optax(rng):
    params = {
        "c": jnp.asarray(rng.normal(size=3) + 1j * rng.normal(size=3), jnp.complex64),
        "r": jnp.asarray(rng.normal(size=3), jnp.float32),
    }
    split = optax.contrib.split_real_and_imaginary(gpa(optax.adam(0.1), 0.9, 0.6))
    found, opt_state = run(split, params, lambda t, p: p, 20)
    x = eval_params(opt_state, found)
    assert x["c"].dtype == jnp.complex64
    pairs = {"re": params["c"].real, "im": params["c"].imag, "r": params["r"]}
    expected, expected_state = run(gpa(optax.adam(0.1), 0.9, 0.6), pairs, lambda t, p: p, 20)
    of_pairs = eval_params(expected_state, expected)
    np.testing.assert_allclose(x["c"], of_pairs["re"] + 1j * of_pairs["im"], atol=1e-5)
    np.testing.assert_allclose(x["r"], of_pairs["r"], atol=1e-5)

    joint, joint_state = run(gpa(optax.adamw(0.1), 0.9, 0.6), params, lambda t, p: p, 20)
    assert np.isfinite(eval_params(joint_state, joint)["c"]).all()


class TrainStateNNX(nnx.Module):
    """As MaxText's: what is saved is nnx.state of it, in which the optimizer's state is dicts."""

    def __init__(self, model, tx):
        self.model, self.optimizer = model, nnx.Optimizer(model, tx, wrt=nnx.Param)


def trained(tx, dtype=jnp.float32):
    """A train state after some steps, in which x and y differ."""
    model = NNXModel(nnx.Rngs(0), dtype)
    state = TrainStateNNX(model, tx)
    for _ in range(5):
        state.optimizer.update(model, nnx.grad(nnx_loss)(model))
    return state


WHOLE = {
    "gpa": gpa(optax.sgd(0.05), 0.9, 0.7),
    "chain": optax.chain(optax.clip(1.0), gpa_adamw(0.05, mu_x=0.9, mu_y=0.7)),
    # An optax below 0.2.8 goes by the first leaf's dtype: in bfloat16 b2 is 1.
    "inject_hyperparams": optax.inject_hyperparams(gpa_adamw, hyperparam_dtype=jnp.float32)(
        0.05, mu_x=0.9, mu_y=0.7
    ),
    "diloco": single_worker_diloco(optax.adam(0.05), 2),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", WHOLE)
def test_the_average_is_read_from_a_state_that_nnx_state_has_left_as_dicts(name, dtype):
    state = trained(WHOLE[name], dtype)
    params = nnx.state(state.model, nnx.Param)
    x = eval_params(state.optimizer, params)
    assert not np.array_equal(x["first"]["bias"], params["first"]["bias"])
    flat = nnx.state(state)
    assert_same(eval_params(flat, params), x)
    assert_same(eval_params(flat["optimizer"]["opt_state"], params), x)
    assert_same(eval_params(nnx.to_pure_dict(flat), nnx.to_pure_dict(params)), nnx.to_pure_dict(x))
    if name != "diloco":
        assert_same(iterates(flat, params), iterates(state.optimizer, params))


def test_a_state_left_as_dicts_whose_mask_is_lost_is_refused_and_merged_it_is_read():
    def only_first(params):
        return nnx.State({name: name == "first" for name in params})

    tx = optax.chain(
        optax.masked(gpa(optax.sgd(0.05), 0.9), only_first),
        optax.masked(optax.set_to_zero(), lambda p: jax.tree.map(operator.not_, only_first(p))),
    )
    state = trained(tx)
    params = nnx.state(state.model, nnx.Param)
    form, flat = nnx.split(state)
    with pytest.raises(ValueError, match=r"which opt_state does not know.*nnx\.merge"):
        eval_params(flat, params)
    x = eval_params(nnx.merge(form, flat).optimizer, params)
    assert_same(x, eval_params(state.optimizer, params))
    np.testing.assert_array_equal(x["last"]["kernel"], params["last"]["kernel"])
    assert not np.array_equal(x["first"]["kernel"], params["first"]["kernel"])


def test_dicts_that_only_look_like_a_state_are_none():
    """A params dict that happens to have some of the names."""
    params = {"x": jnp.ones(2), "y": jnp.ones(2), "count": jnp.ones(2)}
    with pytest.raises(ValueError, match="must hold a GPAState"):
        eval_params({"params": params}, params)
    opt_state = gpa(optax.sgd(0.1), 0.9).init(params)
    assert_same(eval_params({"params": params, "opt_state": opt_state}, params), params)


def test_the_recipe_for_maxtext_exports_x():
    """With the names of its train state, and the functions by which it takes the params out."""
    state = trained(WHOLE["chain"])
    x = eval_params(state.optimizer, nnx.state(state.model, nnx.Param))
    page = (ROOT / "docs/recipes/other_trainers.md").read_text()
    (export,) = re.findall(r"```python\n((?:(?!```).)*merge_state.*?)```", page, re.DOTALL)
    (evaluation,) = re.findall(r"```python\n((?:(?!```).)*nnx\.merge\(.*?)```", page, re.DOTALL)
    form, flat = nnx.split(state)
    names = {"nnx": nnx, "eval_params": eval_params}
    exec(textwrap.dedent(evaluation), evaluated := {**names, "model": form, "state": flat})
    assert_same(nnx.state(evaluated["state"].model, nnx.Param), x)
    exec(textwrap.dedent(export), exported := {**names, "training_state": flat})
    _, params, _ = nnx.split(exported["training_state"].model, nnx.Param, ...)
    assert_same(params.to_pure_dict(), nnx.to_pure_dict(x))
    assert "mean" in exported["training_state"].model.norm


def test_the_average_is_read_from_a_checkpoint_restored_without_its_form(tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    params = {"a": jnp.ones(3), "b": {"c": jnp.arange(2.0)}}
    optimizer = optax.chain(optax.clip(1.0), gpa_adamw(0.05, mu_x=0.9, mu_y=0.7))
    params, opt_state = run(optimizer, params, lambda t, params: params, 5)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", {"opt_state": opt_state})
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "saved")
    assert_same(eval_params(restored, params), eval_params(opt_state, params))


class Twins:
    """A pytree node whose two children have the same key, by mistake or on purpose."""

    def __init__(self, one, other):
        self.one, self.other = one, other


jax.tree_util.register_pytree_with_keys(
    Twins,
    lambda node: (
        [(jax.tree_util.GetAttrKey("w"), node.one), (jax.tree_util.GetAttrKey("w"), node.other)],
        None,
    ),
    lambda _, children: Twins(*children),
)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_leaves_with_the_same_path_get_an_average_each(dtype):
    params = {"twins": Twins(jnp.zeros(2, dtype), jnp.ones(2, dtype)), "w": jnp.ones(3, dtype)}
    found, opt_state = run(gpa(optax.sgd(0.5), 0.5), params, lambda t, params: params, 3)
    as_tuple = {"twins": (jnp.zeros(2, dtype), jnp.ones(2, dtype)), "w": jnp.ones(3, dtype)}
    expected, expected_state = run(gpa(optax.sgd(0.5), 0.5), as_tuple, lambda t, params: params, 3)
    for tree, wanted in (
        (eval_params(opt_state, found), eval_params(expected_state, expected)),
        *zip(iterates(opt_state, found), iterates(expected_state, expected), strict=True),
    ):
        assert isinstance(tree["twins"], Twins)
        np.testing.assert_array_equal(tree["twins"].one, wanted["twins"][0])
        np.testing.assert_array_equal(tree["twins"].other, wanted["twins"][1])
        np.testing.assert_array_equal(tree["w"], wanted["w"])


@pytest.mark.parametrize(
    "mask",
    [
        {"twins": Twins(True, False), "w": True},
        {"twins": Twins({"a": True, "b": False}, True), "w": True},
        {"twins": True, "w": False},
    ],
    ids=["a child", "leaves", "another leaf"],
)
def test_leaves_with_the_same_path_are_refused_where_a_mask_hides_which_is_which(mask):
    params = {
        "twins": Twins(
            {"a": jnp.zeros(1), "b": jnp.zeros(1)}, {"a": jnp.ones(1), "b": jnp.ones(1)}
        ),
        "w": jnp.ones(1),
    }
    opt_state = optax.masked(gpa(optax.sgd(0.5)), mask).init(params)
    with pytest.raises(
        ValueError, match=r"several leaves at \['twins'\].w\['a'\].*Give each child"
    ):
        eval_params(opt_state, params)


MIXED = {
    "w": jnp.ones(3),
    "ids": jnp.arange(3),
    "on": jnp.array([True, False, True]),
    "key": jax.random.key(0),
}


def mixed_loss(model):
    assert jax.random.normal(model["key"]).shape == ()
    return jnp.sum(jnp.where(model["on"], model["w"] * model["ids"], 0.0))


def assert_mixed(x):
    """After three steps of SGD at 0.1 with mu_x 0.5: gradients of 0, 0 and 2 for w."""
    expected = 1.0  # x, of z that goes from 1 down by 0.2 a step
    for z in (0.8, 0.6, 0.4):
        expected = 0.5 * expected + 0.5 * z
    np.testing.assert_allclose(x["w"], [1.0, 1.0, expected], atol=1e-6)
    for name in ("ids", "on"):
        np.testing.assert_array_equal(x[name], MIXED[name])
    assert x["key"] == MIXED["key"]


def test_equinox_leaves_out_integers_flags_and_keys():
    eqx = pytest.importorskip("equinox")
    model = MIXED
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    found, opt_state = run(
        gpa(optax.sgd(0.1), 0.5),
        params,
        lambda t, params: jax.grad(lambda p: mixed_loss(eqx.combine(p, rest)))(params),
        3,
    )
    assert_mixed(eqx.combine(eval_params(opt_state, found), rest))


def test_a_narrower_wrt_leaves_out_integers_flags_and_keys():
    class Model(nnx.Module):
        def __init__(self):
            for name, leaf in MIXED.items():
                setattr(self, name, nnx.Param(leaf))

    def loss(model):
        return mixed_loss(nnx.to_pure_dict(nnx.state(model)))

    model = Model()
    wrt = nnx.All(nnx.Param, lambda path, variable: jnp.issubdtype(variable.dtype, jnp.inexact))
    optimizer = nnx.Optimizer(model, gpa(optax.sgd(0.1), 0.5), wrt=wrt)
    for _ in range(3):
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(model))
    evaluated = nnx.clone(model)
    nnx.update(evaluated, eval_params(optimizer.opt_state, nnx.state(model, wrt)))
    assert_mixed(nnx.to_pure_dict(nnx.state(evaluated)))
    with pytest.raises(TypeError, match="narrower wrt"):
        nnx.Optimizer(model, gpa(optax.sgd(0.1), 0.5), wrt=nnx.Param)
