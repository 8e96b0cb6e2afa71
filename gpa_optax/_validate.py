"""The errors that users see: each names the argument, its value and what to do.

Values that are traced (under `jax.jit`, or injected by `optax.inject_hyperparams`) have no value
to look at; they are the user's responsibility.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path

from gpa_optax._precision import full_dtype, needs_master_copy, stored_dtype


def is_traced(value: Any) -> bool:
    return isinstance(value, jax.core.Tracer)


def check_number(name: str, value: Any, remedy: str) -> float:
    """The float behind a concrete real scalar; TypeError for anything else."""
    is_number = isinstance(value, (int, float, np.number, np.ndarray, jax.Array))
    if not is_number or isinstance(value, bool) or np.ndim(value) != 0 or np.iscomplexobj(value):
        raise TypeError(f"{name} must be a real number, got {value!r}. {remedy}")
    return float(value)


def check_schedule(name: str, schedule: Callable[..., Any], example: str) -> None:
    """TypeError for a function that does not take the step count, such as `averaging.uniform`."""
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(0)
    except TypeError:
        raise TypeError(
            f"{name} must be a float or a schedule, which takes the step count, got {schedule!r} "
            f"with the arguments ({', '.join(signature.parameters)}). Give what it returns, such "
            f"as {example}."
        ) from None


def check_learning_rate(name: str, schedule: Callable[..., Any]) -> None:
    """TypeError for a schedule that does not take the step count."""
    check_schedule(name, schedule, "optax.cosine_decay_schedule(0.1, 1000)")


def check_mu(name: str, mu: Any) -> None:
    """`mu_x` and `mu_y` lie in [0, 1), schedules at their start; traced values pass."""
    if callable(mu):
        check_schedule(name, mu, "averaging.uniform()")
        # Concrete, even when this is called under a trace. `averaging.from_diloco`, which is no
        # schedule but also takes a number, is caught here.
        with jax.ensure_compile_time_eval():
            mu = mu(0)
        name = f"{name}(0)"
    if is_traced(mu):
        return
    remedy = "Give a float in [0, 1), such as mu_x=0.9967 and mu_y=0.7, or an optax schedule."
    # In float32, as the state stores mu_y. Values that would overflow it are out of range anyway.
    if name.startswith("mu_y") and np.float32(min(check_number(name, mu, remedy), 2.0)) == 1:
        raise ValueError(
            f"{name} must be below 1, got {mu!r}: with mu_y = 1 the params y equal the average x, "
            "and the fast iterate z = x + (y - x) / (1 - mu_y) cannot be recovered from them. "
            "Give a smaller value, such as 0.99."
        )
    check_fraction(name, mu, remedy)


def check_at_least(name: str, value: Any, low: float, remedy: str, *, whole: bool = False) -> None:
    """ValueError unless the value is finite and at least `low`; traced values pass."""
    if is_traced(value):
        return
    number = check_number(name, value, remedy)
    if not low <= number < math.inf or (whole and number != int(number)):
        kind = "a whole number" if whole else "a finite number"
        raise ValueError(f"{name} must be {kind} of at least {low:g}, got {value!r}. {remedy}")


def check_fraction(name: str, value: Any, remedy: str) -> None:
    """ValueError unless the value is in [0, 1); traced values pass."""
    if not is_traced(value) and not 0 <= check_number(name, value, remedy) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value!r}. {remedy}")


def check_positive(name: str, value: Any, remedy: str) -> None:
    """ValueError unless the value is finite and above 0; traced values pass."""
    if not is_traced(value) and not 0 < check_number(name, value, remedy) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value!r}. {remedy}")


def check_concrete(name: str, value: Any, remedy: str) -> None:
    """TypeError for a traced value, where a table is computed from it."""
    if is_traced(value):
        raise TypeError(f"{name} must be known when the schedule is made, got {value!r}. {remedy}")


def check_peak(name: str, value: Any, with_schedules: str) -> None:
    """Checks the learning rate that a schedule is made from: a positive number, or traced."""
    if callable(value):
        raise TypeError(
            f"{name} must be a number, from which the schedule is made, got {value!r}. Give the "
            f"peak, or for a schedule of your own use {with_schedules}."
        )
    check_positive(name, value, "Give the peak of the learning rate, such as 1e-3.")


def check_steps(name: str, value: Any, low: int) -> None:
    """Checks a number of steps that a schedule is made from: a concrete whole number."""
    remedy = "Give a whole number of updates"
    check_concrete(name, value, f"{remedy}; in optax.inject_hyperparams name it in static_args.")
    check_at_least(name, value, low, f"{remedy}.", whole=True)


def check_window(window: Any) -> None:
    """Checks the part of a run that an average remembers: in (0, 1], or traced."""
    remedy = "Give the part of the run that the average remembers, such as 0.05."
    check_positive("window", window, remedy)
    if not is_traced(window) and window > 1:
        raise ValueError(f"window must be at most 1, got {window!r}. {remedy}")


def check_transformation(name: str, optimizer: Any) -> None:
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {optimizer!r}. Give an optimizer "
            "such as optax.adamw(1e-3); for optax.MultiSteps, its gradient_transformation()."
        )


def check_muon(muon: Callable[..., Any]) -> None:
    """ImportError for a muon from before Optax 0.2.8, which lacks arguments of `gpa_muon`."""
    if "preconditioning" not in inspect.signature(muon).parameters:
        raise ImportError(
            f"gpa_muon needs optax 0.2.8 or newer; this is optax {optax.__version__}. Give gpa the "
            "muon of this version as its base optimizer, as in gpa(optax.contrib.muon(0.02))."
        )


def check_decay(weight_decay: Any) -> None:
    """ImportError for a schedule in Optax 0.2.6, which calls it with count 0 at every update."""
    if callable(weight_decay) and optax.__version__.startswith("0.2.6"):
        raise ImportError(
            "A schedule of weight_decay needs optax 0.2.7 or newer; this is optax "
            f"{optax.__version__}, which never advances its count. Give a number."
        )


def check_params(params: Any) -> None:
    """TypeError at the first leaf of the params given to `init` that cannot be averaged."""
    for path, leaf in tree_leaves_with_path(params):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise TypeError(
                f"params{keystr(path)} must be an array, got {leaf}. Give arrays, or for the form "
                "of the state alone call jax.eval_shape(optimizer.init, params)."
            )
        try:
            dtype = jnp.result_type(leaf)
        except TypeError:
            raise TypeError(
                f"params{keystr(path)} must be an array, got {leaf!r}. {_LEAVE_OUT}"
            ) from None
        if not jnp.issubdtype(dtype, jnp.inexact):
            raise TypeError(
                f"params{keystr(path)} has dtype {dtype}, and only floating-point and complex "
                f"params can be averaged. {_LEAVE_OUT}"
            )


_LEAVE_OUT = (
    "Give params with None in place of such leaves, as "
    "equinox.partition(model, equinox.is_inexact_array) makes them, or give nnx.Optimizer a "
    "narrower wrt."
)


def check_update(
    caller: str, kind: type, updates: Any, state: Any, params: Any, reference: str
) -> None:
    """Checks what `update` is given: a state of this kind, and trees like its field `reference`."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{caller} needs a {kind.__name__} in update, got {_told(state)}. Give the state that "
            "init returned, or the last update; restore checkpoints into that form."
        )
    if params is None:
        raise ValueError(
            f"{caller} needs params in update, got None. "
            "Call optimizer.update(grads, opt_state, params)."
        )
    check_matches("gradients", updates, getattr(state, reference))
    check_matches("params", params, getattr(state, reference))


def _told(value: Any) -> str:
    fields = getattr(value, "_fields", None)
    return f"a {type(value).__name__}" + (f" of {', '.join(fields)}" if fields else "")


def check_no_value_fn(extra_args: dict[str, Any]) -> None:
    """ValueError for `value_fn`, with which a base evaluates the loss around its params."""
    if "value_fn" in extra_args:
        raise ValueError(
            "update got value_fn, for a base optimizer that evaluates the loss around its params, "
            'such as a line search. With base_params="z" these are not the params y at which '
            'value and grad were taken. Give gpa base_params="y".'
        )


def check_dtypes(params: Any, stored: Any, state_dtype: jnp.dtype | None = None) -> None:
    """TypeError if the state does not store these params in the dtypes of `stored`."""
    leaves = tree_leaves_with_path(params)
    for (path, p), kept in zip(leaves, jax.tree.leaves(stored), strict=True):
        if stored_dtype(p, state_dtype) != kept.dtype:
            raise _cast_after_init(path, p, f"a leaf that is stored in {kept.dtype}")


def check_master_copy(params: Any, has_y: bool, state_dtype: jnp.dtype | None) -> None:
    """TypeError if the state stores y and the params need no copy of it, or the reverse."""
    leaves = tree_leaves_with_path(params)
    if has_y == needs_master_copy(params, state_dtype):
        return
    for path, p in leaves:
        full = full_dtype(p, state_dtype)
        if has_y or full != jnp.result_type(p):
            what = "params narrower than" if has_y else "a leaf of"
            keeps = "keeps" if has_y else "keeps no copy of"
            raise _cast_after_init(path, p, f"{what} {full}, for which the state {keeps} y")


def _cast_after_init(path: Any, p: Any, given: str) -> TypeError:
    return TypeError(
        f"params{keystr(path)} has dtype {jnp.result_type(p)}, and init was given {given}. "
        "Call init with params of the dtype that is trained."
    )


def check_matches(what: str, tree: Any, reference: Any) -> None:
    """ValueError at the first leaf where `tree` differs in place or shape from `reference`.

    `reference` is part of a state, and so has the form of the params that were given to init.
    """
    structure, wanted = jax.tree.structure(tree), jax.tree.structure(reference)
    if structure == wanted and all(
        np.shape(leaf) == np.shape(expected)
        for leaf, expected in zip(jax.tree.leaves(tree), jax.tree.leaves(reference), strict=True)
    ):
        return
    remedy = "Call init again with the present params, or restore the state that belongs to them."
    shapes = {keystr(path): np.shape(leaf) for path, leaf in tree_leaves_with_path(tree)}
    expected = {keystr(path): np.shape(leaf) for path, leaf in tree_leaves_with_path(reference)}
    for path, shape in expected.items():
        if path not in shapes:
            raise ValueError(
                f"The {what} have no leaf at {path or 'the root'}, where the params given to init "
                f"have one of shape {shape}. Give zeros for a leaf that has no gradient, or None "
                f"in the params too. {remedy}"
            )
        if shapes[path] != shape:
            if what == "gradients" and shapes[path][1:] == shape:
                remedy = (
                    "Give one gradient of all examples; where these are of single ones, put "
                    "optax.contrib.differentially_private_aggregate in front, in optax.chain."
                )
            raise ValueError(
                f"The {what} have shape {shapes[path]} at {path or 'the root'}, where the params "
                f"given to init have shape {shape}. {remedy}"
            )
    for path, shape in shapes.items():
        if path not in expected:
            raise ValueError(
                f"The {what} have a leaf of shape {shape} at {path or 'the root'}, where the "
                f"params given to init have none. {remedy}"
            )
    raise ValueError(
        f"The {what} are the tree {structure}, and the params given to init are the tree "
        f"{wanted}: the leaves agree, the containers do not. {remedy}"
    )


def state_dtype_or_error(state_dtype: Any) -> jnp.dtype | None:
    """`state_dtype` as a dtype; TypeError unless it is None or a real floating type."""
    if state_dtype is None:
        return None
    remedy = "Give a floating dtype such as jnp.float32, or None for at least float32."
    try:
        if isinstance(state_dtype, (np.generic, np.ndarray, jax.Array)):
            raise TypeError
        dtype = jnp.dtype(state_dtype)
        # NumPy knows some that JAX does not.
        jax.eval_shape(lambda: jnp.zeros((), jax.dtypes.canonicalize_dtype(dtype)))
    except (TypeError, ValueError):
        raise TypeError(f"state_dtype must be a dtype, got {state_dtype!r}. {remedy}") from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"state_dtype must be a floating dtype, got {dtype}. {remedy}")
    return dtype
