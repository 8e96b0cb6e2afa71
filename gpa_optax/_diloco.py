"""Single-worker DiLoCo, the two-loop method that GPA replaces."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gpa_optax._precision import difference, stored_dtype, stored_or_given
from gpa_optax._validate import (
    check_at_least,
    check_dtypes,
    check_fraction,
    check_learning_rate,
    check_params,
    check_transformation,
    check_update,
    is_traced,
)


class SingleWorkerDiLoCoState(NamedTuple):
    """State of `single_worker_diloco`.

    Attributes:
      count: number of updates so far; an int32 scalar.
      slow: the outer optimizer's weights, a tree like the params, at least float32.
      inner_state: the state of the inner optimizer.
      outer_state: the state of the outer optimizer, which holds its momentum, a tree like ``slow``.
    """

    count: jax.typing.ArrayLike
    slow: optax.Params
    inner_state: optax.OptState
    outer_state: optax.OptState


def single_worker_diloco(
    inner_optimizer: optax.GradientTransformation,
    sync_period: int,
    outer_learning_rate: optax.ScalarOrSchedule = 0.7,
    outer_momentum: float = 0.9,
) -> optax.GradientTransformationExtraArgs:
    r"""DiLoCo with one worker: the two loops that GPA replaces, as one transformation.

    The inner optimizer moves the params :math:`\theta`. Every ``sync_period`` (:math:`H`) steps
    the distance from the slow weights :math:`\phi` is taken as a gradient by SGD with Nesterov
    momentum, and the params start again from the slow weights:

    .. math::

      \begin{align*}
        \Delta &= \phi - \theta \\
        b &\leftarrow \mu\, b + \Delta \\
        \phi &\leftarrow \phi - \alpha\, (\Delta + \mu\, b) \\
        \theta &\leftarrow \phi
      \end{align*}

    It keeps two buffers more than the inner optimizer, where `gpa_optax.gpa` keeps one. It is here
    so that the comparison is at hand; `gpa_optax.eval_params` gives the slow weights. Those are at
    least float32; the fast weights are the params themselves, so with bfloat16 params small steps
    of the inner optimizer are rounded away, as they are without DiLoCo.

    Args:
      inner_optimizer: the optimizer of the inner loop, such as ``optax.adamw(1e-3)``. Extra
        arguments of ``update`` are passed on to it.
      sync_period: the number of inner steps :math:`H` between synchronizations, at least 1.
      outer_learning_rate: :math:`\alpha`, a float or a schedule of the number of synchronizations.
      outer_momentum: :math:`\mu`, in [0, 1).

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `SingleWorkerDiLoCoState`.
      ``update`` needs ``params`` and must be the last thing that touches them.

    Raises:
      TypeError: if ``inner_optimizer`` is no transformation, or ``outer_learning_rate`` neither a
        number nor a function of the count; from ``init``, if a leaf of the params
        is integer or boolean.
      ValueError: if ``sync_period`` is below 1 or no whole number, ``outer_learning_rate``
        negative, ``outer_momentum`` outside [0, 1); from ``update``, if params are missing.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gpa_optax import eval_params, single_worker_diloco
      >>> optimizer = single_worker_diloco(optax.sgd(0.1), sync_period=4)
      >>> params = jnp.array([4.0])
      >>> opt_state = optimizer.init(params)
      >>> update = jax.jit(optimizer.update)
      >>> for _ in range(200):
      ...     grads = jax.grad(lambda w: jnp.sum(w**2))(params)
      ...     updates, opt_state = update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(abs(float(eval_params(opt_state, params)[0])) < 1e-3)
      True

    References:
      Douillard et al., `DiLoCo: Distributed Low-Communication Training of Language Models
      <https://arxiv.org/abs/2311.08105>`_, 2023, Algorithm 1

      Defazio et al., `Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs
      <https://arxiv.org/abs/2512.17131>`_, 2025
    """
    check_transformation("inner_optimizer", inner_optimizer)
    remedy = "Give the whole number of inner steps between synchronizations, such as 32."
    check_at_least("sync_period", sync_period, 1, remedy, whole=True)
    if not is_traced(sync_period):
        if sync_period > jnp.iinfo(jnp.int32).max:
            raise ValueError(f"sync_period must fit into int32, got {sync_period!r}. {remedy}")
        sync_period = int(sync_period)  # with a float, counts compare in float32, exact to 2^24
    if callable(outer_learning_rate):
        check_learning_rate("outer_learning_rate", outer_learning_rate)
    else:
        remedy = "Give the outer optimizer's learning rate, such as 0.7."
        check_at_least("outer_learning_rate", outer_learning_rate, 0, remedy)
    remedy = "Give the outer optimizer's momentum, such as 0.9."
    check_fraction("outer_momentum", outer_momentum, remedy)
    inner_optimizer = optax.with_extra_args_support(inner_optimizer)
    outer_optimizer = optax.sgd(outer_learning_rate, outer_momentum, nesterov=True)

    def init_fn(params: optax.Params) -> SingleWorkerDiLoCoState:
        check_params(params)
        # Copies every leaf: params and state are both donated to the training step.
        slow = jax.tree.map(lambda p: jnp.array(p, stored_dtype(p), copy=True), params)
        return SingleWorkerDiLoCoState(
            count=jnp.zeros([], jnp.int32),
            slow=slow,
            inner_state=inner_optimizer.init(jax.tree.map(jnp.copy, params)),
            outer_state=outer_optimizer.init(slow),
        )

    def update_fn(
        updates: optax.Updates,
        state: SingleWorkerDiLoCoState,
        params: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SingleWorkerDiLoCoState]:
        check_update(
            "single_worker_diloco", SingleWorkerDiLoCoState, updates, state, params, "slow"
        )
        check_dtypes(params, state.slow)
        stored = stored_or_given(state.count, state.slow, params)
        inner_updates, inner_state = inner_optimizer.update(
            updates, state.inner_state, params, **extra_args
        )
        fast = optax.apply_updates(params, inner_updates)

        def keep() -> tuple[Any, Any, Any]:
            return fast, stored, state.outer_state

        def synchronize() -> tuple[Any, Any, Any]:
            delta = jax.tree.map(lambda s, f: s - f.astype(s.dtype), stored, fast)
            outer_updates, outer_state = outer_optimizer.update(delta, state.outer_state, stored)
            slow = optax.apply_updates(stored, outer_updates)
            return jax.tree.map(lambda s, f: s.astype(f.dtype), slow, fast), slow, outer_state

        count = optax.safe_increment(state.count)
        new, slow, outer_state = jax.lax.cond(
            jnp.remainder(count, sync_period) == 0, synchronize, keep
        )
        return difference(new, params), SingleWorkerDiLoCoState(
            count=count, slow=slow, inner_state=inner_state, outer_state=outer_state
        )

    # Optax types every state as one tree type, which a NamedTuple with fields of its own is not.
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]
