"""What one update costs on this CPU, in time and memory: python -m benchmarks.update_cost

Each optimizer takes turns with optax.adamw, so that both see the same machine. All keep the memory
of an update for the next, as the trainer of the examples does. Optimizers that synchronize with
slow weights are timed over whole periods. PyTorch's AdamW and schedulefree are measured in the same
way where they are installed. Writes benchmarks/results/update_cost.json.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import processor, quick_file
from benchmarks.updates import (
    PERIOD,
    Update,
    shapes,
    torch_optimizers,
    total_bytes,
    updates_of_adamw,
)
from examples.commands import keep_memory
from examples.files import write_json
from examples.run_folder import to_store
from planning.machines import amount

REFERENCE = "optax.adamw"


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures what one update costs on this CPU."""

    sizes: tuple[str, ...] = ("1M/10", "1M/100", "10M/1000", "40M/40", "llama-160m")
    """Millions of float32 parameters / leaves of equal size, or llama- and a preset of
    examples.llama for its shapes. The file's results for other sizes are kept, if the versions are
    the same."""
    rounds: int = 31
    """Timed updates, or periods, of each optimizer; 9 are enough where they take longer than 20
    seconds."""
    compilations: int = 3
    """Times that optax.adamw and gpa(adamw) are compiled in turns, at sizes of 1,000 leaves."""
    quick: bool = False
    """The short form: two sizes, 10 rounds."""
    out: Path = Path("benchmarks/results/update_cost.json")
    """File for the results. Default with --quick: in runs/bench."""


def main() -> int:
    flags = tyro.cli(Config, prog="python -m benchmarks.update_cost")
    if flags.quick:
        out = quick_file(flags.out, Config.out)
        flags = dataclasses.replace(flags, sizes=("1M/10", "10M/40"), rounds=10, out=out)
    console = Console()
    stored = to_store(flags)
    stored["versions"] |= torch_versions()
    before = json.loads(flags.out.read_text()) if flags.out.exists() else {}
    result = {
        **stored,
        "cpu": processor(),
        "cores": os.cpu_count(),
        "meaning": {
            "load": "processes that ran on this machine on average in the minute before",
            "seconds": "quartiles of one update with donated float32 params and state",
            "memory": "kept from update to update, for all alike",
            "ratio": f"quartiles of its time over that of {REFERENCE} in the same round",
            "held_bytes": "params, optimizer state and gradients",
            "extra_bytes": "by how much the process grows during an update, at its peak",
            "temporary_bytes": "of the compiled program, by XLA's memory analysis",
            "largest_leaf_bytes": "of the params",
            "trace_seconds": "tracing and lowering",
            "compilations": "quartiles of tracing, lowering and compiling, in turns",
        },
    }
    kinds = ("updates", "compilations")
    same = before.get("versions") == stored["versions"]
    measured = {kind: before[kind] if same else [] for kind in kinds}
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    for size in flags.sizes:
        when = {"date": time.strftime("%Y-%m-%d"), "load": round(os.getloadavg()[0], 2)}
        with console.status(size):
            new = {"updates": in_process(measure, size, flags.rounds)}
            if size.endswith("/1000"):
                new["compilations"] = in_process(compile_in_turns, size, flags.compilations)
        console.print(show(size, new["updates"]))
        for row in new.get("compilations", []):
            console.print(
                f"To trace and compile {row['optimizer']}: {row['seconds'][1]:.1f} s, "
                f"{row['ratio'][1]:.2f}x."
            )
        for kind, rows in new.items():
            kept = [row for row in measured[kind] if row["size"] != size]
            measured[kind] = kept + [{"size": size, **row, **when} for row in rows]
        write_json(flags.out, result | {kind: in_order(measured[kind]) for kind in kinds})
    console.print(f"All numbers: {flags.out}.")
    return 0


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As if all had been measured in one go."""
    sizes = [*Config.sizes, *sorted({row["size"] for row in rows} - set(Config.sizes))]
    return sorted(rows, key=lambda row: sizes.index(row["size"]))


def in_process(function: Callable, *arguments: Any) -> Any:
    """The function's result, from a process of its own, which begins with nothing in memory."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        # PyTorch's threads would otherwise spin between its updates and take cores from XLA's.
        "OMP_WAIT_POLICY": "passive",
    }
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def measure(size: str, rounds: int) -> list[dict[str, Any]]:
    """What an update of each optimizer costs at a size, and what a compilation of it took."""
    keep_memory()
    jax.config.update("jax_enable_compilation_cache", False)
    params = make_params(size)
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    others = [
        functools.partial(OptaxUpdate, name, update, params)
        for name, update in updates_of_adamw().items()
    ] + [
        functools.partial(TorchUpdate, name, make, params)
        for name, make in torch_optimizers().items()
    ]
    reference, rows = others.pop(0)(), []
    for other in others:
        pair = (reference, other())
        times = take_turns([update.run for update in pair], rounds)
        times /= [update.repeats for update in pair]
        for update, quartiles in zip(pair, quartiles_of(times), strict=True):
            if update is not reference or not rows:
                row = {"optimizer": update.name, "rounds": len(times), **quartiles, **update.costs}
                rows.append(
                    row | {"largest_leaf_bytes": largest, "extra_bytes": growth(update.run)}
                )
        del pair, update  # before the next, so that all fit into memory
    return rows


def make_params(size: str) -> Any:
    if size.startswith("llama-"):
        tree = shapes(size.removeprefix("llama-"))
    else:
        millions, leaves = map(int, re.fullmatch(r"(\d+)M/(\d+)", size).groups())
        leaf = jax.ShapeDtypeStruct((millions * 10_000 // leaves, 100), jnp.float32)
        tree = {f"{i:04}": leaf for i in range(leaves)}
    return jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), tree)


class OptaxUpdate:
    """An update compiled for params like these, and its state."""

    def __init__(self, name: str, update: Update, params: Any):
        self.name, self.grads = name, params
        self.repeats = PERIOD if update.periodic else 1
        self.params = update.params(jax.tree.map(jnp.copy, params))
        self.opt_state = jax.jit(update.optimizer.init)(self.params)
        arguments = self.params, self.opt_state, self.grads
        self.compiled, tracing, compiling = compile_update(update, *arguments)
        self.costs = {
            "held_bytes": total_bytes(arguments),
            "temporary_bytes": self.compiled.memory_analysis().temp_size_in_bytes,
            "trace_seconds": tracing,
            "compile_seconds": compiling,
        }

    def run(self) -> None:
        """`repeats` updates."""
        for _ in range(self.repeats):
            self.params, self.opt_state = jax.block_until_ready(
                self.compiled(self.params, self.opt_state, self.grads)
            )


def compile_update(update: Update, *arguments: Any) -> tuple[jax.stages.Compiled, float, float]:
    """The compiled update, and the seconds for tracing with lowering and for compiling."""
    start = time.perf_counter()
    lowered = jax.jit(update.step, donate_argnums=(0, 1)).lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    return compiled, traced - start, time.perf_counter() - traced


class TorchUpdate:
    """An optimizer of PyTorch, with params like these."""

    repeats = 1

    def __init__(self, name: str, optimizer: Callable[[list], Any], params: Any):
        import torch

        torch.set_num_threads(os.cpu_count())
        self.name = name
        leaves = [torch.tensor(np.asarray(leaf)) for leaf in jax.tree.leaves(params)]
        self.params = [torch.nn.Parameter(leaf) for leaf in leaves]
        for param in self.params:
            param.grad = param.detach().clone()
        self.optimizer = optimizer(self.params)
        self.run()  # which makes its state
        state = [v for values in self.optimizer.state.values() for v in values.values()]
        held = [*self.params, *(p.grad for p in self.params), *filter(torch.is_tensor, state)]
        self.costs = {"held_bytes": sum(tensor.nbytes for tensor in held)}

    def run(self) -> None:
        self.optimizer.step()


def torch_versions() -> dict[str, str]:
    versions = {}
    for package in ("torch", "schedulefree"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def take_turns(
    runs: list[Callable[[], None]], rounds: int, first: int = 2, most: float = 20.0
) -> np.ndarray:
    """Seconds of each run in each round, after the first ones, which are not counted; after `most`
    seconds 9 rounds are enough."""
    times, began = [], time.perf_counter()
    while len(times) < first + rounds:
        if time.perf_counter() - began > most and len(times) >= first + 9:
            break
        row = [0.0] * len(runs)
        for index in range(len(runs))[:: 1 if len(times) % 2 else -1]:
            start = time.perf_counter()
            runs[index]()
            row[index] = time.perf_counter() - start
        times.append(row)
    return np.array(times[first:])


def quartiles_of(times: np.ndarray) -> list[dict[str, list[float]]]:
    """Quartiles of each column, and of its ratios to the first."""

    def quartiles(values: np.ndarray) -> list[float]:
        return [float(f"{value:.5g}") for value in np.quantile(values, (0.25, 0.5, 0.75))]

    return [
        {"seconds": quartiles(column), "ratio": quartiles(column / times[:, 0])}
        for column in times.T
    ]


def compile_in_turns(size: str, rounds: int) -> list[dict[str, Any]]:
    jax.config.update("jax_enable_compilation_cache", False)
    updates = {name: updates_of_adamw()[name] for name in (REFERENCE, "gpa(adamw)")}
    params = jax.eval_shape(lambda: make_params(size))

    def build(update: Update) -> None:
        jax.clear_caches()
        compile_update(update, params, jax.eval_shape(update.optimizer.init, params), params)

    times = take_turns([functools.partial(build, update) for update in updates.values()], rounds, 1)
    return [
        {"optimizer": name, "rounds": rounds, **quartiles}
        for name, quartiles in zip(updates, quartiles_of(times), strict=True)
    ]


def growth(run: Callable[[], None]) -> int | None:
    """Bytes by which this process grows during a run, at its peak; None except on Linux."""
    reset, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not reset.exists():
        return None
    reset.write_text("5")  # resets the peak to what is used now

    def size(field: str) -> int:
        return int(re.search(rf"{field}:\s+(\d+) kB", status.read_text())[1]) * 1024

    before = size("VmRSS")
    run()
    return max(0, size("VmHWM") - before)


def show(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("one update of", no_wrap=True)
    for column in ("ms", "ratio", "quartiles", "grows by", "scratch"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        low, median, high = row["ratio"]
        grown, temporary = row["extra_bytes"], row.get("temporary_bytes")
        table.add_row(
            row["optimizer"],
            f"{1000 * row['seconds'][1]:.1f}",
            f"{median:.2f}",
            f"{low:.2f}-{high:.2f}",
            "" if grown is None else amount(grown),
            "" if temporary is None else amount(temporary),
        )
    return table


if __name__ == "__main__":
    sys.exit(main())
