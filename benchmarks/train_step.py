"""Where the time of a training step goes, on this machine: python -m benchmarks.train_step

Trains the `tiny` Llama on the standard library under JAX's profiler, and times its parts side by
side: forward and backward pass alone, the whole step, and a large matrix product, the machine's
peak. Writes benchmarks/results/train_step.json.
"""

import dataclasses
import glob
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import quick_file
from examples import optimizers, train
from examples.commands import keep_memory
from examples.files import write_json
from examples.llama.config import TrainLlama
from examples.llama.model import training_flops
from examples.metrics import Report
from examples.run_folder import to_store
from examples.settings import Name
from examples.sharding import make_mesh, place


@dataclasses.dataclass(frozen=True)
class Config:
    """Measures where the time of a training step goes."""

    optimizer: Name = "gpa-adamw"
    """The optimizer of the step."""
    steps: int = 120
    """Updates of the profiled run; the first third is not measured."""
    rounds: int = 30
    """Times that each part is run, in turns."""
    keep_memory: bool = True
    """Whether the memory of a step is kept for the next one, as the trainer does."""
    quick: bool = False
    """The short form: 30 updates, 5 rounds."""
    out: Path = Path("benchmarks/results/train_step.json")
    """File for the results. Default with --quick: in runs/bench."""


class Profiled(Report):
    """The trainer's own report, which also switches the profiler on and off."""

    first: int
    trace: str
    reporting = 0.0
    began = ended = 0.0

    def stepped(self, done, metrics, waited):
        if done % self.log_every == 0:
            jax.block_until_ready(metrics)  # the wait is not counted as reporting
        start = time.perf_counter()
        super().stepped(done, metrics, waited)
        if self.first < done < self.steps:
            self.reporting += time.perf_counter() - start
        if done == self.first:
            jax.block_until_ready(metrics)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # tracing each call would slow the host down
            jax.profiler.start_trace(self.trace, profiler_options=options)
            self.began = time.perf_counter()
        if done == self.steps - 1:
            jax.block_until_ready(metrics)
            self.ended = time.perf_counter()
            jax.profiler.stop_trace()


def main() -> int:
    flags = tyro.cli(Config, prog="python -m benchmarks.train_step")
    if flags.quick:
        out = quick_file(flags.out, Config.out)
        flags = dataclasses.replace(flags, steps=30, rounds=5, out=out)
    if flags.keep_memory:
        keep_memory()
    console = Console()
    config = TrainLlama(
        optimizer=flags.optimizer,
        settings=TrainLlama.preset_settings("tiny", flags.optimizer),
        **TrainLlama.preset_values("tiny")
        | {"steps": flags.steps, "evaluate_every": flags.steps, "validation_examples": 1},
    )
    with tempfile.TemporaryDirectory() as folder:
        loop, kinds = profile(dataclasses.replace(config, run=Path(folder, "run")), folder, console)
    parts = time_parts(config, flags.rounds)
    flops = training_flops(config.model, config.batch_size, config.length)
    result = {
        **to_store(config),
        "cores": os.cpu_count(),
        "keep_memory": flags.keep_memory,
        "loop": loop,
        "parts": parts,
        "flops_a_step": flops,
        "gflops": flops / parts["whole step"] / 1e9,
        "peak_gflops": 2 * 2048**3 / parts["matrix product 2048"] / 1e9,
        "kinds": kinds,
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(flags.out, result)
    console.print(show(result))
    console.print(f"All numbers: {flags.out}.")
    return 0


def profile(config: TrainLlama, folder: str, console: Console) -> tuple[dict, dict]:
    """Runs the trainer; returns seconds a step of its loop, and of XLA by kind of operation."""
    data, task = config.open_data(), config.task()
    report = Profiled(
        config.run,
        console,
        title="Profiled",
        steps=config.steps,
        log_every=config.log_every,
        unit=task.unit,
        units_per_step=task.units * config.batch_size,
        learning_rate=optimizers.schedule(config.settings, config.steps),
        files={"config.json": to_store(config)},
    )
    report.first, report.trace = config.steps // 3, folder
    try:
        train.train(config, task, data, make_mesh(config.fsdp), report, **config.data_options)
    finally:
        report.close()
    steps = config.steps - 1 - report.first
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").open()]
    waits = [r["input_seconds_per_step"] for r in lines if "loss" in r and r["step"] > report.first]
    spans, kinds = xla_spans(folder)
    wall = report.ended - report.began
    loop = {
        "wall": wall / steps,
        "in XLA": covered(spans) / 1e9 / steps,
        "waiting for input": statistics.mean(waits),
        "reporting": report.reporting / steps,
    }
    return loop, {kind: time / 1e9 / steps for kind, time in kinds.most_common(12)}


def xla_spans(folder: str) -> tuple[list[tuple[float, float]], Counter]:
    """When XLA's executor was at work, in ns, and how long its kinds of operation took in all
    threads together."""
    (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    spans, kinds = [], Counter()
    for plane in jax.profiler.ProfileData.from_file(file).planes:
        for line in plane.lines:
            if not line.name.startswith("tf_XLA"):
                continue
            for event in line.events:
                if event.name.startswith("ThunkExecutor"):
                    spans.append((event.start_ns, event.start_ns + event.duration_ns))
                elif not event.name.startswith(("Threadpool", "Wait", "end:")):
                    kinds[event.name.split(".")[0]] += event.duration_ns
    return spans, kinds


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of the spans."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def time_parts(config: TrainLlama, rounds: int) -> dict[str, float]:
    """Median seconds of the parts of a step, which take turns so that all see the same machine."""
    mesh = make_mesh(1, jax.devices()[:1])
    task = config.task()
    program = train.build(config, task, mesh)
    graph = nnx.graphdef(nnx.eval_shape(lambda: task.new_model(nnx.Rngs(0))))
    tokens = np.random.default_rng(0).integers(
        0, config.model.vocab_size, (config.batch_size, config.length + 1)
    )
    batch = place({"tokens": tokens.astype(np.int32)}, mesh, 1)

    def loss(params, batch, key):
        return task.metrics(nnx.merge(graph, params), batch, key)["loss"].mean()

    @jax.jit
    def backward(params, batch, key):
        return train.accumulate(jax.value_and_grad(loss), params, batch, key[None])

    matrix = jnp.ones((2048, 2048))
    product = jax.jit(lambda a: a @ a)
    with jax.set_mesh(mesh):
        state = program.initial()

        def whole_step():
            nonlocal state
            state, metrics = program.step(state, batch)
            return state, metrics

        parts = {
            "forward and backward": lambda: backward(state.params, batch, state.key),
            "whole step": whole_step,
            "matrix product 2048": lambda: product(matrix),
        }
        for part in parts.values():
            seconds(part)
        times = {name: [] for name in parts}
        for _ in range(rounds):
            for name, part in parts.items():
                times[name].append(seconds(part))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds(part: Callable[[], object]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(part())
    return time.perf_counter() - start


def show(result: dict) -> Table:
    loop, parts = result["loop"], result["parts"]
    table = Table("", "ms a step", "share", box=box.SIMPLE_HEAD)
    wall, whole = loop["wall"], parts["whole step"]
    rows = {
        "training loop": (wall, 1.0),
        "  outside XLA": (wall - loop["in XLA"], 1 - loop["in XLA"] / wall),
        "  waiting for input": (loop["waiting for input"], loop["waiting for input"] / wall),
        "  reporting": (loop["reporting"], loop["reporting"] / wall),
        "compiled step": (whole, 1.0),
        "  forward and backward": (
            parts["forward and backward"], parts["forward and backward"] / whole,
        ),
        "  optimizer and clipping": (
            whole - parts["forward and backward"], 1 - parts["forward and backward"] / whole,
        ),
    }  # fmt: skip
    for name, (time_, share) in rows.items():
        table.add_row(name, f"{1000 * time_:.2f}", f"{share:.1%}")
    table.caption = (
        f"{result['gflops']:.0f} GFLOP/s in the model's matrix products; a product of 2048 x 2048 "
        f"runs at {result['peak_gflops']:.0f}."
    )
    return table


if __name__ == "__main__":
    sys.exit(main())
