"""What one update compiles to on accelerators that are not here: python -m benchmarks.compiled_cost

Compiles the update of each optimizer on the parameter shapes of a Llama, with params and state
donated, for an H100 and TPUs, and reads the programs: kernels, temporaries, what is updated in
place, and bytes moved. The compilers are `pip install "jax[tpu]"` and the CUDA plugin, as for
`python -m examples.llama plan`. Writes benchmarks/results/compiled_cost.json.
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from optax import contrib
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import quick_file
from examples import planning
from examples.collectives import ARRAY, Computation, array_bytes, read, trip_count
from examples.command_line import to_store
from examples.llama.model import PRESETS, Llama
from examples.optimizers import hidden_matrices
from examples.reporting import write_json
from gpa_optax import gpa, gpa_adamw, gpa_muon, single_worker_diloco

# These compute nothing: they name values, or move them between the memories of a chip ahead of use.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "broadcast",
    "copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config:
    """Compiles one update of each optimizer for accelerators that are not here."""

    targets: tuple[str, ...] = ("h100:1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1")
    """Machines, as in `python -m examples.llama plan --target`; one device of each is used."""
    preset: Literal["tiny", "15m", "160m", "1b", "8b"] = "160m"
    """The Llama whose parameter shapes are used."""
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16")
    """Precisions of params and gradients. GPA keeps a float32 copy of bfloat16 params."""
    only: tuple[str, ...] = ()
    """Optimizers to compile, such as "gpa(adamw)"; what the file has of others is kept. Default:
    all."""
    quick: bool = False
    """The short form: the first two targets, if their compilers are installed; the preset tiny."""
    out: Path = Path("benchmarks/results/compiled_cost.json")
    """File for the results. Default with --quick: in runs/bench."""


class Update(NamedTuple):
    """An optimizer, and how it wants its params."""

    optimizer: optax.GradientTransformation
    params: Callable[[Any], Any] = lambda params: params

    def step(self, params: Any, opt_state: Any, grads: Any) -> tuple[Any, Any]:
        updates, opt_state = self.optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state


def two_copies(params: Any) -> optax.LookaheadParams:
    """Optax's init_synced, which gives one array twice, cannot be donated."""
    return optax.LookaheadParams(fast=params, slow=jax.tree.map(jnp.copy, params))


def updates_of_adamw() -> dict[str, Update]:
    """AdamW, and everything around that same AdamW; the two without its first moment have b1=0."""
    rate, decay = 1e-3, 0.1
    adamw = optax.adamw(rate, weight_decay=decay)
    return {
        "optax.adamw": Update(adamw),
        "gpa(adamw)": Update(gpa(adamw)),
        "gpa_adamw, b1=0": Update(gpa_adamw(rate, b1=0.0, weight_decay=decay)),
        "schedule_free(adamw)": Update(contrib.schedule_free(adamw, rate)),
        "schedule_free_adamw, b1=0": Update(contrib.schedule_free_adamw(rate, weight_decay=decay)),
        "lookahead(adamw)": Update(optax.lookahead(adamw, 32, 0.5), two_copies),
        "single_worker_diloco": Update(single_worker_diloco(adamw, 32)),
    }


def updates_of_muon() -> dict[str, Update]:
    """Muon for the matrices of the blocks, layer by layer, and AdamW for the rest."""
    return {
        "optax.contrib.muon": Update(
            contrib.muon(1e-3, muon_weight_dimension_numbers=hidden_matrices)
        ),
        "gpa_muon": Update(gpa_muon(1e-3, muon_weight_dimension_numbers=hidden_matrices)),
    }


class Kernels(NamedTuple):
    """What a program runs that reads or writes arrays; work on scalars alone is left out."""

    number: float
    bytes: float

    def __add__(self, other: "Kernels") -> "Kernels":
        return Kernels(self.number + other.number, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Kernels":
        return Kernels(self.number * times, self.bytes * times)


def main() -> int:
    flags = tyro.cli(Config, prog="python -m benchmarks.compiled_cost")
    if flags.quick:
        out = quick_file(flags.out, Config.out)
        flags = dataclasses.replace(flags, targets=flags.targets[:2], preset="tiny", out=out)
    console = Console()
    params = shapes(flags.preset)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    result = {
        **to_store(flags),
        "cores": os.cpu_count(),
        "params": size,
        "leaves": len(jax.tree.leaves(params)),
        "meaning": {
            "kernels": "operations that read or write arrays, in one step without synchronization",
            "kernels_per_leaf": "kernels / leaves of the params",
            "kernels_synchronizing": "the same in the step in which an outer loop synchronizes",
            "temporary_bytes": "XLA's memory analysis",
            "in_place": "share of the bytes of new params and state that overwrite old ones",
            "moved": "bytes that kernels read and write, per param, in whichever memory",
            "moved_synchronizing": "the same in the step in which an outer loop synchronizes",
            "floor": "bytes per param if each array is read once and each new one written once",
            "state_bytes": "bytes of optimizer state per param, computed from its shapes",
            "argument_bytes": "of the compiled program: params, state, gradients and padding",
            "computed_bytes": "params, state and gradients, from their shapes",
        },
        "updates": [],
    }
    kept = {}
    if flags.only:
        before = json.loads(flags.out.read_text())
        if before["versions"] != result["versions"]:
            raise ValueError(f"{flags.out} is of other versions; leave out --only.")
        kept = {(row["target"], row["dtype"], row["optimizer"]): row for row in before["updates"]}
    for name in flags.targets:
        try:
            target = planning.find(name)
        except ValueError as error:
            if not flags.quick:
                raise
            console.print(f"Left out. {error}", highlight=False, markup=False)
            continue
        for dtype in flags.dtypes:
            # Compilers for TPUs take minutes for Muon's products: once will do.
            muon = updates_of_muon() if dtype == "float32" else {}
            for optimizer, update in (updates_of_adamw() | muon).items():
                row = {"target": name, "dtype": dtype, "optimizer": optimizer}
                if flags.only and optimizer not in flags.only:
                    result["updates"].append(kept[tuple(row.values())])
                    continue
                with console.status(f"{name} {dtype} {optimizer}"):
                    found = cost(update, params, jnp.dtype(dtype), target)
                row |= {"compiler": target.compiler, "date": time.strftime("%Y-%m-%d")}
                result["updates"].append(row | found)
            console.print(show(result, name, dtype))
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(flags.out, result)
    console.print(show_states(result, flags.dtypes))
    console.print(f"All numbers: {flags.out}.")
    return 0


def shapes(preset: str) -> Any:
    """The params of a Llama, as shapes."""
    model = nnx.eval_shape(lambda: Llama(PRESETS[preset], nnx.Rngs(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def cost(update: Update, params: Any, dtype: jnp.dtype, target: planning.Target) -> dict[str, Any]:
    """Compiles one update for a target and reads what it takes there."""
    leaves = len(jax.tree.leaves(params))
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    compiled, arguments = compile_update(update, params, dtype, target)
    given, opt_state, _ = arguments
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    # Of the branches of a condition the cheapest is the usual step.
    usual, synchronizing = (kernels(hlo, choose) for choose in (min, max))
    new = jax.eval_shape(update.step, *arguments)
    return {
        "kernels": usual.number,
        "kernels_per_leaf": usual.number / leaves,
        "kernels_synchronizing": synchronizing.number,
        "temporary_bytes": memory.temp_size_in_bytes,
        "in_place": in_place(hlo),
        "moved": usual.bytes / size,
        "moved_synchronizing": synchronizing.bytes / size,
        "floor": (total_bytes(arguments) + total_bytes(new)) / size,
        "state_bytes": (total_bytes(given) + total_bytes(opt_state)) / size - dtype.itemsize,
        "argument_bytes": memory.argument_size_in_bytes,
        "computed_bytes": total_bytes(arguments),
    }


def compile_update(
    update: Update, params: Any, dtype: jnp.dtype, target: planning.Target
) -> tuple[jax.stages.Compiled, Any]:
    """The update compiled for one device of a target, and the shapes of its arguments."""
    place = jax.sharding.SingleDeviceSharding(target.devices[0])

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree
        )

    grads = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)
    given = jax.eval_shape(update.params, grads)
    arguments = placed((given, jax.eval_shape(update.optimizer.init, given), grads))
    traced = jax.jit(update.step, donate_argnums=(0, 1)).trace(*arguments)
    return traced.lower(lowering_platforms=(target.platform,)).compile(), arguments


def total_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def kernels(hlo: str, choose: Callable = min) -> Kernels:
    """The kernels of an optimized HLO module, those in a loop as often as it turns.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.
      choose: picks the branch of a condition that counts, `min` or `max` by bytes.
    """
    computations, entry = read(hlo)

    def walk(name: str) -> Kernels:
        computation, found = computations[name], Kernels(0, 0)
        for instruction in computation.values():
            if instruction.opcode == "while":
                (body,) = instruction.called("body")
                found += walk(body) * (trip_count(instruction, computation, computations) or 1)
            elif instruction.opcode == "conditional":
                found += choose(map(walk, instruction.called()), key=lambda found: found.bytes)
            elif instruction.opcode == "call":
                found += walk(*instruction.called())
            elif instruction.opcode not in FREE and "ConcatBitcast" not in instruction.attributes:
                found += kernel(computation, instruction)
        return found

    return walk(entry)


def kernel(computation: Computation, instruction: Any) -> Kernels:
    """One kernel with the arrays that it reads and writes, or none if there are only scalars."""
    shapes = [instruction.shape, *(computation[name].shape for name in instruction.operands)]
    arrays = [found[0] for shape in shapes for found in ARRAY.finditer(shape) if found[2]]
    return Kernels(1, sum(map(array_bytes, arrays))) if arrays else Kernels(0, 0)


def in_place(hlo: str) -> float:
    """The share of the results' bytes that take the place of an argument."""
    header = hlo.splitlines()[0]
    computations, entry = read(hlo)
    results = [array_bytes(found[0]) for found in ARRAY.finditer(computations[entry].root.shape)]
    kept = re.search(r"input_output_alias=\{(.*?)\}, \w+=", header)
    places = {int(index) for index in re.findall(r"\{(\d+)\}: \(", kept[1] if kept else "")}
    return sum(results[place] for place in places) / sum(results)


def show(result: dict[str, Any], target: str, dtype: str) -> Table:
    title = f"{target}, {dtype} params, {result['params']:,} in {result['leaves']} leaves"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("one update of", no_wrap=True)
    for column in ("kernels", "scratch", "in place", "moved", "floor"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["updates"]:
        if (row["target"], row["dtype"]) == (target, dtype):
            table.add_row(
                row["optimizer"],
                f"{row['kernels_per_leaf']:.2f}",
                planning.amount(row["temporary_bytes"]),
                f"{row['in_place']:.0%}",
                f"{row['moved']:.1f}",
                f"{row['floor']:.1f}",
            )
    table.caption = "Kernels a leaf; bytes a param that they move, and would have to move."
    return table


def show_states(result: dict[str, Any], dtypes: Sequence[str]) -> Table:
    """The memory that is the same on all targets."""
    table = Table(title="Bytes of state a param", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("optimizer", no_wrap=True)
    for dtype in dtypes:
        table.add_column(f"{dtype} params", justify="right")
    sizes = {(row["optimizer"], row["dtype"]): row["state_bytes"] for row in result["updates"]}
    for optimizer in dict.fromkeys(name for name, _ in sizes):
        found = [sizes.get((optimizer, dtype)) for dtype in dtypes]
        table.add_row(optimizer, *("" if size is None else f"{size:.1f}" for size in found))
    return table


if __name__ == "__main__":
    sys.exit(main())
