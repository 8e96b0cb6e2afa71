"""The kernels of a compiled program: read from its text (HLO), and from a profile of a run."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from planning.collectives import ARRAY, Computation, array_bytes, read, trip_count

# These compute nothing: they name values, or move them between the memories of a chip ahead of use.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "broadcast",
    "copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done",
}  # fmt: skip


class Kernels(NamedTuple):
    """What a program runs that reads or writes arrays; work on scalars alone is left out."""

    number: float
    bytes: float

    def __add__(self, other: "Kernels") -> "Kernels":
        return Kernels(self.number + other.number, self.bytes + other.bytes)

    def __mul__(self, times: int) -> "Kernels":
        return Kernels(self.number * times, self.bytes * times)


def kernels(hlo: str, choose: Callable = min) -> Kernels:
    """The kernels of an optimized HLO module, those in a loop as often as it iterates.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.
      choose: picks the branch of a conditional that counts, `min` or `max` by bytes.
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
    """The share of the results' bytes that overwrite an argument."""
    header = hlo.splitlines()[0]
    computations, entry = read(hlo)
    results = [array_bytes(found[0]) for found in ARRAY.finditer(computations[entry].root.shape)]
    kept = re.search(r"input_output_alias=\{(.*?)\}, \w+=", header)
    places = {int(index) for index in re.findall(r"\{(\d+)\}: \(", kept[1] if kept else "")}
    return sum(results[place] for place in places) / sum(results)


class Ran(NamedTuple):
    """One kernel or copy that a device executed."""

    module: str
    """The program, such as jit_step."""
    operation: str
    """The instruction of the program that it belongs to."""
    kernel: str
    seconds: float


def profiled(run: Callable[[], None]) -> list[Ran]:
    """What the device executes during `run`, which must return only when that has ended.

    XLA runs no command buffers (CUDA graphs) under the profiler, so that each kernel is seen.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # tracing each call would slow the host down
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            run()
        finally:
            jax.profiler.stop_trace()
        (file,) = Path(folder).rglob("*.xplane.pb")
        planes = list(jax.profiler.ProfileData.from_file(str(file)).planes)
    # The host's plane has the launches on a GPU, and on a CPU the work itself.
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    found = []
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue
            for event in line.events:
                stats = dict(event.stats)
                if devices or "hlo_op" in stats:
                    module, operation = stats.get("hlo_module", ""), stats.get("hlo_op", event.name)
                    found.append(Ran(module, operation, event.name, event.duration_ns / 1e9))
    return found


def kernels_that_ran(ran: list[Ran], hlo: str) -> int:
    """The number of those whose instruction reads or writes arrays, as `kernels` counts."""
    computations, _ = read(hlo)
    names = {
        name
        for computation in computations.values()
        for name, instruction in computation.items()
        if kernel(computation, instruction).number
    }
    return sum(one.operation in names for one in ran)


def longest(ran: list[Ran], most: int = 8) -> list[dict[str, Any]]:
    """The operations that took the most time, the longest first."""
    found: dict[tuple[str, str], list[float]] = {}
    for one in ran:
        found.setdefault((one.operation, one.kernel), []).append(one.seconds)
    ordered = sorted(found.items(), key=lambda item: -sum(item[1]))
    return [
        {"operation": operation, "kernel": kernel, "times": len(times), "seconds": sum(times)}
        for (operation, kernel), times in ordered[:most]
    ]
