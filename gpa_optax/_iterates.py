"""Reading x, y and z out of an optimizer state, however deep they are nested."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_flatten_with_path, tree_leaves_with_path

from gpa_optax._diloco import SingleWorkerDiLoCoState
from gpa_optax._gpa import GPAState, z_of
from gpa_optax._precision import stored_or_given
from gpa_optax._validate import is_traced


class Iterates(NamedTuple):
    """The three sequences of GPA, each a tree like the params.

    Attributes:
      x: the average.
      y: where gradients are taken; the params of the training loop.
      z: the fast iterate, where the base optimizer steps.
    """

    x: optax.Params
    y: optax.Params
    z: optax.Params


def eval_params(opt_state: Any, params: optax.Params) -> optax.Params:
    """The averaged weights x: evaluate, export and serve these.

    Finds the GPA state wherever it is in ``opt_state``: in a chain, `optax.masked`,
    `optax.partition`, `optax.MultiSteps`, `optax.inject_hyperparams`, `optax.apply_if_finite` and
    every other wrapper (`optax.flatten` of all params, but not of a part of them); in a
    `flax.nnx.Optimizer` or a `flax.training.train_state.TrainState`, whole or their ``opt_state``.
    For `single_worker_diloco` it gives the slow weights. Before the first update it gives the
    params, from which x starts. A state that has become dicts, as `flax.nnx.state` gives it or as a
    checkpoint restored without the structure of the state, is read too, if the params are dicts and
    GPA covers every leaf.

    Running statistics, such as BatchNorm's, are not params: they belong to y. Recompute them at x,
    with some forward passes over training data, before you evaluate a model that has them at x.

    Args:
      opt_state: the optimizer's state, or anything that holds it and is a pytree.
      params: the params of the training loop, with the structure that ``init`` was given. Where
        GPA covers every leaf their shapes and dtypes suffice, as `jax.eval_shape` gives them.

    Returns:
      A tree like ``params``, in its dtypes and shapes. Leaves that no GPA state covers (frozen, or
      with an optimizer of their own) are those of ``params``; where there are several GPA states,
      each leaf comes from the one that covers it. Leaves in the state's own dtype are its arrays,
      not copies: where the training step donates the state, copy what must outlive it.

    Raises:
      ValueError: if there is no GPA state in ``opt_state``, if its leaves are not those of
        ``params`` in place and shape, if two GPA states cover the same leaf, or if leaves cannot be
        told apart, because several have the same path and only some are covered.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from gpa_optax import eval_params, gpa
      >>> params = {"a": jnp.array(1.0), "frozen": jnp.array(5.0)}
      >>> train = optax.chain(optax.clip(1.0), gpa(optax.sgd(0.5), mu_x=0.5))
      >>> optimizer = optax.partition(
      ...     {"train": train, "freeze": optax.set_to_zero()}, {"a": "train", "frozen": "freeze"})
      >>> opt_state = optimizer.init(params)
      >>> grads = {"a": jnp.array(2.0), "frozen": jnp.array(2.0)}
      >>> updates, opt_state = optimizer.update(grads, opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print({name: float(leaf) for name, leaf in eval_params(opt_state, params).items()})
      {'a': 0.75, 'frozen': 5.0}
    """
    leaves = [
        _read(state, state.x if isinstance(state, GPAState) else state.slow, params)
        for state in _find(opt_state, (GPAState, SingleWorkerDiLoCoState))
    ]
    return _combined(leaves, params, lambda x, p: x.astype(jnp.result_type(p)))


def iterates(opt_state: Any, params: optax.Params) -> Iterates:
    """All three sequences x, y and z at full precision, for study and plots.

    Args:
      opt_state: the optimizer's state; the GPA state is found in it as by `eval_params`.
      params: the params of the training loop, with the structure that ``init`` was given.

    Returns:
      `Iterates` of trees like ``params``, in the state's dtypes. A leaf that no GPA state covers is
      that of ``params`` in all three.

    Raises:
      ValueError: as for `eval_params`; `single_worker_diloco` has no such three sequences; for an
        ensemble made by `jax.vmap`, which must also be read under it.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from gpa_optax import gpa, iterates
      >>> optimizer = gpa(optax.sgd(1.0), mu_x=0.5, mu_y=0.5)
      >>> params = jnp.array(0.0)
      >>> opt_state = optimizer.init(params)
      >>> updates, opt_state = optimizer.update(jnp.array(-1.0), opt_state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(*(float(leaf) for leaf in iterates(opt_state, params)))
      0.5 0.75 1.0
    """
    found = [_sequences(state, params) for state in gpa_states(opt_state)]
    x, y, z = (
        _combined(states, params, lambda leaf, p: leaf) for states in zip(*found, strict=True)
    )
    return Iterates(x, y, z)


def gpa_states(opt_state: Any) -> list[GPAState]:
    """The outermost GPA states; ValueError if there is none."""
    return _find(opt_state, (GPAState,))


class CoveredLeaf(NamedTuple):
    """A leaf of the params, and what a GPA state holds of it."""

    name: str
    param: Any
    x: jax.Array
    y: jax.Array
    """At full precision: the parameter itself, or the copy that the state stores."""
    z: jax.Array


def covered_leaves(state: GPAState, params: optax.Params) -> list[CoveredLeaf]:
    """The leaves that a state covers, in the order of the params."""
    return [
        CoveredLeaf(f"params{keystr(path)}", p, x, y, z)
        for (path, p), x, y, z in zip(
            tree_leaves_with_path(params), *_sequences(state, params), strict=True
        )
        if x is not None
    ]


def _sequences(state: GPAState, params: optax.Params) -> tuple[list[Any], list[Any], list[Any]]:
    """The leaves of x, y and z for those of `params`; None where the state has none."""
    (mu_y,) = jax.tree.leaves(state.last_mu_y)  # in flax.nnx.Optimizer a Variable
    if np.ndim(mu_y) != 0:
        raise ValueError(
            f"opt_state must be that of one optimizer, got an ensemble of {np.shape(mu_y)}. "
            "Call the function under jax.vmap, as in jax.vmap(iterates)(opt_state, params)."
        )
    x = _read(state, state.x, params)
    y = _read(state, params if state.y is None else state.y, params)
    y = [None if of_x is None else jnp.asarray(of_y) for of_x, of_y in zip(x, y, strict=True)]
    return x, y, z_of(x, y, mu_y)


def _read(state: Any, stored: Any, params: optax.Params) -> list[Any]:
    """The leaves of `stored`, a field of `state`, for those of `params`; None where it has none."""
    (count,) = jax.tree.leaves(state.count)  # in flax.nnx.Optimizer a Variable
    leaves = _aligned(stored, params)
    return [
        leaf
        if leaf is None or isinstance(p, jax.ShapeDtypeStruct) or _has_started(count)
        else stored_or_given(count, leaf, p)
        for leaf, p in zip(leaves, jax.tree.leaves(params), strict=True)
    ]


def _has_started(count: Any) -> bool:
    """Whether every count is known to be above 0, so that the state's own arrays can be given."""
    return not is_traced(count) and bool(np.all(np.asarray(count) > 0))


# Fields that may have no leaves, and so may be missing where a state is left as a dict.
_OPTIONAL = {"y", "base_state", "inner_state"}


def _find(opt_state: Any, kinds: tuple[type, ...]) -> list[Any]:
    """The outermost states of these kinds; a GPA within a GPA averages z, and not the params."""
    nodes = jax.tree.leaves(opt_state, is_leaf=lambda node: _as_state(node, kinds) is not None)
    states = [state for node in nodes if (state := _as_state(node, kinds)) is not None]
    if not states:
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ValueError(
            f"opt_state must hold a {names}, got a {type(opt_state).__name__} without one. "
            "Give the state of an optimizer that contains gpa_optax.gpa, in the form that init "
            "gave it."
        )
    return states


def _as_state(node: Any, kinds: tuple[Any, ...]) -> Any:
    """The node as a state, if it is one of these kinds or a dict of its fields; else None."""
    for kind in kinds:
        if isinstance(node, kind):
            return node
        fields = set(kind._fields)
        if isinstance(node, Mapping) and fields - _OPTIONAL <= set(node) <= fields:
            return kind(**{field: node.get(field) for field in kind._fields})
    return None


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


_FORM = (
    "Give the params that belong to opt_state, with the structure that init was given "
    "(in Flax NNX: nnx.state(model, nnx.Param)), and opt_state in the form that init gave it "
    "(turning it into dicts loses its masks; in Flax NNX: nnx.merge brings them back)."
)


def _aligned(tree: Any, params: Any) -> list[Any]:
    """The leaf of `tree` for each leaf of `params`, and None where `tree` is masked."""
    tree = _unwrapped(tree, params)
    wanted = tree_leaves_with_path(params)
    if jax.tree.structure(tree) == jax.tree.structure(params):
        aligned = jax.tree.leaves(tree)
    else:
        aligned = _by_path(tree, wanted)
    for (path, p), leaf in zip(wanted, aligned, strict=True):
        if leaf is not None and np.shape(leaf) != np.shape(p):
            raise ValueError(
                f"params have shape {np.shape(p)} at {keystr(path) or 'the root'}, and opt_state "
                f"has shape {np.shape(leaf)} there. {_FORM}"
            )
    return aligned


def _by_path(tree: Any, wanted: Sequence[tuple[Any, Any]]) -> list[Any]:
    """As `_aligned`, where the containers differ: a mask stands for a whole subtree, and
    flax.nnx.Optimizer keeps its own kind of Variable."""
    found = dict(tree_leaves_with_path(tree, is_leaf=_is_masked))
    masked = {path for path, leaf in found.items() if _is_masked(leaf)}
    aligned, seen = [], set()
    for path, p in wanted:
        leaf = None if path in masked else found.get(path)
        if path in seen:
            raise ValueError(
                f"params have several leaves at {keystr(path)}, which cannot be told apart in "
                "opt_state. Give each child of the pytree node a key of its own where its class is "
                "registered, or let one gpa cover all leaves."
            )
        if leaf is None and not any(path[:end] in masked for end in range(len(path) + 1)):
            raise ValueError(
                f"params have a leaf of shape {np.shape(p)} at {keystr(path) or 'the root'}, which "
                f"opt_state does not know. {_FORM}"
            )
        seen.add(path)
        aligned.append(leaf)
    unknown = found.keys() - masked - seen
    if unknown:
        path = min(unknown, key=keystr)
        raise ValueError(
            f"params have no leaf at {keystr(path) or 'the root'}, where opt_state has one "
            f"of shape {np.shape(found[path])}. {_FORM}"
        )
    return aligned


def _unwrapped(tree: Any, params: Any) -> Any:
    """Undoes the two wrappers that give their inner optimizer another tree than the params."""
    leaves, treedef = jax.tree.flatten(params)
    sizes = [np.size(p) for p in leaves]
    if getattr(tree, "shape", None) == (sum(sizes),):  # optax.flatten
        pieces = jnp.split(tree, np.cumsum(sizes)[:-1])
        shaped = [piece.reshape(np.shape(p)) for piece, p in zip(pieces, leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)
    return jax.tree.map(_joined, tree, is_leaf=lambda node: _is_split(node) or _is_masked(node))


def _is_split(node: Any) -> bool:
    """The pair that optax.contrib.split_real_and_imaginary makes of a complex leaf."""
    return type(node).__name__ == "SplitRealAndImaginaryArrays"


def _joined(node: Any) -> Any:
    return jax.lax.complex(node.real, node.imaginary) if _is_split(node) else node


def _combined(states: Sequence[list[Any]], params: Any, convert: Callable[[Any, Any], Any]) -> Any:
    """`params`, with each leaf that some state covers taken from there."""
    wanted, treedef = tree_flatten_with_path(params)
    leaves = []
    for (path, p), candidates in zip(wanted, zip(*states, strict=True), strict=True):
        covering = [leaf for leaf in candidates if leaf is not None]
        if len(covering) > 1:
            raise ValueError(
                f"opt_state holds {len(covering)} averages of the leaf at "
                f"{keystr(path) or 'the root'}. Let one gpa alone update each leaf, and no second "
                "one follow it in a chain."
            )
        leaves.append(convert(covering[0], p) if covering else p)
    return treedef.unflatten(leaves)
