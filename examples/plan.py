"""The command `plan`: what a training step needs on a machine that is not here."""

import dataclasses
import math
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from examples import optimizers
from examples.config import OneRun, parse_run, peek
from examples.console import say
from examples.settings import label, split
from examples.sharding import make_mesh, placed
from examples.train import Program, build
from planning.collectives import traffic
from planning.machines import Target, amount, compile_for, find, per_device
from planning.reports import show_memory, show_traffic

# The names that papers give to the buffers of optimizer states.
BUFFERS = {"mu": "m", "nu": "v", "trace": "momentum", "y": "y in float32", "slow": "slow weights"}
TARGET = """Machine to compile for: a TPU with its topology (v4:2x2x2, v5e:4x4, v5p:4x4x8, v6e:8x8),
h100 with the number of GPUs (h100:64), or cpu with a number of devices (cpu:8)."""
COMPARE = """Whether to compile the same step with the plain base optimizer too, and to compare the
collectives of both."""


def plan(kind: type, program: str, arguments: Sequence[str], console: Console) -> int:
    """Compiles the train step of a workload for `--target`, and prints what it needs there.

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
    say(
        console,
        f"{config.workload} {config.preset}, {size:,} parameters, with "
        f"{label(config.optimizer)}, on {count} x {target.devices[0].device_kind}: "
        f"--fsdp {config.fsdp} --batch-size {config.batch_size} --accumulate {config.accumulate}",
    )
    console.print(compare_states(config, step))

    compiled = compile_step(step, target, config.optimizer, console)
    if compiled is None:
        return 1
    held = {"params": per_device(params), **buffers(step.state.opt_state)}
    memory = compiled.memory_analysis()
    fits = show_memory(memory, held, gradient_bytes(params, config.accumulate), target, console)
    sent = {label(config.optimizer): traffic(compiled.as_text())}
    method, base = split(config.optimizer)
    # The plain base trains no narrow params: it holds no float32 copy of them.
    if config.compare and method and config.model.param_dtype == "float32":
        settings = config.preset_settings(config.preset, base)
        plain = dataclasses.replace(config, optimizer=base, settings=settings)
        step = build(plain, plain.task(), mesh)
        if compiled := compile_step(step, target, base, console):
            sent[label(base)] = traffic(compiled.as_text())
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
        "Compiles the train step for a machine that is not here, and prints what it needs there: "
        "memory, and traffic between devices. It takes all the flags of training. Without --fsdp "
        "all devices share one copy of the state, and without --accumulate each computes one "
        "example at a time, which needs the least memory."
    )
    return plan


def compile_step(
    program: Program, target: Target, optimizer: str, console: Console
) -> jax.stages.Compiled | None:
    """The compiled step, or None (and the reason printed) if the compiler lacks memory for it."""
    shown, start = label(optimizer), time.perf_counter()
    try:
        with console.status(f"Compiling with {shown}"), jax.set_mesh(program.mesh):
            compiled = compile_for(target, program.step, program.state, program.batch)
    except jax.errors.JaxRuntimeError as error:
        reason = re.search(r"Ran out of memory.{,200}", str(error))
        if not reason:
            raise
        # A TPU's other memory, VMEM, is divided up by the compiler: more of it would not help.
        hbm = "hbm" in reason[0].lower()
        what = "it does not fit" if hbm else "the compiler fails; another --accumulate may work"
        say(console, f"With {shown} {what}: {reason[0]}")
        return None
    say(
        console,
        f"The step with {shown} was compiled in {time.perf_counter() - start:.0f} s by "
        f"{target.compiler} (jax {jax.__version__}).",
    )
    return compiled


def buffers(opt_state: Any) -> Counter[str]:
    """Bytes on each device by buffer; scalars are not counted."""
    found: Counter[str] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        field = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)][-1]
        if leaf.ndim:
            found[BUFFERS.get(field, field)] += per_device(leaf)
    return found


def gradient_bytes(params: Any, parts: int) -> int:
    """Bytes of the gradients on each device. Those of several parts are summed in float32."""
    if parts == 1:
        return per_device(params)
    return per_device(
        jax.tree.map(
            lambda leaf: leaf.update(dtype=jnp.promote_types(leaf.dtype, jnp.float32)), params
        )
    )


def compare_states(config: OneRun, program: Program) -> Table:
    """What each optimizer holds on a device, from the shapes of its state."""
    params = program.state.params
    _, base = split(config.optimizer)
    plain = config.preset_settings(config.preset, base)
    choices = []
    for name in (base, f"gpa-{base}", f"schedule-free-{base}", f"diloco-{base}"):
        settings = config.preset_settings(config.preset, name)
        choices.append((name, settings))
        if name == f"gpa-{base}" and settings.b1 == 0:
            choices.append((name, dataclasses.replace(settings, b1=plain.b1)))
    choices.append((config.optimizer, config.settings))  # the last one is this run's

    rows = {}
    for name, settings in choices:
        optimizer = optimizers.named_optimizer(name, settings, config.steps)
        state = placed(jax.eval_shape(optimizer.init, params), program.mesh)
        first_moment = f", b1 = {settings.b1:g}" if name == f"gpa-{base}" else ""
        this = label(name) + first_moment
        rows[this] = {"params": per_device(params), **buffers(state)}

    table = Table(title="Params and optimizer state on each device", title_justify="left")
    table.add_column("optimizer", no_wrap=True)
    table.add_column("buffers, as large as params")
    table.add_column("in all", justify="right", no_wrap=True)
    table.add_column("more", justify="right", no_wrap=True)
    least = sum(rows[label(base)].values())
    for row, sizes in rows.items():
        total = sum(sizes.values())
        listed = ", ".join(
            name if size == sizes["params"] else f"{name} {amount(size)}"
            for name, size in sizes.items()
        )
        more = amount(total - least) if total != least else "-"
        row += " (this run)" if row == this else ""
        table.add_row(row, listed, amount(total), more)
    return table
