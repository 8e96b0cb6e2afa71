"""Reports on a training step that was compiled for a machine, for people to read."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from planning.collectives import KINDS, Traffic
from planning.machines import GIB, Target, amount


def show_memory(
    memory: Any, held: Mapping[str, int], gradients: int, target: Target, console: Console
) -> bool:
    """Prints where the memory of a device goes; returns whether it is enough.

    Args:
      memory: `jax.stages.Compiled.memory_analysis()`, of a training step.
      held: bytes of params and of each buffer of the optimizer.
      gradients: bytes of the gradients.
      target: the machine.
      console: where to print.
    """
    temporary = memory.temp_size_in_bytes
    other = memory.argument_size_in_bytes - sum(held.values())
    held = {**held, "batch, scalars, padding": other}
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
        else f"It does not fit into the {target.memory:.2f} GiB of a device, by {amount(-free)}.",
        highlight=False,
    )
    if target.platform == "cuda" and 0 <= free < 0.25 * target.memory * GIB:
        console.print("JAX takes 75 % of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says more.")
    return free >= 0


def show_traffic(found: dict[str, Traffic], console: Console) -> None:
    """Prints the collectives of a step with each optimizer, and the difference if there are two."""
    if not any(sent.executions for sent in found.values()):
        console.print("The devices send each other nothing.")
        return
    table = Table(title="Collectives of a step, each device", title_justify="left")
    table.add_column("kind", no_wrap=True)
    for name in found:
        table.add_column(f"{name}: times", justify="right")
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
    (label, ours), (plain, theirs) = found.items()
    if ours.executions == theirs.executions:
        console.print(f"{label} adds none: both programs have the same collectives.")
        return
    added, gone = ours.executions - theirs.executions, theirs.executions - ours.executions
    console.print(f"The collectives differ: {label} has, and {plain} has not,")
    for sign, difference in (("+", added), ("-", gone)):
        for collective, times in difference.items():
            console.print(f"  {sign} {times:,} x {collective.kind} of {collective.bytes:,} bytes")
