"""Generalized Primal Averaging: the transformation and its state."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpa_optax import averaging
from gpa_optax._precision import (
    full_dtype,
    lerp,
    like,
    needs_master_copy,
    scalar_dtype,
    stored_dtype,
    stored_or_given,
)
from gpa_optax._validate import (
    check_dtypes,
    check_master_copy,
    check_mu,
    check_no_value_fn,
    check_params,
    check_transformation,
    check_update,
    state_dtype_or_error,
)
from gpa_optax.averaging import AveragingSchedule


class GPAState(NamedTuple):
    """State of `gpa`.

    Attributes:
      count: number of updates so far; an int32 scalar that stops at its largest value.
      last_mu_y: the ``mu_y`` of the last update, a scalar, with which z is recovered; 0 before the
        first.
      x: the average, a tree like the params, in the state's dtype.
      y: the params at the state's dtype, a tree like the params, when any of them is narrower than
        that; the params are its cast, up to the rounding of their updates. None otherwise: the
        params themselves are y.
      base_state: the state of the base optimizer.
    """

    count: jax.typing.ArrayLike
    last_mu_y: jax.Array
    x: optax.Params
    y: optax.Params | None
    base_state: optax.OptState


def gpa(
    base_optimizer: optax.GradientTransformation,
    mu_x: optax.ScalarOrSchedule = averaging.warmed_up(0.9967),
    mu_y: optax.ScalarOrSchedule = 0.7,
    *,
    base_params: Literal["z", "y"] = "z",
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages the iterates of any optimizer smoothly, at every step.

    Three sequences of parameters start at the same point. The base optimizer steps at the fast
    iterate :math:`z`, validation and inference use the average :math:`x`, and gradients are taken
    in between, at :math:`y`:

    .. math::

      \begin{align*}
        z_{t+1} &= z_t + \mathrm{base\_update}(\nabla f(y_t);\ z_t) \\
        x_{t+1} &= \mu_x\, x_t + (1 - \mu_x)\, z_{t+1} \\
        y_{t+1} &= \mu_y\, x_{t+1} + (1 - \mu_y)\, z_{t+1}
      \end{align*}

    The state and the params together hold all three. The params of the training loop are :math:`y`,
    and the state stores :math:`x`, one buffer more than the base optimizer's;
    :math:`z_t = x_t + (y_t - x_t) / (1 - \mu_y)` comes back from both. Where the params are
    narrower than float32, the state also stores :math:`y` in float32, and the params are its cast.

    The defaults are the paper's constants after a uniform start. They are for long runs: around a
    base that has a momentum of its own they lost to AdamW in runs of 400 and 1,000 steps, and could
    not be told from it in 4,000. `annealed_adamw` and `anytime_adamw` are settings for any length.

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

    Weights may be loaded between ``init`` and the first ``update``: x starts at the params that the
    first update is given.

    Args:
      base_optimizer: the optimizer whose iterates are averaged. Its learning-rate schedule, weight
        decay and momentum act on z. Extra arguments of ``update`` are passed on to it. A base that
        evaluates the loss itself, around the params that it is given, needs ``base_params="y"``: a
        line search (refused otherwise), `optax.contrib.sam` with ``opaque_mode``,
        `optax.value_and_grad_from_state`. So does one that compares gradients of successive params,
        such as `optax.scale_by_lbfgs`.
      mu_x: how slowly the average moves, in [0, 1): a float, or a schedule of the step count (from
        0). The average remembers about ``1 / (1 - mu_x)`` steps, which must be short against the
        run. See `gpa_optax.averaging` for constants and schedules, among them schedules that stay
        exact near 1.
      mu_y: how far y lies from z towards x, in [0, 1): a float or a schedule. It acts as the
        momentum. A schedule must stay below 1, where z is lost; its value at an update places the y
        of the next gradient.
      base_params: which iterate the base optimizer is given as its params, and so where decoupled
        weight decay acts: "z", as in the paper, or "y".
      state_dtype: the dtype of x, and of y when the params are narrower than it. Default: float32
        for params narrower than that, else the params' own. The base optimizer runs at the wider of
        the params' and this dtype. Complex params have complex x of the same precision. In bfloat16
        x stalls unless ``1 - mu_x`` is well above bfloat16's resolution, 1/256.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `GPAState`. ``update`` needs
      ``params``, and returns updates in their dtype and shapes. `eval_params` gives x.

    Raises:
      TypeError: if ``base_optimizer`` is no transformation, ``mu_x`` or ``mu_y`` neither a number
        nor a function of the step count, ``state_dtype`` not floating; from ``init``, if a leaf of
        the params is no array of floating-point or complex numbers; from ``update``, if the state
        is no `GPAState`, or the params have another dtype than at ``init``.
      ValueError: if ``mu_x`` or ``mu_y`` is outside [0, 1), ``base_params`` neither "z" nor "y";
        from ``update``, if params are missing, gradients or params differ from the state in
        structure or shape, or ``value_fn`` is given with ``base_params="z"``.

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

      `optax.tree.map_params` asks ``init`` for the structure of the state without giving it dtypes.
      It expects ``y`` to be None, unless ``state_dtype`` is given: give ``state_dtype=jnp.float32``
      when you use it with bfloat16 params.

      Params and state can be donated together. A base that stores one array twice, as
      `optax.lbfgs` and `optax.contrib.cocob` do, needs a state from ``jax.jit(optimizer.init)``
      for that.

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
        check_params(params)
        # Copies every leaf: params and state are both donated to the training step.
        y = jax.tree.map(lambda p: jnp.array(p, full_dtype(p, state_dtype), copy=True), params)
        return GPAState(
            count=jnp.zeros([], jnp.int32),
            # Before the first update z = y, also where x is stored with fewer digits than y.
            last_mu_y=jnp.zeros([], scalar_dtype(y)),
            x=jax.tree.map(lambda p: jnp.array(p, stored_dtype(p, state_dtype), copy=True), params),
            y=jax.tree.map(jnp.copy, y) if needs_master_copy(params, state_dtype) else None,
            base_state=base_optimizer.init(y),
        )

    def update_fn(
        updates: optax.Updates, state: GPAState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, GPAState]:
        check_update("gpa", GPAState, updates, state, params, "x")
        check_dtypes(params, state.x, state_dtype)
        check_master_copy(params, state.y is not None, state_dtype)
        if base_params == "z":
            check_no_value_fn(extra_args)
        x, y = x_and_y(state, params)
        mu_y_now = jnp.asarray(_mu_at(mu_y, state.count), state.last_mu_y.dtype)

        # The base optimizer's step from z to z', with the gradient at y. Algorithm 1 forms y when a
        # step begins. Optax takes the gradient before `update`, so here y is formed when a step
        # ends, and z is recovered with the mu_y of that step.
        step, base_state = base_optimizer.update(
            jax.tree.map(lambda g, y: jnp.asarray(g, y.dtype), updates, y),
            state.base_state,
            z_of(x, y, state.last_mu_y) if base_params == "z" else y,
            **extra_args,
        )

        average = functools.partial(
            _average_leaf,
            weight_of_z=_one_minus(mu_x, state.count),
            last_mu_y=state.last_mu_y,
            mu_y=mu_y_now,
            y_is_stored=state.y is not None,
        )
        averaged = jax.tree.map(average, x, y, step, params)

        def each(field: str) -> Any:
            return jax.tree.map(lambda _, leaf: getattr(leaf, field), x, averaged)

        return each("update"), GPAState(
            count=optax.safe_increment(state.count),
            last_mu_y=mu_y_now,
            x=each("x"),
            y=None if state.y is None else each("y"),
            base_state=base_state,
        )

    # Optax types every state as one tree type, which a NamedTuple with fields of its own is not.
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def x_and_y(state: GPAState, params: optax.Params) -> tuple[Any, Any]:
    """x as it is stored and y at full precision; before the first update those of `params`."""
    if state.y is None:
        y = jax.tree.map(jnp.asarray, params)
    else:
        y = stored_or_given(state.count, state.y, params)
    return stored_or_given(state.count, state.x, y), y


def z_of(x: Any, y: Any, mu_y: jax.typing.ArrayLike) -> Any:
    """z = y + mu_y (z - x), which is y to the last bit where ``mu_y`` is 0."""
    return jax.tree.map(lambda x, y: y + like(mu_y, y) * _gap(x, y, mu_y), x, y)


def _gap(x: jax.Array, y: jax.Array, mu_y: jax.typing.ArrayLike) -> jax.Array:
    """z - x, of one leaf; ``mu_y`` is that of the last update."""
    return (y - x.astype(y.dtype)) / like(1 - mu_y, y)


class _Leaf(NamedTuple):
    """What an update makes of one leaf."""

    x: jax.Array
    y: jax.Array
    update: jax.Array


def _average_leaf(
    x: jax.Array,
    y: jax.Array,
    step: jax.Array,
    param: jax.typing.ArrayLike,
    *,
    weight_of_z: jax.typing.ArrayLike,
    last_mu_y: jax.Array,
    mu_y: jax.Array,
    y_is_stored: bool,
) -> _Leaf:
    """The second and third equations for one leaf; `step`, which is z' - z, is the first.

    They are written as differences, because z is kept nowhere but in y. Written as sums, they would
    round y' to the same side again and again, and z would drift with the number of steps instead of
    its square root. For the same reason x' is rounded to its stored dtype before y' is computed
    from it.
    """
    step = jnp.asarray(step, y.dtype)
    wide_x, gap = x.astype(y.dtype), _gap(x, y, last_mu_y)
    w, mu, last_mu = like(weight_of_z, y), like(mu_y, y), like(last_mu_y, y)

    # x' = mu_x x + (1 - mu_x) z', which is x + (1 - mu_x) (z' - x).
    new_x = (wide_x + w * (gap + step)).astype(x.dtype)
    # y' = mu x' + (1 - mu) z', less the same of the last update: y = last_mu x + (1 - last_mu) z.
    change = mu * (new_x.astype(y.dtype) - wide_x) + (1 - mu) * step + (last_mu - mu) * gap
    # Without z' the two equations say x' = x + w / (1 - mu + mu w) (y' - x).
    return _in_one_kernel(x, y, new_x, change, param, w / (1 - mu + mu * w), y_is_stored)


def _in_one_kernel(
    x: jax.Array,
    y: jax.Array,
    new_x: jax.Array,
    change: jax.Array,
    param: jax.typing.ArrayLike,
    weight_of_y: jax.Array,
    y_is_stored: bool,
) -> _Leaf:
    """The same x', y' and update, in the form that takes one kernel and no temporary memory.

    On a CPU, each of XLA's kernels writes one array, and to compute `new_x` as it is given the
    base's steps for all leaves would be kept in memory. Computed as a point between x and y', it
    needs no memory for them.

    On a TPU, one kernel writes x', y' and a narrow parameter if each is computed from the one
    before, but not if both of the others read y'. So the parameter is computed by way of x'.
    """
    new_y = y + change
    if x.dtype == y.dtype:  # a narrower x' is kept: it is rounded, and y' was computed from it
        new_x = lerp(x, new_y, weight_of_y)
    if not y_is_stored:
        return _Leaf(new_x, new_y, change)
    wide_x = new_x.astype(y.dtype)
    end = wide_x + (new_y - wide_x)
    return _Leaf(new_x, new_y, end.astype(jnp.result_type(param)) - param)


def _mu_at(mu: optax.ScalarOrSchedule, count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    return mu(count) if callable(mu) else mu


def _one_minus(mu: optax.ScalarOrSchedule, count: jax.typing.ArrayLike) -> jax.typing.ArrayLike:
    # For a constant the subtraction is Python's, in float64. An AveragingSchedule never forms mu:
    # near 1 float32 keeps too few digits of it.
    return mu.weight(count) if isinstance(mu, AveragingSchedule) else 1 - _mu_at(mu, count)
