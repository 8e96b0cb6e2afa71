"""What one update compiles to on accelerators that are not here: python -m benchmarks.compiled_cost

Compiles the update of each optimizer on the parameter shapes of a Llama, with params and state
donated, for an H100 and TPUs, and reads the programs: kernels, temporaries, what is updated in
place, and bytes moved. The compilers are `pip install "jax[tpu]"` and the CUDA plugin, as for
`python -m examples.llama plan`. Writes benchmarks/results/compiled_cost.json.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import quick_file
from benchmarks.kernels import in_place, kernels
from benchmarks.updates import (
    Update,
    entries,
    shapes,
    total_bytes,
    updates_of_adamw,
    updates_of_muon,
)
from examples.files import write_json
from examples.run_folder import to_store
from planning.machines import Target, amount, compile_for, find


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
    """Optimizers to compile, such as "gpa(adamw)"; the file's results for others are kept. Default:
    all."""
    quick: bool = False
    """The short form: the first two targets, if their compilers are installed; the preset tiny."""
    out: Path = Path("benchmarks/results/compiled_cost.json")
    """File for the results. Default with --quick: in runs/bench."""


def main() -> int:
    flags = tyro.cli(Config, prog="python -m benchmarks.compiled_cost")
    if flags.quick:
        out = quick_file(flags.out, Config.out)
        flags = dataclasses.replace(flags, targets=flags.targets[:2], preset="tiny", out=out)
    console = Console()
    params = shapes(flags.preset)
    size = entries(params)
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
            target = find(name)
        except ValueError as error:
            if not flags.quick:
                raise
            console.print(f"Left out. {error}", highlight=False, markup=False)
            continue
        for dtype in flags.dtypes:
            # Compilers for TPUs take minutes for Muon's products: one dtype is enough.
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


def cost(update: Update, params: Any, dtype: jnp.dtype, target: Target) -> dict[str, Any]:
    """Compiles one update for a target and reads what it takes there."""
    leaves = len(jax.tree.leaves(params))
    size = entries(params)
    arguments = update.arguments(params, dtype)
    jitted = jax.jit(update.step, donate_argnums=(0, 1))
    compiled = compile_for(target, jitted, *arguments)
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
                amount(row["temporary_bytes"]),
                f"{row['in_place']:.0%}",
                f"{row['moved']:.1f}",
                f"{row['floor']:.1f}",
            )
    table.caption = "Kernels per leaf; bytes per parameter that they move, and would have to move."
    return table


def show_states(result: dict[str, Any], dtypes: Sequence[str]) -> Table:
    """The memory that is the same on all targets."""
    table = Table(title="Bytes of state per parameter", title_justify="left", box=box.SIMPLE_HEAD)
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
