"""Optimizer states as each release saved them, and what must come of them in every later one.

`PYTHONPATH=tests python -m helpers.saved_states` makes the folder of the present release. A folder
holds

* ``leaves.json``: params and state of every program after `STEPS` updates, leaf by leaf, the
  gradient that comes next, what both must lead to, and the versions that wrote it;
* ``orbax``: the same params and states as an Orbax checkpoint.

What must come of them is computed in float64 by the oracle, which shares no code with the library,
except for Muon, where it is what the release that saved it did next.
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import keystr, tree_leaves_with_path

import gpa_optax
from benchmarks.oracle import BASES, Oracle, two_loop_diloco
from gpa_optax import averaging
from helpers import ROOT

FOLDER = ROOT / "tests" / "fixtures" / "saved_states"
STEPS = 7  # DiLoCo synchronizes every 4: it is saved in the middle, and the next update does it
SHAPES = {"w": (4, 3), "b": (3,)}
LR, MU_X, MU_Y, DECAY, PERIOD = 0.1, 0.8, 0.7, 0.1, 4
WARMUP = optax.warmup_constant_schedule(0.02, LR, 3)


class Program(NamedTuple):
    """An optimizer in use.

    Attributes:
      make: makes the optimizer whose state is saved and restored.
      judge: gives the oracle's sequences of parameters by name, before the first update and after
        each, from the initial params and the gradients; None for what the oracle does not have.
      dtype: of the params and gradients.
    """

    make: Callable[[], optax.GradientTransformationExtraArgs]
    judge: Callable[[dict, list[dict]], list[dict[str, dict]]] | None
    dtype: Any = jnp.float32


def programs() -> dict[str, Program]:
    """Every form of state that the library has, in a chain as it is used."""
    clip = optax.clip_by_global_norm(1.0)
    adamw = {"weight_decay": DECAY}
    return {
        "gpa_adamw": Program(
            lambda: optax.chain(clip, gpa_optax.gpa_adamw(LR, mu_x=MU_X, mu_y=MU_Y, **adamw)),
            judge("adamw", clipped=True, **adamw),
        ),
        "gpa_adamw, bfloat16 params": Program(
            lambda: gpa_optax.gpa_adamw(LR, mu_x=averaging.uniform(), mu_y=MU_Y, **adamw),
            judge("adamw", mu_x=lambda t: t / (t + 1), **adamw),
            jnp.bfloat16,
        ),
        "gpa_adamw, b1=0, schedules": Program(
            lambda: gpa_optax.gpa_adamw(
                WARMUP,
                mu_x=averaging.lr_weighted(WARMUP, 3),
                mu_y=optax.linear_schedule(0.5, 0.9, 20),
                b1=0.0,
                **adamw,
            ),
            judge(
                "adamw",
                lr=warmup,
                mu_x=lambda t: 1 - warmup(t) ** 2 / sum(warmup(s) ** 2 for s in range(t + 1)),
                mu_y=lambda t: 0.5 + 0.02 * t,
                b1=0.0,
                **adamw,
            ),
        ),
        "gpa_sgd": Program(
            lambda: gpa_optax.gpa_sgd(LR, mu_x=MU_X, mu_y=MU_Y, momentum=0.9), judge("momentum")
        ),
        "gpa_lion": Program(
            lambda: gpa_optax.gpa_lion(LR, mu_x=MU_X, mu_y=MU_Y, weight_decay=DECAY),
            judge("lion", weight_decay=DECAY),
        ),
        "gpa_muon": Program(lambda: gpa_optax.gpa_muon(LR, mu_x=MU_X, mu_y=MU_Y), None),
        "single_worker_diloco": Program(
            lambda: gpa_optax.single_worker_diloco(optax.adamw(LR, **adamw), PERIOD), judge_diloco
        ),
    }


def warmup(t: int) -> float:
    return min(0.02 + (LR - 0.02) * t / 3, LR)


def judge(base: str, lr=LR, mu_x=MU_X, mu_y=MU_Y, clipped=False, **base_arguments):
    """GPA by the oracle; lr, mu_x and mu_y are numbers or functions of the step."""

    def run(params, gradients):
        oracle = Oracle(params, BASES[base], **base_arguments)
        found = [{"x": oracle.x, "y": oracle.y, "z": oracle.z}]
        for t, g in enumerate(gradients):
            if clipped:
                norm = np.sqrt(sum(np.sum(np.float64(leaf) ** 2) for leaf in g.values()))
                g = {name: leaf / max(norm, 1.0) for name, leaf in g.items()}
            oracle.step(g, *(s(t) if callable(s) else s for s in (lr, mu_x, mu_y)))
            found.append({name: dict(getattr(oracle, name)) for name in "xyz"})
        return found

    return run


def judge_diloco(params, gradients):
    """x is the slow weights, y the fast ones, which are the params."""
    found = two_loop_diloco(
        params,
        lambda t, p: gradients[t],
        lambda *a: BASES["adamw"](*a, weight_decay=DECAY),
        LR,
        PERIOD,
        0.7,
        0.9,
        len(gradients) // PERIOD,
    )
    return [{}] + [{"x": dict(slow), "y": dict(fast)} for slow, fast in found]


def sequences(opt_state: Any, params: Any) -> dict[str, dict]:
    """What the library has to say of the sequences that the judge gives."""
    if isinstance(opt_state, gpa_optax.SingleWorkerDiLoCoState):
        return {"x": gpa_optax.eval_params(opt_state, params), "y": params}
    return gpa_optax.iterates(opt_state, params)._asdict()


def make(folder: Path) -> None:
    """Writes the fixture of the present release.

    Raises:
      FileExistsError: if it is there. What a release saved is what users have.
    """
    import orbax.checkpoint as ocp

    if folder.exists():
        raise FileExistsError(
            f"{folder} is there, and what a release saved stays as it is. Raise "
            "gpa_optax.__version__ before you save the states of a new release."
        )
    rng = np.random.default_rng(0)
    leaves, states = {}, {}
    for name, program in programs().items():
        start, *gradients = (draw(rng, program.dtype) for _ in range(STEPS + 2))
        params = jax.tree.map(jnp.asarray, start)
        optimizer = program.make()
        opt_state, found = optimizer.init(params), []
        for gradient in gradients:
            found.append((params, opt_state))
            params, opt_state = step(optimizer, gradient, params, opt_state)
        found.append((params, opt_state))
        judged = program.judge(start, gradients) if program.judge else None
        states[name] = dict(zip(("params", "opt_state"), found[STEPS], strict=True))
        leaves |= by_path(states[name], name)
        leaves |= by_path(gradients[STEPS], f"{name}: gradient")
        for moment, step_count in (("saved", STEPS), ("next", STEPS + 1)):
            expected = judged[step_count] if judged else sequences(*reversed(found[step_count]))
            leaves |= by_path(expected, f"{name}: {moment}")

    folder.mkdir(parents=True)
    packages = ("gpa-optax", "jax", "optax", "numpy", "orbax-checkpoint")
    lines = [json.dumps({package: version(package) for package in packages})] + [
        json.dumps([path, str(leaf.dtype), np.asarray(leaf, np.float64).tolist()])
        for path, leaf in leaves.items()
    ]
    (folder / "leaves.json").write_text("[" + ",\n".join(lines) + "]\n")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.absolute() / "orbax", states)
    # A note of where it was written, which nothing reads.
    (folder / "orbax" / "commit_success.txt").unlink(missing_ok=True)


def draw(rng: np.random.Generator, dtype: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(rng.normal(size=s), dtype) for name, s in SHAPES.items()}


def step(optimizer, gradient, params, opt_state):
    updates, opt_state = jax.jit(optimizer.update)(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def by_path(tree: Any, prefix: str) -> dict[str, np.ndarray]:
    return {
        f"{prefix} {keystr(path)}": np.asarray(leaf) for path, leaf in tree_leaves_with_path(tree)
    }


def load(folder: Path) -> dict[str, np.ndarray]:
    """The leaves of a fixture by their paths, in the order in which they were saved."""
    _, *leaves = json.loads((folder / "leaves.json").read_text())
    return {path: np.asarray(values, jnp.dtype(dtype)) for path, dtype, values in leaves}


def saved_programs(leaves: dict[str, np.ndarray]) -> list[str]:
    """The programs of a fixture: those that the release had."""
    mark = ": gradient "
    return list(dict.fromkeys(path.split(mark)[0] for path in leaves if mark in path))


if __name__ == "__main__":
    try:
        make(FOLDER / gpa_optax.__version__)
    except FileExistsError as error:
        sys.exit(str(error))
