"""Generalized Primal Averaging: the transformation and its state."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpa_optax._validate import (
    check_inexact,
    check_mu,
    check_transformation,
    check_update,
    state_dtype_or_error,
)
from gpa_optax.averaging import AveragingSchedule


class GPAState(NamedTuple):
    """State of `gpa`.

    Attributes:
      count: number of updates so far; an int32 scalar that stops at its largest value.
      mu_y: the ``mu_y`` of the last update, a scalar, with which z comes back; 0 before the first.
      x: the average, a tree like the params, in the state's dtype.
      y: the params at the state's dtype, a tree like the params, when any of them is narrower than
        that; the params are its cast, up to the rounding of their updates. None otherwise: the
        params themselves are y.
      base_state: the state of the base optimizer.
    """

    count: jax.typing.ArrayLike
    mu_y: jax.Array
    x: optax.Params
    y: optax.Params | None
    base_state: optax.OptState


def gpa(
    base_optimizer: optax.GradientTransformation,
    mu_x: optax.ScalarOrSchedule = 0.9967,
    mu_y: optax.ScalarOrSchedule = 0.7,
    *,
    base_params: Literal["z", "y"] = "z",
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the iterates of any optimizer smoothly, at every step.

    Three sequences of parameters start at the same point. The base optimizer steps at the fast
    iterate :math:`z`, validation and inference use the average :math:`x`, and gradients are taken
    in between, at :math:`y`, which are the params of the training loop:

    .. math::

      \begin{align*}
        z_{t+1} &= z_t + \mathrm{base\_update}(\nabla f(y_t);\ z_t) \\
        x_{t+1} &= \mu_x\, x_t + (1 - \mu_x)\, z_{t+1} \\
        y_{t+1} &= \mu_y\, x_{t+1} + (1 - \mu_y)\, z_{t+1}
      \end{align*}

    The params hold :math:`y` and the state holds :math:`x`, one buffer more than the base
    optimizer's; :math:`z_t = x_t + (y_t - x_t) / (1 - \mu_y)` is recovered from them.

    ========================  ==================================================================
    Setting                   Method
    ========================  ==================================================================
    ``mu_x=0``                the base optimizer (x = y = z)
    ``mu_y=0``                the base optimizer, with an exponential moving average on the side
    ``mu_x=mu_y``             Nesterov's method, in primal-averaging form
    `averaging.uniform`       Schedule-Free with beta = ``mu_y``
    `averaging.from_diloco`   single-worker DiLoCo, smoothed
    ========================  ==================================================================

    The transformation may stand inside and around any other, with one rule: its update must be the
    last thing that touches the params, and the params must change by nothing else. Gradients are
    clipped before it, as in ``optax.chain(optax.clip_by_global_norm(1.0), gpa(...))``; whatever
    scales or adds to updates (weight decay, a learning rate) belongs into the base optimizer. So
    does a wrapper that moves the params itself, such as `optax.lookahead` or
    `optax.contrib.mechanize`: around GPA it would change y behind GPA's back.

    Args:
      base_optimizer: the optimizer whose iterates are averaged. Its learning-rate schedule, weight
        decay and momentum act on z. Extra arguments of ``update`` are passed on to it.
      mu_x: how slowly the average moves, in [0, 1): a float, or a schedule of the step count (from
        0). The average remembers about ``1 / (1 - mu_x)`` steps, which must be short against the
        run. See `gpa_optax.averaging` for constants and schedules, among them schedules that stay
        exact near 1.
      mu_y: how far y lies from z towards x, in [0, 1): a float or a schedule. It acts as the
        momentum. A schedule must stay below 1, where z is lost.
      base_params: which iterate the base optimizer is given as its params, and so where decoupled
        weight decay acts: "z", as in the paper, or "y".
      state_dtype: the dtype of x, and of y when the params are narrower than it. Default: float32
        for params narrower than that, else the params' own. The base optimizer runs at the wider of
        the params' and this dtype. Complex params have complex x of the same precision. In bfloat16
        x stalls where ``1 - mu_x`` is not well above its resolution, 1/256.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `GPAState`. ``update`` needs
      ``params``, and returns updates in their dtype and shapes. `eval_params` gives x.

    Raises:
      TypeError: if ``base_optimizer`` is no transformation, ``mu_x`` or ``mu_y`` neither a number
        nor a function of the step count, ``state_dtype`` not floating; from ``init``, if
        a leaf of the params is integer or boolean.
      ValueError: if ``mu_x`` or ``mu_y`` is outside [0, 1), ``base_params`` neither "z" nor "y";
        from ``update``, if params are missing, or gradients or params differ from the state in
        structure or shape.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gpa_optax import eval_params, gpa
      >>> def loss(params): return jnp.sum((params["w"] - 3.0) ** 2)
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0), gpa(optax.adamw(0.05), mu_x=0.9, mu_y=0.7))
      >>> params = {"w": jnp.zeros(2)}
      >>> opt_state = optimizer.init(params)
      >>> for _ in range(200):
      ...     grads = jax.grad(loss)(params)
      ...     updates, opt_state = optimizer.update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> x = eval_params(opt_state, params)
      >>> print(x["w"].round(1))
      [3. 3.]

    .. note::
      `optax.inject_hyperparams` casts what it injects to the params' dtype. With bfloat16 params
      give it ``hyperparam_dtype=jnp.float32``, or ``mu_x`` is rounded to two digits. It takes
      callables for schedules, so name ``state_dtype`` in its ``static_args`` if you give one.

      `optax.tree.map_params` asks ``init`` for the form of the state without telling it dtypes. It
      expects ``y`` to be None, unless ``state_dtype`` is given: give ``state_dtype=jnp.float32``
      when you use it with bfloat16 params.

    References:
      Defazio et al., `Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs
      <https://arxiv.org/abs/2512.17131>`_, 2025, Algorithm 1

      Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024
    """
    check_transformation("base_optimizer", base_optimizer)
    check_mu("mu_x", mu_x)
    check_mu("mu_y", mu_y)
    if not isinstance(base_params, str) or base_params not in ("z", "y"):
        raise ValueError(
            f'base_params must be "z" or "y", got {base_params!r}. Give "z" to let weight decay '
            'act on the fast iterate (the paper), "y" to let it act on the params.'
        )
    state_dtype = state_dtype_or_error(state_dtype)
    base_optimizer = optax.with_extra_args_support(base_optimizer)

    def init_fn(params: optax.Params) -> GPAState:
        check_inexact(params)
        y = jax.tree.map(lambda p: jnp.asarray(p, _wider(p, state_dtype)), params)
        return GPAState(
            count=jnp.zeros([], jnp.int32),
            # Of no update yet, and so z = y, also where x is stored with fewer digits than y.
            mu_y=jnp.zeros([], _scalar_dtype(y)),
            # A copy, because params and state are both donated to the train step.
            x=jax.tree.map(lambda p: jnp.array(p, stored_dtype(p, state_dtype), copy=True), params),
            y=jax.tree.map(jnp.copy, y) if _needs_master(params, state_dtype) else None,
            base_state=base_optimizer.init(y),
        )

    def update_fn(
        updates: optax.Updates, state: GPAState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, GPAState]:
        check_update("gpa", updates, params, state.x)
        x, y = state.x, full_precision_y(state, params)
        to_z = from_y_to_z(x, y, state.mu_y)
        grads = jax.tree.map(lambda g, y: jnp.asarray(g, y.dtype), updates, y)
        base_updates, base_state = base_optimizer.update(
            grads,
            state.base_state,
            jax.tree.map(jnp.add, y, to_z) if base_params == "z" else y,
            **extra_args,
        )

        weight_of_z = _one_minus(mu_x, state.count)
        mu_y_now = jnp.asarray(_mu_at(mu_y, state.count), state.mu_y.dtype)
        # The three equations, in which z' and y' are given by their differences from y. A step has
        # digits that z' itself has no room for. Without them y' is rounded to the same side again
        # and again if mu_y is a multiple of 0.1, and the error of z grows with the number of steps
        # instead of with its root.
        #   z' = z + base_update
        to_z = optax.apply_updates(to_z, base_updates)
        #   x' = x + (1 - mu_x) (z' - x)
        # With x - y, because y - x, of which z was made, would be kept in memory for both.
        new_x = jax.tree.map(
            lambda x, y, to_z: (x + _like(weight_of_z, y) * (to_z - (x - y))).astype(x.dtype),
            *(x, y, to_z),
        )
        #   y' = z' + mu_y (x' - z')
        to_y = jax.tree.map(
            lambda x, y, to_z: _lerp(to_z, x.astype(y.dtype) - y, mu_y_now), new_x, y, to_z
        )

        new_y = jax.tree.map(jnp.add, y, to_y)
        new_updates = to_y if state.y is None else difference(new_y, params)
        if _dtypes(x) == _dtypes(y):
            # The same x once more, now as a point between the old one and y. It needs z no longer,
            # which XLA's CPU backend, whose kernels write one array each, would keep for it, of all
            # leaves at once. A narrower x is rounded, and y was made of it: it stays.
            weight_of_y = weight_of_z / (1 - mu_y_now + mu_y_now * weight_of_z)
            new_x = jax.tree.map(lambda x, y: _lerp(x, y, weight_of_y), x, new_y)
            if state.y is not None:
                # The params of y by way of x: a TPU's compiler writes all three in one kernel if
                # each is made of the one before, but not if y is read for both others.
                end = jax.tree.map(lambda x, y: x + (y - x), new_x, new_y)
                new_updates = difference(end, params)

        return new_updates, GPAState(
            count=optax.safe_increment(state.count),
            mu_y=mu_y_now,
            x=new_x,
            y=None if state.y is None else new_y,
            base_state=base_state,
        )

    # Optax types every state as one tree type, which a NamedTuple with fields of its own is not.
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def from_y_to_z(x: Any, y: Any, mu_y: jax.Array) -> Any:
    """z - y, which is mu_y (y - x) / (1 - mu_y).

    First multiplied, then divided: mu_y / (1 - mu_y) by itself would be rounded, and move z to the
    same side at each update.
    """
    rest = 1 - mu_y
    return jax.tree.map(
        lambda x, y: _like(mu_y, y) * (y - x.astype(y.dtype)) / _like(rest, y), x, y
    )


def full_precision_y(state: GPAState, params: Any) -> Any:
    return jax.tree.map(jnp.asarray, params if state.y is None else state.y)


def difference(new: Any, params: Any) -> Any:
    """The update that takes the params to `new`, in the params' dtype."""
    return jax.tree.map(lambda n, p: n.astype(jnp.result_type(p)) - p, new, params)


def _dtypes(tree: Any) -> list[jnp.dtype]:
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


def _lerp(start: jax.Array, end: jax.Array, weight: jax.typing.ArrayLike) -> jax.Array:
    """(1 - weight) start + weight end, in the form that keeps the digits of a small weight."""
    way = end - start
    return start + _like(weight, way) * way


def _mu_at(mu: optax.ScalarOrSchedule, count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    return mu(count) if callable(mu) else mu


def _one_minus(mu: optax.ScalarOrSchedule, count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    # For a constant the subtraction is Python's, in float64; an AveragingSchedule never forms mu,
    # of which float32 keeps too few digits near 1.
    return mu.weight(count) if isinstance(mu, AveragingSchedule) else 1 - _mu_at(mu, count)


def _like(scalar: jax.typing.ArrayLike, leaf: jax.Array) -> jax.Array:
    """The scalar in the leaf's precision, and real where the leaf is complex."""
    return jnp.asarray(scalar, jnp.finfo(leaf.dtype).dtype)


def _scalar_dtype(y: Any) -> jnp.dtype:
    """Float64 where a leaf needs it, float32 otherwise."""
    return jnp.result_type(
        jnp.float32, *(jnp.finfo(leaf.dtype).dtype for leaf in jax.tree.leaves(y))
    )


def stored_dtype(p: jax.typing.ArrayLike, state_dtype: jnp.dtype | None = None) -> jnp.dtype:
    """The dtype in which the state stores a param: by default at least float32."""
    dtype = jnp.result_type(p)
    if state_dtype is None:
        return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
    state_dtype = jax.dtypes.canonicalize_dtype(state_dtype)  # float32 for float64 without x64
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return jnp.promote_types(state_dtype, jnp.complex64)
    return state_dtype


def _wider(p: jax.typing.ArrayLike, state_dtype: jnp.dtype | None) -> jnp.dtype:
    """The dtype of y and z: the param's or the state's, whichever is wider."""
    return max(jnp.result_type(p), stored_dtype(p, state_dtype), key=lambda d: jnp.finfo(d).bits)


def _needs_master(params: Any, state_dtype: jnp.dtype | None) -> bool:
    leaves = jax.tree.leaves(params)
    if not leaves:
        # An empty tree, or optax.tree.map_params, which asks for the form of the state with a
        # placeholder that has no dtypes: whoever gives a state_dtype has params narrower than it.
        return state_dtype is not None
    return any(_wider(p, state_dtype) != jnp.result_type(p) for p in leaves)
