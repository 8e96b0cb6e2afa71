"""The optimizers of the examples: four bases, each plain or inside one of four kinds of averaging.
Each comes with the function that returns the weights to evaluate."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax
from optax import contrib

from examples.settings import Base, Name, Settings, in_updates, split
from gpa_optax import averaging, eval_params, gpa, single_worker_diloco


class Optimizer(NamedTuple):
    """An Optax optimizer, and the weights to evaluate, export and serve: x for short."""

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    eval_params: Callable[[optax.OptState, optax.Params], optax.Params]


def named_optimizer(name: Name, settings: Settings, steps: int) -> Optimizer:
    """The optimizer for a run of `steps` updates, with gradient clipping before it."""
    method, base = split(name)
    settings = in_updates(settings, steps)
    learning_rate = schedule(settings, steps)
    rates = {"weight_decay": settings.weight_decay, "b1": settings.b1, "b2": settings.b2}
    optimizer = base_optimizer(base, learning_rate, **rates)
    evaluated = eval_params
    if method in ("gpa", "ema"):
        mu_y = settings.mu_y if method == "gpa" else 0.0
        if settings.mu_y_warmup > 0:
            mu_y = optax.linear_schedule(0.0, mu_y, int(settings.mu_y_warmup))
        mu_x = average(settings, learning_rate, steps)
        optimizer = gpa(optimizer, mu_x, mu_y, base_params=settings.base_params)
    elif method == "schedule-free":
        optimizer = contrib.schedule_free(optimizer, learning_rate, b1=settings.mu_y)
        evaluated = schedule_free_eval_params
    elif method == "diloco":
        optimizer = single_worker_diloco(
            optimizer,
            settings.sync_period,
            settings.outer_learning_rate,
            settings.outer_momentum,
        )
    else:
        evaluated = params_themselves
    return Optimizer(*optax.chain(optax.clip_by_global_norm(settings.clip), optimizer), evaluated)


def schedule_free_eval_params(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    return contrib.schedule_free_eval_params(opt_state[1], params)  # behind clipping


def params_themselves(opt_state: optax.OptState, params: optax.Params) -> optax.Params:
    return params


def base_optimizer(
    base: Base, learning_rate: optax.Schedule, *, weight_decay: Any, b1: float, b2: float
) -> optax.GradientTransformation:
    """A base of the examples, with weight decay of matrices only; `weight_decay` may be traced."""
    if base == "muon":
        return contrib.muon(
            learning_rate,
            beta=b1,
            weight_decay=weight_decay,
            weight_decay_mask=decays,
            adam_b2=b2,
            muon_weight_dimension_numbers=hidden_matrices,
            consistent_rms=0.2,  # so that a learning rate for AdamW fits
        )
    if base == "lion":
        return optax.lion(learning_rate, b1, b2, weight_decay=weight_decay, mask=decays)
    if base == "sgd":
        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask=decays),
            optax.sgd(learning_rate, momentum=b1 or None),
        )
    if b1 == 0:  # no first moment is kept
        return optax.chain(
            optax.scale_by_rms(b2, eps_in_sqrt=False, bias_correction=True),
            optax.add_decayed_weights(weight_decay, mask=decays),
            optax.scale_by_learning_rate(learning_rate),
        )
    return optax.adamw(learning_rate, b1, b2, weight_decay=weight_decay, mask=decays)


def schedule(settings: Settings, steps: int) -> optax.Schedule:
    """The learning rate as a function of the updates made."""
    peak, final = settings.learning_rate, settings.final * settings.learning_rate
    warmup = int(in_updates(settings, steps).warmup)
    rest = max(1, steps - warmup)
    decay = round(settings.decay * steps)
    if warmup > steps or (settings.schedule == "wsd" and decay > rest + 1):  # 1 allows for rounding
        raise ValueError(
            f"--warmup {warmup} must leave room in the {steps} updates of --steps"
            + (f", also for --decay {settings.decay}." if warmup <= steps else ".")
        )
    decay = min(max(1, decay), rest)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, settings.final),
        "linear": lambda: optax.linear_schedule(peak, final, rest),
        "constant": lambda: optax.constant_schedule(peak),
        "wsd": lambda: optax.linear_schedule(peak, final, decay, rest - decay),
    }[settings.schedule]()
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def average(
    settings: Settings, learning_rate: optax.Schedule, steps: int
) -> float | averaging.AveragingSchedule:
    """mu_x, as a constant or a schedule."""
    settings = in_updates(settings, steps)
    mu_x, warmup = settings.mu_x, int(settings.warmup)
    return {
        "annealed": lambda: averaging.annealed(mu_x, learning_rate, settings.learning_rate),
        "warmed-up": lambda: averaging.warmed_up(mu_x),
        "constant": lambda: mu_x,
        "polynomial": lambda: averaging.polynomial(settings.power),
        "lr-weighted": lambda: averaging.lr_weighted(learning_rate, warmup),
    }[settings.average]()


def name_of(path: jax.tree_util.KeyPath) -> list[str]:
    return [str(getattr(key, "key", getattr(key, "name", key))) for key in path]


def decays(params: optax.Params) -> optax.Params:
    """The leaves that decay: norms, biases and the learned query of MAP pooling do not."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not {"scale", "bias", "probe"} & set(name_of(path)), params
    )


def hidden_matrices(params: optax.Params) -> optax.Params:
    """Muon is for the matrices of the blocks, each layer by itself; AdamW takes the rest."""

    def dimensions(path, param):
        matrix = "blocks" in name_of(path) and "kernel" in name_of(path)
        return contrib.MuonDimensionNumbers(1, 2) if matrix and param.ndim == 3 else None

    return jax.tree_util.tree_map_with_path(dimensions, params)
