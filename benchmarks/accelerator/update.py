"""What an update costs on the parameter shapes of Llamas, with params and state donated."""

import concurrent.futures
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from optax import contrib

from benchmarks.accelerator import timing
from benchmarks.accelerator.plan import Conditions, Peaks, Work
from benchmarks.accelerator.results import Bar
from benchmarks.kernels import kernels
from benchmarks.updates import (
    PERIOD,
    TORCH_ADAMW,
    Update,
    entries,
    shapes,
    torch_optimizers,
    updates_of_adamw,
    updates_of_muon,
)
from examples.optimizers import hidden_matrices

SHARE = 150  # of the time of all parts
MEMORY = 0.66  # the rest is PyTorch's, whose AdamW takes turns with JAX
ADAMW, GPA, MUON = "optax.adamw", "gpa(adamw)", "optax.contrib.muon"
FUSED = "torch's AdamW, fused"
PROFILED = (ADAMW, GPA)
FAMILIES: dict[str, Callable[[], dict[str, Update]]] = {
    "adamw": updates_of_adamw,
    "muon": updates_of_muon,
}
# XLA's compiler works in threads of its own as well.
COMPILERS = 8


def measurements(quick: bool) -> list[str]:
    """Family of optimizers, preset and dtype of each, the most telling first."""
    if quick:
        return ["adamw, tiny, float32", "muon, tiny, bfloat16"]
    return [
        f"{family}, {preset}, {dtype}"
        for family in FAMILIES
        for dtype in ("float32", "bfloat16")
        for preset in ("160m", "1b")
    ]


def expected(measurement: str, peaks: Peaks | None) -> dict[str, dict[str, Any]]:
    """On paper: bytes and operations of one update of each optimizer, and its seconds."""
    family, preset, dtype = measurement.split(", ")
    params, found = shapes(preset), {}
    for name, update in FAMILIES[family]().items():
        work = Work(update.least_bytes(params, dtype))
        if family == "muon":
            # The base of GPA runs in float32.
            products = orthogonalization(params, dtype if name == MUON else "float32")
            work = Work(work.bytes + products.bytes, products.operations, products.dtype)
        found[name] = work
    if family == "adamw":
        found |= dict.fromkeys(TORCH_ADAMW, found[ADAMW])
    return {
        name: {
            "bytes": work.bytes,
            "operations": work.operations,
            "seconds": work.seconds(peaks),
        }
        for name, work in found.items()
    }


def orthogonalization(params: Any, dtype: str, iterations: int = 5) -> Work:
    """Newton and Schulz's iteration X <- a X + (b A + c A A) X with A = X X^T.

    X is read for A and twice more at the end, and written; A is written and read, and its square.
    """
    moved = operations = 0.0
    for leaf, numbers in zip(
        jax.tree.leaves(params),
        jax.tree.leaves(hidden_matrices(params), is_leaf=is_numbers),
        strict=True,
    ):
        if numbers is not None:
            layers, (rows, columns) = leaf.shape[0], sorted(leaf.shape[1:])
            operations += layers * (4 * rows**2 * columns + 2 * rows**3)
            moved += layers * (4 * rows * columns + 4 * rows**2)
    return Work(iterations * moved * jnp.dtype(dtype).itemsize, iterations * operations, dtype)


def is_numbers(leaf: Any) -> bool:
    return leaf is None or isinstance(leaf, contrib.MuonDimensionNumbers)


def programs(measurement: str) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """The jitted updates of a measurement, and the shapes of their arguments."""
    family, preset, dtype = measurement.split(", ")
    params = shapes(preset)
    return {
        name: (
            jax.jit(update.step, donate_argnums=(0, 1)),
            update.arguments(params, jnp.dtype(dtype)),
        )
        for name, update in FAMILIES[family]().items()
    }


def measure(measurement: str, under: Conditions) -> dict[str, Any]:
    family, preset, dtype = measurement.split(", ")
    params = shapes(preset)
    copied = 2**24 if under.quick else 2**32
    jitted = optax_updates(measurement)
    contenders = [timing.copy_of(copied), *jitted]
    if family == "adamw":
        contenders += [TorchUpdate(name, params, dtype) for name in TORCH_ADAMW]
    rounds, turn = (3, 0.005) if under.quick else (7, 0.1)
    times, failed = timing.take_turns(contenders, rounds, turn, under.deadline)

    copies, baseline = times.pop("copy", None), times.get(jitted[0].name)
    size, paper = entries(params), expected(measurement, under.peaks)
    found = {
        "params": size,
        "leaves": len(jax.tree.leaves(params)),
        "failed_updates": failed,
        "updates": {},
    }
    if copies:
        found["copy"] = {"bytes": 2 * copied, "seconds": timing.quartiles(copies)}
    for name, seconds in times.items():
        moved = paper[name]["bytes"]
        row = {
            "rounds": len(seconds),
            "seconds": timing.quartiles(seconds),
            "bytes_per_param": moved / size,
            "predicted_seconds": paper[name]["seconds"],
        }
        # Without what they compare with, which may have failed, the seconds still count.
        if baseline:
            ratios = [a / b for a, b in zip(seconds, baseline, strict=False)]
            row["ratio"] = timing.quartiles(ratios)
        if copies:
            copy = found["copy"]
            row["share_of_copy"] = moved / copy["bytes"] * copy["seconds"][1] / row["seconds"][1]
        found["updates"][name] = row
    for one in jitted:
        if one.name in times:
            found["updates"][one.name] |= one.read(size)
    found["profiles"] = {
        one.name: one.profile() for one in jitted if one.name in PROFILED and one.name in times
    }
    return found


def optax_updates(measurement: str, only: Sequence[str] = ()) -> list["OptaxUpdate"]:
    """The updates of a measurement, or those of these names, compiled for the device that is here
    and with the same gradients for all."""
    family, preset, dtype = measurement.split(", ")
    draw = jax.jit(functools.partial(random, shapes(preset), dtype))
    grads = draw(0, 1e-3)
    updates = FAMILIES[family]()
    with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:
        waiting = [
            pool.submit(OptaxUpdate, name, updates[name], *program, draw, grads)
            for name, program in programs(measurement).items()
            if name in (only or updates)
        ]
        return [one.result() for one in waiting]


def random(shapes: Any, dtype: str, seed: int, scale: float) -> Any:
    """A million numbers, repeated: as good as more where only time is measured."""
    numbers = scale * jax.random.normal(jax.random.key(seed), (2**20,), dtype)
    return jax.tree.map(lambda leaf: jnp.resize(numbers, leaf.shape), shapes)


class OptaxUpdate(timing.Repeated):
    """An update of random params, compiled."""

    def __init__(
        self, name: str, update: Update, jitted: Any, arguments: Any, draw: Any, grads: Any
    ):
        compiled = jitted.lower(*arguments).compile()
        init = jax.jit(update.optimizer.init).lower(arguments[0]).compile()

        def start() -> tuple[Any, Any]:
            params = update.params(draw(1, 0.02))
            return params, init(params)

        super().__init__(name, compiled, start, grads)
        self.multiple = 1 if update.between is None else PERIOD

    def read(self, size: int) -> dict[str, float]:
        """What the compiled program moves and keeps, by its text."""
        hlo = self.compiled.as_text()
        usual, synchronizing = (kernels(hlo, choose) for choose in (min, max))
        return {
            "kernels": usual.number,
            "moved_per_param": usual.bytes / size,
            "moved_per_param_synchronizing": synchronizing.bytes / size,
            "temporary_bytes": self.compiled.memory_analysis().temp_size_in_bytes,
        }


class TorchUpdate:
    """An optimizer of PyTorch on params of these shapes, on the GPU if PyTorch has it."""

    multiple = 1

    def __init__(self, name: str, params: Any, dtype: str):
        self.name, self.params, self.dtype = name, params, dtype
        self.optimizer: Any = None

    def prepare(self) -> None:
        import torch

        where = "cuda" if torch.cuda.is_available() else "cpu"
        options = {"device": where, "dtype": getattr(torch, self.dtype)}
        params = []
        for leaf in jax.tree.leaves(self.params):
            param = torch.nn.Parameter(0.02 * torch.randn(leaf.shape, **options))
            param.grad = 1e-3 * torch.randn(leaf.shape, **options)
            params.append(param)
        self.optimizer = torch_optimizers()[self.name](params)

    def run(self) -> None:
        self.optimizer.step()

    def wait(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def release(self) -> None:
        self.optimizer = None
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()


def bars(found: dict[str, Any]) -> list[Bar]:
    """GPA's time beside AdamW's, with float32 params: with narrow ones GPA keeps float32 copies,
    which AdamW does not. Its bandwidth; and AdamW's time beside PyTorch's."""
    judged = []
    for measurement, result in found.items():
        updates, where = result["updates"], measurement.removeprefix("adamw, ")
        gpa, fused = updates.get(GPA, {}), updates.get(FUSED, {})
        if "ratio" in gpa and "float32" in where:
            judged.append(Bar(f"{GPA} / {ADAMW}, {where}", 1.30, gpa["ratio"][1]))
        if "share_of_copy" in gpa:
            share = gpa["share_of_copy"]
            judged.append(Bar(f"{GPA} / a copy's bandwidth, {where}", 0.90, share, at_most=False))
        if "ratio" in fused:
            ratio = fused["ratio"][1]
            judged.append(Bar(f"{FUSED} / {ADAMW}, {where}", 1.0, ratio, at_most=False))
    return judged


def told(result: dict[str, Any]) -> str:
    """The lines of progress of a measurement."""
    lines = []
    if copy := result.get("copy"):
        lines.append(f"a copy {copy['bytes'] / copy['seconds'][1] / 1e9:,.0f} GB/s")
    for name, row in result["updates"].items():
        said = [f"{name}: {1e3 * row['seconds'][1]:.3f} ms"]
        if (expected := row["predicted_seconds"]) is not None:
            said.append(f"{1e3 * expected:.3f} expected")
        if "ratio" in row:
            said.append(f"{row['ratio'][1]:.2f} times")
        if "share_of_copy" in row:
            said.append(f"{row['share_of_copy']:.0%} of a copy")
        lines.append(", ".join(said))
    lines += [f"{name}: {why}" for name, why in result["failed_updates"].items()]
    return "\n".join(lines)
