"""Whether the device computes what the equations say: trajectories beside the float64 oracle.

Gradients are taken on the device at the params that it holds, and given to the oracle as they are:
so its x, y and z are those that these gradients lead to, whatever the precision of the params.
"""

import concurrent.futures
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from benchmarks import oracle
from benchmarks.accelerator import update
from benchmarks.accelerator.plan import Conditions, Peaks
from benchmarks.accelerator.results import Bar
from benchmarks.kernels import kernels
from gpa_optax import gpa, iterates

SHARE = 50  # of the time of all parts
MEMORY = 0.75  # of the GPU's, for JAX
STEPS = 100
# Relative to 1 + |value|; the tests on a CPU ask for the same.
TOLERANCE = 2e-5
SHAPES = {"matrix": (48, 64), "vector": (65,), "scalar": ()}
DTYPES = ("float32", "bfloat16", "float16")
KERNELS = "kernels"
COMPILERS = 8


def settings(t: Any) -> tuple[Any, Any, Any]:
    """Learning rate, mu_x and mu_y of a step: each changes from step to step."""
    return 0.02 / (1 + 0.01 * t), 1 - 2 / (t + 3.0), 0.9 / (1 + 0.002 * t)


def learning_rate(t: Any) -> Any:
    return settings(t)[0]


BASES: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(learning_rate),
    "adamw": lambda: optax.adamw(learning_rate, weight_decay=0.1),
    "lion": lambda: optax.lion(learning_rate, weight_decay=0.1),
    "muon": lambda: recorded(contrib.muon(learning_rate, weight_decay=0.1)),
}


def measurements(quick: bool) -> list[str]:
    """The bases, and the kernels."""
    return [*BASES, KERNELS]


def expected(measurement: str, peaks: Peaks | None) -> dict[str, dict[str, Any]]:
    """Nothing here is a matter of time."""
    return {}


def measure(measurement: str, under: Conditions) -> dict[str, Any]:
    if measurement == KERNELS:
        return kernels_of_an_update("tiny" if under.quick else "160m")
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        found = list(pool.map(judged, cases(measurement, under.quick)))
    return {"steps": STEPS, "tolerance": TOLERANCE, "cases": found}


class Recorded(NamedTuple):
    """The state of a base, with what it was last given as params and what it made of it."""

    base_state: Any
    given_params: Any
    made_updates: Any


def recorded(base: optax.GradientTransformation) -> optax.GradientTransformation:
    """A base whose updates can be read back: for one that the oracle does not have."""

    def init(params: Any) -> Recorded:
        return Recorded(base.init(params), params, optax.tree.zeros_like(params))

    def step(updates: Any, state: Recorded, params: Any = None) -> tuple[Any, Recorded]:
        updates, base_state = base.update(updates, state.base_state, params)
        return updates, Recorded(base_state, params, updates)

    return optax.GradientTransformation(init, step)


class Case(NamedTuple):
    base: str
    base_params: str
    dtype: str


def cases(base: str, quick: bool) -> list[Case]:
    pairs = zip("zyz", DTYPES, strict=True) if quick else itertools.product("zy", DTYPES)
    return [Case(base, base_params, dtype) for base_params, dtype in pairs]


def functions(case: Case) -> tuple[Any, Any, Any]:
    """The optimizer, and the jitted gradient and step of a trajectory."""
    optimizer = gpa(
        BASES[case.base](),
        lambda t: settings(t)[1],
        lambda t: settings(t)[2],
        base_params=case.base_params,
    )

    @jax.jit
    def gradient(params: Any, noise: Any) -> Any:
        # Noise and a pull towards 0: a wrong y would be felt through its own gradients.
        return jax.tree.map(lambda p, n: 0.3 * p + n, params, noise)

    # A program of its own: XLA does not round low-precision gradients that stay within a program.
    @jax.jit
    def step(params: Any, opt_state: Any, gradients: Any) -> tuple[Any, Any, dict[str, Any]]:
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        params = optax.apply_updates(params, updates)
        seen = {"gradients": gradients, "params": params, **iterates(opt_state, params)._asdict()}
        if case.base == "muon":
            for name in ("given_params", "made_updates"):
                seen[name] = optax.tree.get(opt_state, name)
        return params, opt_state, seen

    return optimizer, gradient, step


def programs(measurement: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The jitted steps of a base, and the shapes of their arguments."""
    found = {}
    for case in cases(measurement, quick=False):
        optimizer, _, step = functions(case)
        params = {n: jax.ShapeDtypeStruct(s, jnp.dtype(case.dtype)) for n, s in SHAPES.items()}
        arguments = (params, jax.eval_shape(optimizer.init, params), params)
        found[f"decay at {case.base_params}, {case.dtype}"] = (step, arguments)
    return found


def judged(case: Case) -> dict[str, Any]:
    """The distance of a trajectory to the oracle's, and whether a second one has the same bits."""
    optimizer, gradient, step = functions(case)

    def trajectory() -> list[dict[str, Any]]:
        """Gradients, params and iterates after each step, from the device."""
        rng = np.random.default_rng(0)

        def draw() -> dict[str, jax.Array]:
            return {n: jnp.asarray(rng.normal(size=s), case.dtype) for n, s in SHAPES.items()}

        params = draw()
        opt_state, found = optimizer.init(params), [{"params": params}]
        for _ in range(STEPS):
            params, opt_state, seen = step(params, opt_state, gradient(params, draw()))
            found.append(seen)
        return jax.device_get(found)

    first, second = trajectory(), trajectory()
    same = all(
        np.array_equal(one, other)
        for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )
    return case._asdict() | {"errors": errors(case, first), "same_bits": same}


def errors(case: Case, found: list[dict[str, Any]]) -> dict[str, float]:
    """The largest distance of each sequence to the oracle's, relative to 1 + its size."""
    given = case.base == "muon"

    def base(memory: Any, t: int, g: Any, p: Any, lr: float) -> Any:
        return g if given else oracle.BASES[case.base](memory, t, g, p, lr)

    judge = oracle.Oracle(found[0]["params"], base, case.base_params)
    largest: dict[str, float] = {}

    def compare(name: str, sequence: Any, exact: Any) -> None:
        for leaf, value in exact.items():
            # The distance of a non-finite number is infinite.
            distance = np.abs(sequence[leaf].astype(float) - value) / (1 + np.abs(value))
            distance = float(np.nan_to_num(distance, nan=np.inf).max())
            largest[name] = max(largest.get(name, 0.0), distance)

    for t, seen in enumerate(found[1:]):
        if given:
            compare("given_params", seen["given_params"], getattr(judge, case.base_params))
        judge.step(seen["made_updates" if given else "gradients"], *settings(t))
        for name in "xyz":
            compare(name, seen[name], getattr(judge, name))
        compare("params", seen["params"], judge.y)
    return largest


def kernels_of_an_update(preset: str) -> dict[str, Any]:
    """Kernels of one update for each leaf of a Llama's params: in the compiled program, and those
    that ran."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        (one,) = update.optax_updates(f"adamw, {preset}, {dtype}", [update.GPA])
        leaves, profile = len(jax.tree.leaves(one.rest)), one.profile()
        found[dtype] = {"leaves": leaves, "compiled": kernels(one.compiled.as_text()).number}
        # If no kernel was recognized by its name, there is no count.
        found[dtype] |= {"ran": profile.get("kernels") or None, "profile": profile}
    return {"updates": found}


def bars(found: dict[str, Any]) -> list[Bar]:
    judged = []
    for measurement, result in found.items():
        if measurement == KERNELS:
            for dtype, row in result["updates"].items():
                for what in ("compiled", "ran"):
                    if row[what] is not None:
                        name = f"kernels per leaf, {what}, {dtype} params"
                        judged.append(Bar(name, 1, row[what] / row["leaves"]))
        else:
            judged += bars_of_a_base(measurement, result["cases"])
    return judged


def bars_of_a_base(base: str, cases: list[dict[str, Any]]) -> list[Bar]:
    worst: dict[str, float] = {}
    for case in cases:
        for name, error in case["errors"].items():
            # Params have only the digits of their own precision.
            unit = float(jnp.finfo(case["dtype"]).eps) if name == "params" else 0.0
            worst[name] = max(worst.get(name, 0.0), error / max(unit, TOLERANCE))
    same = sum(case["same_bits"] for case in cases) / len(cases)
    return [
        Bar(f"largest error around {base}, in tolerances", 1, max(worst.values()), essential=True),
        Bar(f"same bits twice around {base}", 1, same, at_most=False, essential=True),
    ]


def told(result: dict[str, Any]) -> str:
    if "updates" in result:
        return "\n".join(
            f"{row['leaves']} leaves, {dtype}: {row['compiled']:.0f} kernels in the program, "
            f"{row['ran']} ran"
            for dtype, row in result["updates"].items()
        )
    cases = result["cases"]
    errors = [max(case["errors"][name] for name in "xyz") for case in cases]
    same = all(case["same_bits"] for case in cases)
    return (
        f"{len(cases)} trajectories of {result['steps']} steps: x, y and z within "
        f"{max(errors):.1e} of the oracle ({result['tolerance']:.0e} allowed), "
        f"{'the same' if same else 'OTHER'} bits twice"
    )
