"""Dtypes: what the state stores, what updates are computed in, and what the params get back."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def stored_dtype(p: jax.typing.ArrayLike, state_dtype: jnp.dtype | None = None) -> jnp.dtype:
    """The dtype in which the state stores a parameter: by default at least float32."""
    dtype = jnp.result_type(p)
    if state_dtype is None:
        return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
    state_dtype = jax.dtypes.canonicalize_dtype(state_dtype)  # float32 for float64 without x64
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.promote_types(state_dtype, jnp.complex64)
    return state_dtype


def full_dtype(p: jax.typing.ArrayLike, state_dtype: jnp.dtype | None) -> jnp.dtype:
    """The dtype of y and z: the parameter's or the state's, whichever is wider."""
    return max(jnp.result_type(p), stored_dtype(p, state_dtype), key=lambda d: jnp.finfo(d).bits)


def needs_master_copy(params: optax.Params, state_dtype: jnp.dtype | None) -> bool:
    """Whether the params are too narrow to hold y, so that the state must."""
    leaves = jax.tree.leaves(params)
    if not leaves:
        # An empty tree, or optax.tree.map_params, which asks for the form of the state with a
        # placeholder that has no dtypes: whoever gives a state_dtype has params narrower than it.
        return state_dtype is not None
    return any(full_dtype(p, state_dtype) != jnp.result_type(p) for p in leaves)


def scalar_dtype(params: optax.Params) -> jnp.dtype:
    """The dtype of scalars of the state: float64 where a leaf needs it, float32 otherwise."""
    return jnp.result_type(
        jnp.float32, *(jnp.finfo(leaf.dtype).dtype for leaf in jax.tree.leaves(params))
    )


def like(scalar: jax.typing.ArrayLike, leaf: jax.Array) -> jax.Array:
    """The scalar in the leaf's precision, and real where the leaf is complex."""
    return jnp.asarray(scalar, jnp.finfo(leaf.dtype).dtype)


def lerp(start: jax.Array, end: jax.Array, weight: jax.typing.ArrayLike) -> jax.Array:
    """(1 - weight) start + weight end, in the form that keeps the digits of a small weight."""
    return start + like(weight, start) * (end - start)


def stored_or_given(count: jax.typing.ArrayLike, stored: Any, params: optax.Params) -> Any:
    """What the state stores; before the first update the params, in the stored dtypes.

    The first update decides where an optimizer starts, and not `init`: weights may be loaded
    between the two. Reading a state before its first update follows the same rule.
    """
    return jax.tree.map(
        lambda s, p: jnp.where(_leading(count, s) == 0, jnp.asarray(p, s.dtype), s), stored, params
    )


def _leading(count: jax.typing.ArrayLike, leaf: jax.Array) -> jax.Array:
    """The counts of an ensemble, whose axes lead, in a shape that broadcasts with `leaf`."""
    return jnp.reshape(count, jnp.shape(count) + (1,) * (jnp.ndim(leaf) - jnp.ndim(count)))


def difference(new: Any, params: optax.Params) -> optax.Updates:
    """The update that takes the params to `new`, in the params' dtype."""
    return jax.tree.map(lambda n, p: n.astype(jnp.result_type(p)) - p, new, params)
