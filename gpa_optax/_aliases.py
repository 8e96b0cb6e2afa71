"""GPA around the usual base optimizers.

`annealed_adamw` and `anytime_adamw` are whole settings, schedule and average included. The others
have the base's own arguments after `mu_x` and `mu_y`.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import muon

from gpa_optax import averaging
from gpa_optax._gpa import gpa
from gpa_optax._validate import (
    check_decay,
    check_muon,
    check_peak,
    check_steps,
    check_window,
    is_traced,
)

# A tree of booleans like the params (or a prefix of them), or a function that makes one of them.
MaskOrFn = Any


def _check_mask(name: str, mask: MaskOrFn) -> None:
    """ValueError for a bare boolean, which is what `optax.inject_hyperparams` makes of a function:
    it takes every function for a schedule, and calls it with the step count."""
    if isinstance(mask, (bool, np.bool_, np.ndarray, jax.Array)):
        raise ValueError(
            f"{name} must be a tree of booleans like the params, or a function that makes one of "
            f"them, got {mask!r}. Give None to let all leaves decay; within "
            f"optax.inject_hyperparams name {name} in static_args."
        )


def annealed_adamw(
    learning_rate: jax.typing.ArrayLike,
    steps: int,
    warmup_steps: int,
    *,
    mu_y: optax.ScalarOrSchedule = 0.9,
    window: float = 0.05,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: MaskOrFn = None,
    base_params: Literal["z", "y"] = "z",
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GPA around AdamW for a run whose length is known, with its schedule and its average.

    The learning rate :math:`\eta` grows from 0 to its peak along a line, and then falls to 0 along
    a line. The average's window follows it:

    .. math::

      \eta(t) = \eta_{\max} \min\left(\frac{t}{W},\ \frac{T - t}{T - W}\right), \qquad
      \mu_x(t) = \min\left(\frac{t}{t + 1},\
        1 - \frac{1}{\max(1,\ a\, T\, \eta(t) / \eta_{\max})}\right)

    with :math:`T` ``steps``, :math:`W` ``warmup_steps`` and :math:`a` ``window``. The only momentum
    is ``mu_y``: AdamW keeps no first moment, so that with float32 params the state is as large as
    AdamW's. It is `gpa_adamw` with ``b1=0`` and `averaging.annealed`; use those for another
    schedule.

    Start from twice the learning rate that is good for AdamW, with a fifth of the run as warmup; in
    fine-tuning from AdamW's own rate and warmup.

    Args:
      learning_rate: the peak :math:`\eta_{\max}`, a positive number; may be traced.
      steps: the number of updates :math:`T` of the whole run, at least 1. Updates after these
        change nothing, because the learning rate is 0.
      warmup_steps: the number of updates :math:`W` in which the learning rate grows, from 0 to
        below ``steps``.
      mu_y: how far the params lie from z towards x; see `gpa`.
      window: the steps that the average remembers at the peak, as a part of ``steps``, in (0, 1].
      b2: decay of the second moment.
      eps: added to the denominator outside the square root.
      weight_decay: decoupled weight decay, multiplied by the learning rate; a float or a schedule.
      mask: the leaves that decay: a tree of booleans like the params or a prefix of it, or a
        function that makes one of the params.
      base_params: where weight decay acts, "z" or "y"; see `gpa`.
      state_dtype: the dtype of x, at least float32 by default; see `gpa`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `GPAState`.

    Raises:
      TypeError: if ``learning_rate`` is a schedule, or ``steps`` or ``warmup_steps`` is traced;
        within `optax.inject_hyperparams` name both in its ``static_args``.
      ValueError: if an argument is out of its range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gpa_optax import annealed_adamw, eval_params
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0), annealed_adamw(0.1, steps=200, warmup_steps=40))
      >>> params = jnp.array([1.0, -2.0])
      >>> opt_state = optimizer.init(params)
      >>> for _ in range(200):
      ...     grads = jax.grad(lambda w: jnp.sum((w - 1.0) ** 2))(params)
      ...     updates, opt_state = optimizer.update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(jnp.allclose(eval_params(opt_state, params), 1.0, atol=0.05)))
      True

    References:
      Defazio et al., `Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs
      <https://arxiv.org/abs/2512.17131>`_, 2025
    """
    check_peak(
        "learning_rate", learning_rate, "gpa_adamw(schedule, mu_x=averaging.annealed(...), b1=0)"
    )
    check_steps("steps", steps, 1)
    check_steps("warmup_steps", warmup_steps, 0)
    if warmup_steps >= steps:
        raise ValueError(
            f"warmup_steps must be below steps ({steps}), got {warmup_steps!r}. Give a part of the "
            "run, such as steps // 5."
        )
    check_window(window)
    shape = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, warmup_steps),
            optax.linear_schedule(1.0, 0.0, steps - warmup_steps),
        ],
        [warmup_steps],
    )
    horizon: Any = window * steps
    # Python's max for numbers: mu_x in float32 would lose digits of 1 - mu_x.
    horizon = jnp.maximum(horizon, 1.0) if is_traced(horizon) else max(horizon, 1.0)
    average = averaging.annealed(averaging.from_horizon(horizon), shape, peak=1.0)
    return gpa_adamw(
        lambda count: learning_rate * shape(count),
        mu_x=average,
        mu_y=mu_y,
        b1=0.0,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        base_params=base_params,
        state_dtype=state_dtype,
    )


def anytime_adamw(
    learning_rate: jax.typing.ArrayLike,
    warmup_steps: int,
    *,
    mu_y: optax.ScalarOrSchedule = 0.9,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    mask: MaskOrFn = None,
    base_params: Literal["z", "y"] = "z",
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GPA around AdamW for a run of any length, with its schedule and its average.

    The learning rate :math:`\eta` grows from 0 along a line and then stays. The average is
    Schedule-Free's, in which iterates weigh as the square of their learning rate:

    .. math::

      \eta(t) = \eta_{\max} \min\left(\frac{t}{W},\ 1\right), \qquad
      \mu_x(t) = 1 - \frac{\eta(t)^2}{\eta(0)^2 + \dots + \eta(t)^2}

    with :math:`W` ``warmup_steps``. x is good to use at any step after the warmup, and training can
    always be continued. The only momentum is ``mu_y``: AdamW keeps no first moment, so that with
    float32 params the state is as large as AdamW's. It is `gpa_adamw` with ``b1=0`` and
    `averaging.lr_weighted`; use those for another schedule.

    Start from twice the learning rate that is good for AdamW. In fine-tuning take `annealed_adamw`.

    Args:
      learning_rate: the peak :math:`\eta_{\max}`, a positive number; may be traced.
      warmup_steps: the number of updates :math:`W` in which the learning rate grows, from 0 to
        10 million.
      mu_y: how far the params lie from z towards x; see `gpa`.
      b2: decay of the second moment.
      eps: added to the denominator outside the square root.
      weight_decay: decoupled weight decay, multiplied by the learning rate; a float or a schedule.
      mask: the leaves that decay: a tree of booleans like the params or a prefix of it, or a
        function that makes one of the params.
      base_params: where weight decay acts, "z" or "y"; see `gpa`.
      state_dtype: the dtype of x, at least float32 by default; see `gpa`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `GPAState`.

    Raises:
      TypeError: if ``learning_rate`` is a schedule, or ``warmup_steps`` is traced; within
        `optax.inject_hyperparams` name it in its ``static_args``.
      ValueError: if an argument is out of its range.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gpa_optax import anytime_adamw, eval_params
      >>> optimizer = optax.chain(
      ...     optax.clip_by_global_norm(1.0), anytime_adamw(0.1, warmup_steps=40))
      >>> params = jnp.array([1.0, -2.0])
      >>> opt_state = optimizer.init(params)
      >>> for _ in range(300):
      ...     grads = jax.grad(lambda w: jnp.sum((w - 1.0) ** 2))(params)
      ...     updates, opt_state = optimizer.update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(jnp.allclose(eval_params(opt_state, params), 1.0, atol=0.05)))
      True

    References:
      Defazio et al., `The Road Less Scheduled <https://arxiv.org/abs/2405.15682>`_, 2024

      Defazio et al., `Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs
      <https://arxiv.org/abs/2512.17131>`_, 2025
    """
    check_peak(
        "learning_rate", learning_rate, "gpa_adamw(schedule, mu_x=averaging.lr_weighted(...), b1=0)"
    )
    check_steps("warmup_steps", warmup_steps, 0)
    shape = optax.linear_schedule(0.0, 1.0, warmup_steps) if warmup_steps else lambda count: 1.0
    return gpa_adamw(
        lambda count: learning_rate * shape(count),
        mu_x=averaging.lr_weighted(shape, warmup_steps),
        mu_y=mu_y,
        b1=0.0,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
        mask=mask,
        base_params=base_params,
        state_dtype=state_dtype,
    )


def gpa_adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mu_x: optax.ScalarOrSchedule = averaging.warmed_up(0.9967),
    mu_y: optax.ScalarOrSchedule = 0.7,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    mask: MaskOrFn = None,
    nesterov: bool = False,
    base_params: Literal["z", "y"] = "z",
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GPA around AdamW, the paper's main setting.

    .. math::

      \begin{align*}
        m_{t+1} &= \beta_1 m_t + (1 - \beta_1)\, g_t, \qquad
        v_{t+1} = \beta_2 v_t + (1 - \beta_2)\, g_t^2, \qquad g_t = \nabla f(y_t) \\
        z_{t+1} &= z_t - \eta_t \left( \frac{\hat m_{t+1}}{\sqrt{\hat v_{t+1}} + \epsilon}
          + \lambda z_t \right) \\
        x_{t+1} &= \mu_x\, x_t + (1 - \mu_x)\, z_{t+1} \\
        y_{t+1} &= \mu_y\, x_{t+1} + (1 - \mu_y)\, z_{t+1}
      \end{align*}

    With ``b1=0`` the interpolation ``mu_y`` is the only momentum, and no first moment is kept: the
    params, v and x are then three buffers, as many as AdamW's.

    Args:
      learning_rate: AdamW's learning rate, a float or a schedule of the step count.
      mu_x: how slowly the average moves; see `gpa`.
      mu_y: how far the params lie from z towards x; see `gpa`.
      b1: decay of the first moment. A float 0 saves its buffer (unless ``eps_root`` is used).
        `optax.inject_hyperparams` makes arrays of floats; name ``b1`` and ``eps_root`` in its
        ``static_args`` to save the buffer there.
      b2: decay of the second moment.
      eps: added to the denominator outside the square root.
      eps_root: added to the denominator inside the square root.
      mu_dtype: the dtype of the first moment; default: that of `gpa`'s z.
      weight_decay: decoupled weight decay, multiplied by the learning rate; a float or a schedule.
      mask: the leaves that decay: a tree of booleans like the params or a prefix of it, or a
        function that makes one of the params.
      nesterov: whether to use Nesterov momentum within Adam.
      base_params: where weight decay acts, "z" or "y"; see `gpa`.
      state_dtype: the dtype of x, at least float32 by default; see `gpa`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `GPAState`.

    Raises:
      TypeError, ValueError: as `gpa`; a ValueError also if ``mask`` is a single boolean, which
        `optax.inject_hyperparams` makes of a function: name it in its ``static_args``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gpa_optax import eval_params, gpa_adamw
      >>> optimizer = gpa_adamw(0.1, mu_x=0.9, mu_y=0.9, b1=0.0)
      >>> params = jnp.array([1.0, -2.0])
      >>> opt_state = optimizer.init(params)
      >>> for _ in range(300):
      ...     grads = jax.grad(lambda w: jnp.sum((w - 1.0) ** 2))(params)
      ...     updates, opt_state = optimizer.update(grads, opt_state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(jnp.allclose(eval_params(opt_state, params), 1.0, atol=0.05)))
      True

    References:
      Defazio et al., `Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs
      <https://arxiv.org/abs/2512.17131>`_, 2025
    """
    _check_mask("mask", mask)
    check_decay(weight_decay)
    if _is_zero(b1) and _is_zero(eps_root):
        # The same update as optax.adamw's, without a first moment that is always the gradient.
        base = optax.chain(
            optax.scale_by_rms(decay=b2, eps=eps, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(weight_decay, mask),
            optax.scale_by_learning_rate(learning_rate),
        )
    else:
        base = optax.adamw(
            learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask, nesterov=nesterov
        )
    return gpa(base, mu_x, mu_y, base_params=base_params, state_dtype=state_dtype)


def _is_zero(value: jax.typing.ArrayLike) -> bool:
    """Whether the value is a Python 0; an array may change, and the state's structure must not."""
    return isinstance(value, (int, float)) and value == 0


def gpa_sgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mu_x: optax.ScalarOrSchedule = averaging.warmed_up(0.9967),
    mu_y: optax.ScalarOrSchedule = 0.7,
    momentum: jax.typing.ArrayLike | None = None,
    nesterov: bool = False,
    accumulator_dtype: Any = None,
    base_params: Literal["z", "y"] = "z",
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GPA around SGD: with ``mu_x=mu_y`` and no momentum, Nesterov's method.

    .. math::

      \begin{align*}
        z_{t+1} &= z_t - \eta_t\, \nabla f(y_t) \\
        x_{t+1} &= \mu_x\, x_t + (1 - \mu_x)\, z_{t+1} \\
        y_{t+1} &= \mu_y\, x_{t+1} + (1 - \mu_y)\, z_{t+1}
      \end{align*}

    Args:
      learning_rate: SGD's learning rate, a float or a schedule of the step count.
      mu_x: how slowly the average moves; see `gpa`.
      mu_y: how far the params lie from z towards x; see `gpa`.
      momentum: decay of SGD's own momentum; None for none.
      nesterov: whether that momentum is Nesterov's.
      accumulator_dtype: the dtype of the momentum; default: that of `gpa`'s z.
      base_params: "z" or "y"; SGD itself makes no use of its params.
      state_dtype: the dtype of x, at least float32 by default; see `gpa`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `GPAState`.

    Raises:
      TypeError, ValueError: as `gpa`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gpa_optax import eval_params, gpa_sgd
      >>> optimizer = gpa_sgd(0.5, mu_x=0.9, mu_y=0.9)
      >>> params = jnp.array([1.0, -2.0])
      >>> opt_state = optimizer.init(params)
      >>> for _ in range(200):
      ...     updates, opt_state = optimizer.update(params, opt_state, params)  # of 0.5 * w**2
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(jnp.abs(eval_params(opt_state, params)).max() < 1e-3))
      True

    References:
      Defazio et al., `Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs
      <https://arxiv.org/abs/2512.17131>`_, 2025
    """
    base = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    return gpa(base, mu_x, mu_y, base_params=base_params, state_dtype=state_dtype)


def gpa_lion(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mu_x: optax.ScalarOrSchedule = averaging.warmed_up(0.9967),
    mu_y: optax.ScalarOrSchedule = 0.7,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    mu_dtype: Any = None,
    weight_decay: optax.ScalarOrSchedule = 1e-3,
    mask: MaskOrFn = None,
    base_params: Literal["z", "y"] = "z",
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GPA around Lion.

    .. math::

      \begin{align*}
        z_{t+1} &= z_t - \eta_t \left( \mathrm{sign}(\beta_1 m_t + (1 - \beta_1)\, g_t)
          + \lambda z_t \right), \qquad g_t = \nabla f(y_t) \\
        m_{t+1} &= \beta_2 m_t + (1 - \beta_2)\, g_t \\
        x_{t+1} &= \mu_x\, x_t + (1 - \mu_x)\, z_{t+1} \\
        y_{t+1} &= \mu_y\, x_{t+1} + (1 - \mu_y)\, z_{t+1}
      \end{align*}

    Args:
      learning_rate: Lion's learning rate, a float or a schedule of the step count.
      mu_x: how slowly the average moves; see `gpa`.
      mu_y: how far the params lie from z towards x; see `gpa`.
      b1: rate by which momentum and gradient are combined for the update.
      b2: decay of the momentum.
      mu_dtype: the dtype of the momentum; default: that of `gpa`'s z.
      weight_decay: decoupled weight decay, multiplied by the learning rate; a float or a schedule.
      mask: the leaves that decay: a tree of booleans like the params or a prefix of it, or a
        function that makes one of the params.
      base_params: where weight decay acts, "z" or "y"; see `gpa`.
      state_dtype: the dtype of x, at least float32 by default; see `gpa`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `GPAState`.

    Raises:
      TypeError, ValueError: as `gpa`; a ValueError also if ``mask`` is a single boolean, which
        `optax.inject_hyperparams` makes of a function: name it in its ``static_args``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gpa_optax import eval_params, gpa_lion
      >>> optimizer = gpa_lion(optax.linear_schedule(0.1, 0.0, 200), mu_x=0.9)
      >>> params = jnp.array([1.0, -2.0])
      >>> opt_state = optimizer.init(params)
      >>> for _ in range(200):
      ...     updates, opt_state = optimizer.update(params, opt_state, params)  # of 0.5 * w**2
      ...     params = optax.apply_updates(params, updates)
      >>> print(bool(jnp.abs(eval_params(opt_state, params)).max() < 0.05))
      True

    References:
      Chen et al., `Symbolic Discovery of Optimization Algorithms
      <https://arxiv.org/abs/2302.06675>`_, 2023

      Defazio et al., `Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs
      <https://arxiv.org/abs/2512.17131>`_, 2025
    """
    _check_mask("mask", mask)
    check_decay(weight_decay)
    base = optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask)
    return gpa(base, mu_x, mu_y, base_params=base_params, state_dtype=state_dtype)


def gpa_muon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    mu_x: optax.ScalarOrSchedule = averaging.warmed_up(0.9967),
    mu_y: optax.ScalarOrSchedule = 0.7,
    ns_coeffs: tuple[Any, ...] | str = (3.4445, -4.7750, 2.0315),
    ns_steps: jax.typing.ArrayLike = 5,
    beta: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: jax.typing.ArrayLike = 0.0,
    weight_decay_mask: MaskOrFn = None,
    mu_dtype: Any = None,
    nesterov: bool = True,
    adaptive: bool = False,
    preconditioning: Literal["frobenius", "spectral", "aol", "schatten"] = "frobenius",
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_eps_root: jax.typing.ArrayLike = 0.0,
    adam_weight_decay: jax.typing.ArrayLike = 0.0,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    muon_weight_dimension_numbers: Any = None,
    consistent_rms: jax.typing.ArrayLike | None = None,
    base_params: Literal["z", "y"] = "z",
    state_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""GPA around Muon: orthogonalized momentum for matrices, AdamW for the other leaves.

    It needs optax 0.2.8 or newer, the first version whose muon has all of these arguments.

    .. math::

      \begin{align*}
        m_{t+1} &= \beta m_t + (1 - \beta)\, g_t, \qquad g_t = \nabla f(y_t) \\
        z_{t+1} &= z_t - \eta_t \left( s\, \mathrm{NewtonSchulz}(\hat m_{t+1})
          + \lambda z_t \right) \\
        x_{t+1} &= \mu_x\, x_t + (1 - \mu_x)\, z_{t+1} \\
        y_{t+1} &= \mu_y\, x_{t+1} + (1 - \mu_y)\, z_{t+1}
      \end{align*}

    Args:
      learning_rate: Muon's learning rate, a float or a schedule of the step count.
      mu_x: how slowly the average moves; see `gpa`.
      mu_y: how far the params lie from z towards x; see `gpa`.
      ns_coeffs: coefficients of the Newton-Schulz iteration, or the name of a set of them.
      ns_steps: its number of iterations.
      beta: decay of the momentum.
      eps: added to denominators.
      weight_decay: decoupled weight decay of the matrices, multiplied by the learning rate.
      weight_decay_mask: the matrices that decay: a tree of booleans like the params or a prefix of
        it, or a function that makes one of the params.
      mu_dtype: the dtype of the momentum; default: that of `gpa`'s z.
      nesterov: whether the momentum is Nesterov's.
      adaptive: whether to scale the update by the dual norm of the momentum.
      preconditioning: how the momentum is scaled before the iteration.
      adam_b1: AdamW's ``b1``, for the leaves that are no matrices.
      adam_b2: AdamW's ``b2``.
      adam_eps_root: AdamW's ``eps_root``.
      adam_weight_decay: AdamW's weight decay.
      adam_learning_rate: AdamW's learning rate; default: Muon's.
      muon_weight_dimension_numbers: which leaves are matrices and how they are reshaped, as in
        `optax.contrib.muon`; default: the leaves of two dimensions.
      consistent_rms: scale of the update's root mean square; None for Muon's scale by shape.
      base_params: where weight decay acts, "z" or "y"; see `gpa`.
      state_dtype: the dtype of x, at least float32 by default; see `gpa`.

    Returns:
      An `optax.GradientTransformationExtraArgs` whose state is a `GPAState`.

    Raises:
      ImportError: if optax is older than 0.2.8.
      TypeError, ValueError: as `gpa`; a ValueError also if ``weight_decay_mask`` is a single
        boolean, which `optax.inject_hyperparams` makes of a function: name it in its
        ``static_args``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from gpa_optax import eval_params, gpa_muon
      >>> optimizer = gpa_muon(optax.linear_schedule(0.1, 0.0, 100), mu_x=0.9)
      >>> params = {"matrix": jnp.eye(3), "bias": jnp.ones(3)}
      >>> opt_state = optimizer.init(params)
      >>> update = jax.jit(optimizer.update)
      >>> for _ in range(100):
      ...     updates, opt_state = update(params, opt_state, params)  # of half the sum of squares
      ...     params = optax.apply_updates(params, updates)
      >>> x = eval_params(opt_state, params)
      >>> print(bool(optax.tree.norm(x, squared=True) < 0.5))  # from 6
      True

    References:
      Jordan, `Muon: An optimizer for hidden layers in neural networks
      <https://kellerjordan.github.io/posts/muon/>`_, 2024

      Defazio et al., `Smoothing DiLoCo with Primal Averaging for Faster Training of LLMs
      <https://arxiv.org/abs/2512.17131>`_, 2025
    """
    check_muon(muon)
    _check_mask("weight_decay_mask", weight_decay_mask)
    base = muon(
        learning_rate,
        ns_coeffs,
        ns_steps,
        beta,
        eps,
        weight_decay,
        weight_decay_mask,
        mu_dtype,
        nesterov=nesterov,
        adaptive=adaptive,
        preconditioning=preconditioning,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        adam_eps_root=adam_eps_root,
        adam_weight_decay=adam_weight_decay,
        adam_learning_rate=adam_learning_rate,
        muon_weight_dimension_numbers=muon_weight_dimension_numbers,
        consistent_rms=consistent_rms,
    )
    return gpa(base, mu_x, mu_y, base_params=base_params, state_dtype=state_dtype)
