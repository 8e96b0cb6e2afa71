"""Compiles a train step for machines that are not here, and tells what it needs there.

The compilers of TPUs and NVIDIA GPUs run on any CPU: given the description of a machine they make
the program that it would run, of which the sizes of its buffers and its collectives can be read.
"""

import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from examples import optimizers
from examples.collectives import KINDS, Traffic, traffic
from examples.command_line import peek
from examples.run import parse_run
from examples.sharding import make_mesh, shardings
from examples.training import OneRun, Program, build

GIB = 2**30
UNITS = [(GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB")]
# GiB of memory that a program may use on one chip: what the TPU compiler of libtpu 0.0.42 gives as
# available HBM when it refuses one that is too large. cloud.google.com/tpu/docs/system-architecture
# has 32, 16, 95 and 32 in all.
TPUS = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
# cloud.google.com/tpu/docs/v5e and /v6e; the other two are boxes, of multiples of 4 when large.
FLAT = {"1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"}
SMALL_BOXES = {"2x2x1", "2x2x2", "2x2x4", "2x4x4"}
GPUS = {"h100": Path(__file__).parent / "targets" / "h100.textproto"}
# What the buffers of optimizer states are called where papers write about them.
BUFFERS = {"mu": "m", "nu": "v", "trace": "momentum", "y": "y in float32", "slow": "slow weights"}
TARGET = """Machine to compile for: a TPU with its topology (v4:2x2x2, v5e:4x4, v5p:4x4x8, v6e:8x8),
h100 with the number of GPUs (h100:64), or cpu with a number of devices (cpu:8)."""
COMPARE = """Whether to compile the same step with the plain base optimizer too, and to compare the
collectives of both."""


class Target(NamedTuple):
    """A machine to compile for."""

    platform: str
    devices: Sequence[jax.Device]
    memory: float | None
    """GiB of one device that a program can have, if known."""
    compiler: str
    """The package that has it."""


def plan(kind: type, program: str, arguments: Sequence[str], console: Console) -> int:
    """Compiles the train step of a workload for `--target`, and prints what came of it.

    Returns:
      0 if the step fits into the memory there, else 1.

    Raises:
      ValueError: if flags do not fit each other, there is no such target, or its compiler is not
        installed; before anything is compiled.
    """
    config = parse_run(flags_of(kind), f"{program} plan", arguments)
    target = find(config.target)
    count = len(target.devices)
    if not peek(arguments, "--fsdp", ""):
        config = dataclasses.replace(config, fsdp=count)
    if not peek(arguments, "--accumulate", "") and config.batch_size % count == 0:
        config = dataclasses.replace(config, accumulate=config.batch_size // count)
    mesh = make_mesh(config.fsdp, target.devices)
    step = build(config, config.task(), mesh)
    params = step.state.params
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    console.print(
        f"{config.workload} {config.preset}, {size:,} parameters, with "
        f"{optimizers.label(config.optimizer)}, on {count} x {target.devices[0].device_kind}: "
        f"--fsdp {config.fsdp} --batch-size {config.batch_size} --accumulate {config.accumulate}",
        highlight=False,
    )
    console.print(compare_states(config, step))

    compiled = compile_step(step, target, config.optimizer, console)
    if compiled is None:
        return 1
    fits = show_memory(config, step, compiled.memory_analysis(), target, console)
    sent = {config.optimizer: traffic(compiled.as_text())}
    method, base = optimizers.split(config.optimizer)
    # The plain base trains no narrow params: it holds no float32 copy of them.
    if config.compare and method and config.model.param_dtype == "float32":
        settings = config.preset_settings(config.preset, base)
        plain = dataclasses.replace(config, optimizer=base, settings=settings)
        step = build(plain, plain.task(), mesh)
        if compiled := compile_step(step, target, base, console):
            sent[base] = traffic(compiled.as_text())
    show_traffic(sent, console)
    return 0 if fits else 1


def flags_of(kind: type) -> type:
    """The flags of a workload, and those of a plan."""
    fields = [
        ("target", Annotated[str, tyro.conf.arg(help=TARGET)], tyro.MISSING),
        ("compare", Annotated[bool, tyro.conf.arg(help=COMPARE)], True),
    ]
    plan = dataclasses.make_dataclass("Plan", fields, bases=(kind,), frozen=True)
    plan.__doc__ = (
        "Compiles the train step for a machine that is not here, and tells what it needs there: "
        "memory, and traffic between devices. It takes all the flags of training. Without --fsdp "
        "all devices share one copy of the state, and without --accumulate each computes one "
        "example at a time, which needs the least memory."
    )
    return plan


def find(target: str) -> Target:
    """The machine of a `--target`; must be called before anything else touches jax's devices.

    Raises:
      ValueError: if there is no such machine, or its compiler is not installed.
    """
    chip, _, shape = target.partition(":")
    if chip in TPUS:
        flat = chip in ("v5e", "v6e")
        if not (shape in FLAT if flat else is_box(shape)):
            known = ", ".join(sorted(FLAT if flat else SMALL_BOXES, key=cores))
            larger = "" if flat else ", or a larger box, such as 4x4x8"
            raise ValueError(
                f"--target {target}: no such {chip} exists; there are {known}{larger}."
            )
        return tpu(chip, shape)
    if chip not in GPUS and chip != "cpu":
        raise ValueError(f"--target {target}: give {', '.join((*TPUS, *GPUS))} or cpu, and a size.")
    count = int(shape) if re.fullmatch(r"[1-9]\d*", shape) else 0
    if not count or (chip in GPUS and count > 8 and count % 8):
        raise ValueError(
            f"--target {target}: after the colon comes the number of devices, such as {chip}:8"
            + (" (1 to 8, or a multiple of 8)." if chip in GPUS else ".")
        )
    return gpu(chip, count) if chip in GPUS else cpu(count)


def is_box(shape: str) -> bool:
    sides = [int(side) for side in re.findall(r"\d+", shape)]
    box = re.fullmatch(r"\d+x\d+x\d+", shape) and all(s and s % 4 == 0 for s in sides)
    return shape in SMALL_BOXES or (bool(box) and sides == sorted(sides))


def cores(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def tpu(chip: str, shape: str) -> Target:
    need("libtpu", f"--target {chip}:{shape}", 'pip install "jax[tpu]"')
    # libtpu reads these when it is loaded. There is no TPU to ask or to lock.
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    options = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    if chip == "v4":  # its two cores work as one device
        options["chip_config_name"] = "megacore"
    devices = topology(f"{chip}:{shape}", "tpu", f"{chip}:{shape}", **options)
    return Target("tpu", devices, TPUS[chip], f"libtpu {importlib.metadata.version('libtpu')}")


def gpu(chip: str, count: int) -> Target:
    packages = [f"{name}=={jax.__version__}" for name in ("jax-cuda13-plugin", "jax-cuda13-pjrt")]
    install = f"pip install --no-deps {' '.join(packages)}"
    need("jax_plugins.xla_cuda13", f"--target {chip}:{count}", install)
    # NVLink domains, processes in each, GPUs of each process.
    shape = f"{max(1, count // 8)}x{min(count, 8)}x1"
    described = GPUS[chip].read_text()
    devices = topology(f"{chip}:{count}", "cuda", "", topology=shape, target_config=described)
    memory = int(re.search(r"device_memory_size: (\d+)", described)[1]) / GIB
    version = importlib.metadata.version("jax-cuda13-plugin")
    return Target("cuda", devices, memory, f"jax-cuda13-plugin {version}")


def cpu(count: int) -> Target:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", count)
    version = importlib.metadata.version("jaxlib")
    return Target("cpu", jax.devices(), None, f"jaxlib {version}")


def need(module: str, flag: str, install: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # of the package that the module would be in
        found = None
    if not found:
        raise ValueError(f"{flag} needs a compiler that is not installed: {install}.")


def topology(target: str, platform: str, name: str, **options: Any) -> Sequence[jax.Device]:
    jax.config.update("jax_platforms", "cpu")  # this machine's own accelerators are not wanted
    try:
        return topologies.get_topology_desc(name, platform, **options).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--target {target}: the compiler does not know it: {reason}") from None


def compile_step(
    program: Program, target: Target, optimizer: str, console: Console
) -> jax.stages.Compiled | None:
    """The compiled step, or None (and the reason printed) if the compiler lacks memory for it."""
    label, start = optimizers.label(optimizer), time.perf_counter()
    try:
        with console.status(f"Compiling with {label}"), jax.set_mesh(program.mesh):
            traced = program.step.trace(program.state, program.batch)
            compiled = traced.lower(lowering_platforms=(target.platform,)).compile()
    except jax.errors.JaxRuntimeError as error:
        reason = re.search(r"Ran out of memory.{,200}", str(error))
        if not reason:
            raise
        # The other memory of a TPU, VMEM, is the compiler's to divide: no more of it helps.
        hbm = "hbm" in reason[0].lower()
        what = "it does not fit" if hbm else "the compiler fails; another --accumulate may do"
        console.print(f"With {label} {what}: {reason[0]}", highlight=False, soft_wrap=True)
        return None
    console.print(
        f"The step with {label} was compiled in {time.perf_counter() - start:.0f} s by "
        f"{target.compiler} (jax {jax.__version__}).",
        highlight=False,
    )
    return compiled


def amount(size: float) -> str:
    """1.50 GiB, or in MiB or KiB what is small."""
    unit, name = next((u for u in UNITS if abs(size) >= u[0] / 10), UNITS[-1])
    return f"{size / unit:.2f} {name}"


def per_device(tree: Any) -> int:
    """Bytes of arrays on each device, from their shapes and shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def buffers(opt_state: Any) -> Counter[str]:
    """Bytes on each device by buffer; scalars count for nothing."""
    found: Counter[str] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        field = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)][-1]
        if leaf.ndim:
            found[BUFFERS.get(field, field)] += per_device(leaf)
    return found


def compare_states(config: OneRun, program: Program) -> Table:
    """What each optimizer holds on a device, from the shapes of its state."""
    params = program.state.params
    _, base = optimizers.split(config.optimizer)
    plain = config.preset_settings(config.preset, base)
    choices = []
    for name in (base, f"gpa-{base}", f"schedule-free-{base}", f"diloco-{base}"):
        settings = config.preset_settings(config.preset, name)
        choices.append((name, settings))
        if name == f"gpa-{base}" and settings.b1 == 0:
            choices.append((name, dataclasses.replace(settings, b1=plain.b1)))
    choices.append((config.optimizer, config.settings))

    rows = {}
    for name, settings in choices:
        state = jax.eval_shape(
            optimizers.recipe(name, settings, config.steps).optimizer.init, params
        )
        places = shardings(state, program.mesh)
        state = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            state,
            places,
        )
        first_moment = f", b1 = {settings.b1:g}" if name == f"gpa-{base}" else ""
        label = optimizers.label(name) + first_moment
        rows[label] = {"params": per_device(params), **buffers(state)}

    table = Table(title="Params and optimizer state on each device", title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    table.add_column("buffers, as large as params")
    table.add_column("in all", justify="right", no_wrap=True)
    table.add_column("more", justify="right", no_wrap=True)
    least = sum(rows[optimizers.label(base)].values())
    for row, sizes in rows.items():
        total = sum(sizes.values())
        listed = ", ".join(
            name if size == sizes["params"] else f"{name} {amount(size)}"
            for name, size in sizes.items()
        )
        more = amount(total - least) if total != least else "-"
        row += " (this run)" if row == label else ""
        table.add_row(row, listed, amount(total), more)
    return table


def show_memory(
    config: OneRun, program: Program, memory: Any, target: Target, console: Console
) -> bool:
    """Prints where the memory of a device goes; whether it is enough."""
    state, temporary = program.state, memory.temp_size_in_bytes
    held = {"params": per_device(state.params), **buffers(state.opt_state)}
    held["batch, scalars, padding"] = memory.argument_size_in_bytes - sum(held.values())
    summed = jax.tree.map(
        lambda leaf: leaf.update(dtype=jnp.promote_types(leaf.dtype, jnp.float32)),
        state.params,
    )
    gradients = per_device(summed if config.accumulate > 1 else state.params)
    gradients = min(gradients, temporary)
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    rest = outputs + memory.generated_code_size_in_bytes
    total = memory.argument_size_in_bytes + temporary + rest

    table = Table(title="Memory of each device", title_justify="left", show_footer=True)
    table.add_column("what", "in all", no_wrap=True)
    table.add_column("size", amount(total), justify="right")
    table.add_column("XLA's memory analysis")
    for name, size in held.items():
        table.add_row(name, amount(size), "")
    table.add_row(
        "", "",
        f"arguments {amount(memory.argument_size_in_bytes)}, of which "
        f"{amount(memory.alias_size_in_bytes)} are updated in place",
    )  # fmt: skip
    table.add_section()
    table.add_row("gradients", amount(gradients), "")
    table.add_row("activations, gathered weights", amount(temporary - gradients), "")
    table.add_row("", "", f"temporaries {amount(temporary)}")
    table.add_section()
    table.add_row("metrics and the program itself", amount(rest), "")
    console.print(table)
    if target.memory is None:
        return True
    free = target.memory * GIB - total
    console.print(
        f"It fits into the {target.memory:.2f} GiB of a device and leaves {amount(free)}."
        if free >= 0
        else f"It does not fit into the {target.memory:.2f} GiB of a device: {amount(-free)} lack.",
        highlight=False,
    )
    if target.platform == "cuda" and 0 <= free < 0.25 * target.memory * GIB:
        console.print("JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.")
    return free >= 0


def show_traffic(found: dict[str, Traffic], console: Console) -> None:
    """Prints the collectives of a step, and the difference if there are two."""
    if not any(sent.executions for sent in found.values()):
        console.print("The devices send each other nothing.")
        return
    table = Table(title="Collectives of a step, each device", title_justify="left")
    table.add_column("kind", no_wrap=True)
    for name in found:
        table.add_column(f"{optimizers.label(name)}: times", justify="right")
        table.add_column("bytes", justify="right", no_wrap=True)
    for kind in KINDS:
        totals = [sent.total(kind) for sent in found.values()]
        if any(times for times, _ in totals):
            table.add_row(
                kind, *(cell for times, size in totals for cell in (f"{times:,}", amount(size)))
            )
    console.print(table)
    if any(sent.unknown_loops for sent in found.values()):
        console.print("Some loops turn a number of times that is not known; they count once.")
    if len(found) < 2:
        return
    (name, ours), (base, theirs) = found.items()
    label, plain = optimizers.label(name), optimizers.label(base)
    if ours.executions == theirs.executions:
        console.print(f"{label} adds none: both programs have the same collectives.")
        return
    added, gone = ours.executions - theirs.executions, theirs.executions - ours.executions
    console.print(f"The collectives differ: {label} has, and {plain} has not,")
    for sign, difference in (("+", added), ("-", gone)):
        for collective, times in difference.items():
            console.print(f"  {sign} {times:,} x {collective.kind} of {collective.bytes:,} bytes")
