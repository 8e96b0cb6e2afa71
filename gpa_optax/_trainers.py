"""GPA in trainers written by others: checking that they use it correctly, and ending at x."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpa_optax._iterates import CoveredLeaf, covered_leaves, eval_params, gpa_states
from gpa_optax._validate import check_at_least, check_transformation


class EndAtXState(NamedTuple):
    """State of `end_at_x`.

    Attributes:
      count: number of updates so far; an int32 scalar.
      inner_state: the state of the optimizer inside.
    """

    count: jax.typing.ArrayLike
    inner_state: optax.OptState


def end_at_x(
    optimizer: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Lands the params on the average x with the last update of a run.

    For functions that train and return only the params, without the state that `eval_params` needs.
    Before the last update nothing differs from ``optimizer``. Training that continues after it
    starts over at x, where y and z are then as well; with params narrower than float32 it continues
    from the y that the state stores.

    Args:
      optimizer: an optimizer that contains `gpa` (or `single_worker_diloco`), including everything
        around it.
      steps: the number of calls of ``update`` in the whole run, at least 1. Around
        `optax.MultiSteps` these are its micro-steps.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is an `EndAtXState`. It must be the
      outermost transformation. `eval_params` finds the average in its state as well.

    Raises:
      TypeError: if ``optimizer`` is no transformation.
      ValueError: if ``steps`` is below 1 or no whole number; from ``update``, if there is no GPA
        state in the optimizer's.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from gpa_optax import end_at_x, eval_params, gpa
      >>> optimizer = end_at_x(gpa(optax.sgd(0.5), mu_x=0.5), steps=3)
      >>> params = jnp.array([4.0])
      >>> opt_state = optimizer.init(params)
      >>> for _ in range(3):
      ...     updates, opt_state = optimizer.update(params, opt_state, params)  # of 0.5 * w**2
      ...     params = optax.apply_updates(params, updates)
      >>> print(params == eval_params(opt_state, params))
      [ True]
    """
    check_transformation("optimizer", optimizer)
    check_at_least("steps", steps, 1, "Give the number of updates of the run.", whole=True)
    optimizer = optax.with_extra_args_support(optimizer)

    def init_fn(params: optax.Params) -> EndAtXState:
        return EndAtXState(jnp.zeros([], jnp.int32), optimizer.init(params))

    def update_fn(
        updates: optax.Updates, state: EndAtXState, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, EndAtXState]:
        updates, inner_state = optimizer.update(updates, state.inner_state, params, **extra_args)
        x = eval_params(inner_state, optax.apply_updates(params, updates))
        count = optax.safe_increment(state.count)
        updates = jax.tree.map(
            lambda u, p, x: jnp.where(count == steps, x - p, u), updates, params, x
        )
        return updates, EndAtXState(count, inner_state)

    # Optax types every state as one tree type, which a NamedTuple with fields of its own is not.
    return optax.GradientTransformationExtraArgs(init_fn, update_fn)  # pyright: ignore[reportArgumentType]


def check_step(before: tuple[Any, optax.Params], after: tuple[Any, optax.Params]) -> None:
    """Checks, from one of its steps, whether a trainer uses GPA correctly.

    GPA's update must be the last thing that touches the params. Whatever scales it, adds to it or
    moves the params in another way breaks z without any other sign. It shows in two successive
    states: after a correct step x' lies between x and z', at the same part of the way,
    ``1 - mu_x``, in every entry of every leaf. Where the state stores y, the params are its cast.

    Whatever moved the params before the step, such as continuing from x, does not show: the step
    itself is then correct. A scale that is the same for all leaves does not show in the first
    update of a run, where x, y and z start from one point, nor where all entries of the params move
    along one line, as those of a model with few params may late in a run. Check an early step, but
    not the first, with a learning rate that is not 0.

    Args:
      before: the optimizer's state and the params before a step, as for `eval_params`. Copy them
        first where the training step donates them: ``jax.tree.map(jnp.copy, (opt_state, params))``.
      after: both after that step. A step that changed nothing passes, such as one that
        `optax.apply_if_finite` left out, or one within `optax.MultiSteps`.

    Raises:
      ValueError: if the step was not GPA's alone; the message names the leaf and the likely cause.
        Also if the states are not of successive updates, or there is no `gpa` in them.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from gpa_optax import check_step, gpa
      >>> def two_steps(optimizer):
      ...     params = {"w": jnp.array([1.0, 2.0])}
      ...     seen = [(optimizer.init(params), params)]
      ...     for _ in range(2):
      ...         opt_state, params = seen[-1]
      ...         grads = {"w": params["w"] ** 3}
      ...         updates, opt_state = optimizer.update(grads, opt_state, params)
      ...         seen.append((opt_state, optax.apply_updates(params, updates)))
      ...     return seen[1:]
      >>> check_step(*two_steps(gpa(optax.sgd(0.1), 0.9)))
      >>> try:
      ...     check_step(*two_steps(optax.chain(gpa(optax.sgd(0.1), 0.9), optax.scale(0.5))))
      ... except ValueError as error:
      ...     print(str(error)[:60])
      The step moved params['w'] otherwise than GPA's update does:
    """
    old, new = gpa_states(before[0]), gpa_states(after[0])
    if len(old) != len(new):
        raise ValueError(
            f"before holds {len(old)} GPA states and after {len(new)}. Give two successive states "
            "of one optimizer."
        )
    for one, other in zip(old, new, strict=True):
        _check_one(
            _number(one.count),
            _number(other.count),
            covered_leaves(one, before[1]),
            covered_leaves(other, after[1]),
            1 - _number(other.last_mu_y),
        )


def _number(scalar: Any) -> float:
    (leaf,) = jax.tree.leaves(scalar)  # in flax.nnx.Optimizer a Variable
    return np.asarray(leaf).item()


def _check_one(
    old_count: float,
    new_count: float,
    old_leaves: list[CoveredLeaf],
    new_leaves: list[CoveredLeaf],
    rest: float,
) -> None:
    """`check_step` of one GPA state; `rest` is 1 - mu_y of the step."""
    if new_count - old_count not in (0, 1):
        raise ValueError(
            f"after is {new_count - old_count} updates later than before (counts {old_count} and "
            f"{new_count}). Give the states and params before and after one step."
        )
    for old, new in zip(old_leaves, new_leaves, strict=True):
        if new_count == old_count and not np.array_equal(old.param, new.param):
            raise ValueError(
                f"The step moved {new.name}, and GPA made no update in it (its count is still "
                f"{new_count}). {_CAUSE}"
            )
        # Updates of narrow params are rounded, and so is their sum.
        y, moved = _wide(new.y), _wide(new.y) - _wide(old.y)
        reach = 4 * _unit(new.param) * (np.abs(y) + np.abs(moved)) + 2 * _smallest(new.param)
        if not np.all(np.abs(_wide(new.param) - y) <= reach):
            raise ValueError(
                f"After the step {new.name} is not the cast of y, which the state stores. {_CAUSE}"
            )
    if new_count == old_count:
        return
    # In units of the rounding error of each entry, where z is recovered from x' and y'.
    ways, parts = [], []
    for old, new in zip(old_leaves, new_leaves, strict=True):
        x, new_x, y, z = map(_wide, (old.x, new.x, new.y, new.z))
        unit = max(_unit(new.x), _unit(new.y)) * (np.abs(x) + np.abs(new_x) + np.abs(y)) / rest
        unit = unit + (_smallest(new.x) + _smallest(new.y)) / rest
        ways.append((z - x) / unit)
        parts.append((new_x - x) / unit)
    weight = _slope(ways, parts)
    for new, way, part in zip(new_leaves, ways, parts, strict=True):
        if not np.all(np.abs(part - weight * way) <= 16):
            raise ValueError(
                f"The step moved {new.name} otherwise than GPA's update does: x' is not on the way "
                f"from x to z', or not at {weight:.3g} of it as in the other entries. {_CAUSE}"
            )


def _slope(ways: list[np.ndarray], parts: list[np.ndarray]) -> float:
    """The part of the way that was covered, one number for all entries, by least squares."""
    whole = sum(np.vdot(way, way).real for way in ways)
    return sum(np.vdot(w, p).real for w, p in zip(ways, parts, strict=True)) / whole if whole else 0


_CAUSE = (
    "Something after GPA scales its updates or adds to them (a learning rate, weight decay, a "
    "freeze), or moves the params otherwise. Let gpa be the last transformation, with all of "
    "these in its base optimizer."
)


def _wide(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    return leaf.astype(np.complex128 if np.iscomplexobj(leaf) else np.float64)


def _smallest(leaf: Any) -> float:
    """The distance between neighbouring numbers of the leaf's dtype near 0; float16's is 6e-8."""
    return float(jnp.finfo(jnp.result_type(leaf)).smallest_subnormal)


def _unit(leaf: Any) -> float:
    return float(jnp.finfo(jnp.result_type(leaf)).eps) / 2
