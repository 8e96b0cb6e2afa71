"""Bad input, and the error that it gets: the one list, for the tests and for the documentation."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gpa_optax
from gpa_optax import gpa

SGD = optax.sgd(0.1)
COSINE = optax.cosine_decay_schedule(0.1, 10)
PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
# What the calls below may name.
NAMES = {name: getattr(gpa_optax, name) for name in gpa_optax.__all__} | {
    "jax": jax,
    "jnp": jnp,
    "np": np,
    "optax": optax,
    "NAN": float("nan"),
    "INF": float("inf"),
    "SGD": SGD,
    "COSINE": COSINE,
    "PARAMS": PARAMS,
    "STATE": gpa(SGD).init(PARAMS),
}


class Case(NamedTuple):
    """Something that a user may write by mistake."""

    call: str
    error: type[Exception]
    parts: list[str]
    """What the message must say: the argument, the value, the remedy."""

    def run(self) -> None:
        eval(self.call, NAMES)


CASES = [
    Case("gpa(SGD, mu_x=1.0)", ValueError, ["mu_x", "1.0", "[0, 1)", "0.9967"]),
    Case("gpa(SGD, mu_x=-0.1)", ValueError, ["mu_x", "-0.1", "[0, 1)"]),
    Case("gpa(SGD, mu_x=NAN)", ValueError, ["mu_x", "nan", "[0, 1)"]),
    Case("gpa(SGD, mu_x=INF)", ValueError, ["mu_x", "inf", "[0, 1)"]),
    Case("gpa(SGD, mu_x=jnp.asarray(2.0))", ValueError, ["mu_x", "2.", "[0, 1)"]),
    Case("gpa(SGD, mu_x=np.float32(1))", ValueError, ["mu_x", "1.0", "[0, 1)"]),
    Case('gpa(SGD, mu_x="0.9")', TypeError, ["mu_x", "'0.9'", "float", "schedule"]),
    Case("gpa(SGD, mu_x=None)", TypeError, ["mu_x", "None", "float"]),
    Case("gpa(SGD, mu_x=True)", TypeError, ["mu_x", "True", "float"]),
    Case("gpa(SGD, mu_x=0.5j)", TypeError, ["mu_x", "0.5j", "float"]),
    Case("gpa(SGD, mu_x=np.ones(2))", TypeError, ["mu_x", "float"]),
    Case("gpa(SGD, averaging.uniform)", TypeError, ["mu_x", "uniform", "averaging.uniform()"]),
    Case("gpa(SGD, averaging.from_diloco)", ValueError, ["inner_steps", "0", "32"]),
    Case("gpa(SGD, averaging.from_horizon)", ValueError, ["steps", "0", "100"]),
    Case("gpa(SGD, lambda count: 300.0)", ValueError, ["mu_x(0)", "300.0", "[0, 1)"]),
    Case("gpa(SGD, lambda count: jnp.ones(1))", TypeError, ["mu_x(0)", "[1.]", "real number"]),
    Case("gpa(SGD, mu_y=optax.constant_schedule(1.0))", ValueError, ["mu_y(0)", "1.0", "0.99"]),
    Case("gpa(SGD, mu_y=lambda: 0.5)", TypeError, ["mu_y", "lambda", "step count"]),
    Case("gpa(SGD, mu_y=1.0)", ValueError, ["mu_y", "1.0", "z", "cannot be recovered", "0.99"]),
    Case("gpa(SGD, mu_y=1)", ValueError, ["mu_y", "cannot be recovered"]),
    Case("gpa(SGD, mu_y=1 - 1e-9)", ValueError, ["mu_y", "0.999999999", "cannot be recovered"]),
    Case("gpa(SGD, mu_y=1.5)", ValueError, ["mu_y", "1.5", "[0, 1)"]),
    Case("gpa(SGD, mu_y=NAN)", ValueError, ["mu_y", "nan", "[0, 1)"]),
    Case('gpa(SGD, base_params="x")', ValueError, ["base_params", "'x'", '"z"', '"y"']),
    Case("gpa(SGD, base_params=np.ones(2))", ValueError, ["base_params", "array([1., 1.])", '"z"']),
    Case("gpa(optax.adamw)", TypeError, ["base_optimizer", "adamw", "optax.adamw(1e-3)"]),
    Case("gpa(0.1)", TypeError, ["base_optimizer", "0.1", "GradientTransformation"]),
    Case(
        "gpa(optax.MultiSteps(SGD, 2))",
        TypeError,
        ["base_optimizer", "MultiSteps", "gradient_transformation()"],
    ),
    Case("gpa(SGD, state_dtype=jnp.int32)", TypeError, ["state_dtype", "int32", "float32"]),
    Case("gpa(SGD, state_dtype=bool)", TypeError, ["state_dtype", "bool", "float32"]),
    Case("gpa(SGD, state_dtype=jnp.complex64)", TypeError, ["state_dtype", "complex64"]),
    Case(
        "gpa(SGD, state_dtype=jnp.ones(2))", TypeError, ["state_dtype", "Array([1., 1.]", "float32"]
    ),
    Case('gpa(SGD, state_dtype={"x": 4})', TypeError, ["state_dtype", "{'x': 4}", "float32"]),
    Case('gpa(SGD, state_dtype="g")', TypeError, ["state_dtype", "'g'", "float32"]),
    Case('gpa(SGD, state_dtype="float33")', TypeError, ["state_dtype", "'float33'", "float32"]),
    Case("gpa_adamw(0.1, mu_x=1.0)", ValueError, ["mu_x", "1.0"]),
    Case("gpa_sgd(0.1, mu_y=1.0)", ValueError, ["mu_y", "1.0"]),
    Case(
        "optax.inject_hyperparams(gpa_adamw)(0.1, mask=lambda params: False).init(PARAMS)",
        ValueError,
        ["mask", "False", "static_args", "None to let all leaves decay"],
    ),
    Case('gpa_lion(0.1, base_params="w")', ValueError, ["base_params", "'w'"]),
    Case("gpa_muon(0.1, state_dtype=int)", TypeError, ["state_dtype"]),
    Case("single_worker_diloco(optax.sgd, 4)", TypeError, ["inner_optimizer", "sgd"]),
    Case("single_worker_diloco(SGD, 0)", ValueError, ["sync_period", "0", "at least 1", "32"]),
    Case(
        "single_worker_diloco(SGD, 2**40)",
        ValueError,
        ["sync_period", "1099511627776", "int32", "32"],
    ),
    Case("single_worker_diloco(SGD, 2.5)", ValueError, ["sync_period", "2.5", "whole number"]),
    Case("single_worker_diloco(SGD, INF)", ValueError, ["sync_period", "inf"]),
    Case('single_worker_diloco(SGD, "4")', TypeError, ["sync_period", "'4'"]),
    Case("single_worker_diloco(SGD, 4, -1.0)", ValueError, ["outer_learning_rate", "-1.0"]),
    Case(
        "single_worker_diloco(SGD, 4, optax.cosine_decay_schedule)",
        TypeError,
        ["outer_learning_rate", "cosine_decay_schedule", "Give what it returns"],
    ),
    Case("single_worker_diloco(SGD, 4, 0.7, 1.0)", ValueError, ["outer_momentum", "1.0", "0.9"]),
    Case("averaging.from_diloco(0)", ValueError, ["inner_steps", "0", "32"]),
    Case("averaging.from_diloco(8, 1.0)", ValueError, ["outer_momentum", "1.0", "0.9"]),
    Case("averaging.from_diloco(1e17)", ValueError, ["inner_steps", "1e+17", "mu_x < 1", "32"]),
    Case("averaging.from_horizon(1e17)", ValueError, ["steps", "1e+17", "mu_x < 1", "100"]),
    Case("averaging.from_horizon(0.5)", ValueError, ["steps", "0.5", "100"]),
    Case("averaging.from_horizon(INF)", ValueError, ["steps", "inf"]),
    Case('averaging.from_horizon("100")', TypeError, ["steps", "'100'"]),
    Case("averaging.polynomial(-1)", ValueError, ["power", "-1", "uniform"]),
    Case("averaging.polynomial(NAN)", ValueError, ["power", "nan"]),
    Case("averaging.polynomial(1e6)", ValueError, ["power", "1000000.0", "1000"]),
    Case("averaging.warmed_up(1.0)", ValueError, ["mu_x", "1.0", "from_horizon"]),
    Case("averaging.warmed_up(COSINE)", TypeError, ["mu_x", "0.99"]),
    Case("averaging.annealed(1.0, COSINE, 0.1)", ValueError, ["mu_x", "1.0"]),
    Case("averaging.annealed(0.9, 0.1, 0.1)", TypeError, ["learning_rate", "0.1", "warmed_up"]),
    Case("averaging.annealed(0.9, COSINE, 0.0)", ValueError, ["peak", "0.0", "positive"]),
    Case("averaging.annealed(0.9, COSINE, NAN)", ValueError, ["peak", "nan"]),
    Case(
        "averaging.annealed(0.9, COSINE, 0.05)",
        ValueError,
        ["peak", "0.05", "reaches 0.1", "largest value"],
    ),
    Case("averaging.AveragingSchedule(0.01)", TypeError, ["weight", "0.01", "function", "Give"]),
    Case(
        "averaging.annealed(0.9, optax.cosine_decay_schedule, 0.1)",
        TypeError,
        ["learning_rate", "cosine_decay_schedule", "Give what it returns"],
    ),
    Case(
        "averaging.lr_weighted(optax.cosine_decay_schedule, 5)",
        TypeError,
        ["learning_rate", "cosine_decay_schedule", "Give what it returns"],
    ),
    Case(
        "averaging.lr_weighted(COSINE, 5e18)", ValueError, ["warmup_steps", "5e+18", "10,000,000"]
    ),
    Case(
        "averaging.lr_weighted(optax.linear_schedule(0.0, 0.1, 100), 10)",
        ValueError,
        ["warmup_steps", "10", "still grows from 0.01 to 0.011", "Give the steps of warmup"],
    ),
    Case("averaging.lr_weighted(COSINE, -1)", ValueError, ["warmup_steps", "-1"]),
    Case("averaging.lr_weighted(COSINE, 2.5)", ValueError, ["warmup_steps", "2.5", "whole"]),
    Case("averaging.lr_weighted(COSINE, 5, start=-1)", ValueError, ["start", "-1", "at least 0"]),
    Case(
        "averaging.lr_weighted(COSINE, 5, step_power=1e4)",
        ValueError,
        ["step_power", "10000.0", "1000"],
    ),
    Case("averaging.lr_weighted(COSINE, 5, -2)", ValueError, ["power", "-2", "2"]),
    Case(
        "averaging.lr_weighted(0.0, 5)", ValueError, ["learning_rate", "0.0", "first 5 + 1 steps"]
    ),
    Case("averaging.lr_weighted(-0.1, 5)", ValueError, ["learning_rate", "-0.1"]),
    Case("averaging.lr_weighted(NAN, 5)", ValueError, ["learning_rate", "nan"]),
    Case('averaging.lr_weighted("fast", 5)', TypeError, ["learning_rate", "'fast'", "schedule"]),
    Case(
        'gpa(SGD).init({"ids": jnp.arange(3)})',
        TypeError,
        ["params['ids']", "int32", "None in place", "equinox.is_inexact_array", "wrt"],
    ),
    Case(
        'gpa(SGD).init({"on": np.ones(2, bool)})',
        TypeError,
        ["params['on']", "bool", "None in place"],
    ),
    Case('gpa(SGD).init({"key": jax.random.key(0)})', TypeError, ["params['key']", "key<fry>"]),
    Case('gpa(SGD).init({"n": 7})', TypeError, ["params['n']", "int32", "None in place"]),
    Case('gpa(SGD).init({"act": len})', TypeError, ["params['act']", "len", "None in place"]),
    Case(
        "gpa(SGD).init(jax.eval_shape(lambda: PARAMS))",
        TypeError,
        ["params['b']", "ShapeDtypeStruct", "jax.eval_shape(optimizer.init, params)"],
    ),
    Case(
        "gpa(SGD).update(PARAMS, SGD.init(PARAMS), PARAMS)",
        TypeError,
        ["gpa needs a GPAState", "got a tuple", "Give the state that init returned"],
    ),
    Case(
        "gpa(SGD).update(PARAMS, STATE._asdict(), PARAMS)",
        TypeError,
        ["gpa needs a GPAState", "got a dict"],
    ),
    Case(
        "gpa_adamw(0.1).update(PARAMS, optax.scale_by_adam().init(PARAMS), PARAMS)",
        TypeError,
        ["gpa needs a GPAState", "ScaleByAdamState", "count, mu, nu"],
    ),
    Case(
        "single_worker_diloco(SGD, 4).update(PARAMS, STATE, PARAMS)",
        TypeError,
        ["needs a SingleWorkerDiLoCoState", "got a GPAState"],
    ),
    Case(
        "gpa(SGD).update(PARAMS, STATE, PARAMS, value_fn=len)",
        ValueError,
        ["value_fn", "line search", 'base_params="y"'],
    ),
    Case(
        "gpa(SGD).update(PARAMS, STATE, jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS))",
        TypeError,
        ["params['b'] has dtype bfloat16", "float32", "Call init with params of the dtype"],
    ),
    Case(
        "gpa(SGD).update(jax.tree.map(lambda p: jnp.stack(5 * [p]), PARAMS), STATE, PARAMS)",
        ValueError,
        ["gradients have shape (5, 2)", "differentially_private_aggregate"],
    ),
    Case("annealed_adamw(COSINE, 100, 20)", TypeError, ["learning_rate", "annealed", "Give"]),
    Case("annealed_adamw(0.0, 100, 20)", ValueError, ["learning_rate", "0.0", "positive"]),
    Case("annealed_adamw(0.1, 100, 100)", ValueError, ["warmup_steps", "100", "steps // 5"]),
    Case("annealed_adamw(0.1, 0, 0)", ValueError, ["steps", "0", "at least 1"]),
    Case("annealed_adamw(0.1, 100, 0.2)", ValueError, ["warmup_steps", "0.2", "whole number"]),
    Case("annealed_adamw(0.1, 100, 20, window=2)", ValueError, ["window", "2", "at most 1"]),
    Case("annealed_adamw(0.1, 100, 20, window=0)", ValueError, ["window", "0", "positive"]),
    Case("annealed_adamw(0.1, 100, 20, mu_y=1)", ValueError, ["mu_y", "1", "0.99"]),
    Case(
        "jax.jit(optax.inject_hyperparams(annealed_adamw)(0.1, 100, 20).init)(PARAMS)",
        TypeError,
        ["steps", "static_args"],
    ),
    Case("anytime_adamw(COSINE, 20)", TypeError, ["learning_rate", "lr_weighted", "Give"]),
    Case("anytime_adamw(0.1, -1)", ValueError, ["warmup_steps", "-1", "at least 0"]),
    Case(
        "gpa(SGD).update(PARAMS, STATE)",
        ValueError,
        ["gpa needs params", "None", "update(grads, opt_state, params)"],
    ),
    Case(
        'gpa(SGD).update({"w": PARAMS["w"]}, STATE, PARAMS)',
        ValueError,
        ["gradients", "['b']", "(2,)", "Give zeros", "Call init again"],
    ),
    Case(
        'gpa(SGD).update(PARAMS, STATE, {**PARAMS, "more": jnp.ones(7)})',
        ValueError,
        ["params", "['more']", "(7,)", "Call init again"],
    ),
    Case(
        'gpa(SGD).update(PARAMS, STATE, {**PARAMS, "w": jnp.ones((2, 3))})',
        ValueError,
        ["params", "['w']", "(2, 3)", "(3, 2)"],
    ),
    Case(
        "gpa(SGD).update([jnp.ones(1)], gpa(SGD).init((jnp.ones(1),)), (jnp.ones(1),))",
        ValueError,
        ["gradients", "the leaves agree, the containers do not"],
    ),
    Case(
        "eval_params(optax.adam(0.1).init(PARAMS), PARAMS)",
        ValueError,
        ["opt_state must hold a GPAState", "tuple", "gpa_optax.gpa"],
    ),
    Case("eval_params(None, PARAMS)", ValueError, ["opt_state must hold a GPAState", "NoneType"]),
    Case(
        'eval_params(STATE, {"w": PARAMS["w"]})',
        ValueError,
        ["no leaf at ['b']", "(2,)", "Give the params"],
    ),
    Case(
        "eval_params(optax.chain(gpa(SGD), gpa(SGD)).init(PARAMS), PARAMS)",
        ValueError,
        ["2 averages of the leaf at ['b']", "one gpa"],
    ),
    Case("iterates(single_worker_diloco(SGD, 4).init(PARAMS), PARAMS)", ValueError, ["GPAState"]),
    Case(
        "iterates(jax.vmap(gpa(SGD).init)(jnp.ones((3, 2))), jnp.ones((3, 2)))",
        ValueError,
        ["an ensemble of (3,)", "jax.vmap(iterates)"],
    ),
    Case(
        "jax.jit(averaging.polynomial)(1.0)",
        TypeError,
        ["power must be known when the schedule is made", "Give"],
    ),
]


def errors() -> Iterator[tuple[str, str, str]]:
    """Call, kind and message of each, without addresses in memory."""
    for case in CASES:
        try:
            case.run()
        except case.error as error:
            message = re.sub(r" at 0x[0-9a-f]+", "", str(error))
            yield case.call, type(error).__name__, message
        else:
            raise AssertionError(f"{case.call} raises no {case.error.__name__}")
