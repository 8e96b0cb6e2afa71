"""The tables and the figure of what an update costs."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks import Table
from benchmarks.steps_to_target_tables import METHOD_COLOURS
from benchmarks.store import measured


def updates(name: str) -> list[dict[str, Any]]:
    """The updates of a cost benchmark; none if it was not run yet."""
    return (measured(name) or {"updates": []})["updates"]


def on_the_cpu() -> list[dict[str, Any]]:
    """The updates that were timed on the params of the largest size."""
    return [u for u in updates("update_cost") if u["size"] == "llama-160m"]


def cost_table() -> Table:
    """What an update costs: from the compilers' programs, and timed on the CPU."""
    timed = {u["optimizer"]: u for u in on_the_cpu()}
    compiled: dict[str, list[dict[str, Any]]] = {}
    for update in updates("compiled_cost"):
        if update["dtype"] == "float32":
            compiled.setdefault(update["optimizer"], []).append(update)
    lines = []
    for name, found in compiled.items():
        if name not in timed:
            continue
        kernels = max(u["kernels_per_leaf"] for u in found)
        moved = {u["target"]: u["moved"] for u in found}
        everywhere = [u["ratio"][1] for u in updates("update_cost") if u["optimizer"] == name]
        lines.append(
            [
                f"`{name}`",
                f"{found[0]['state_bytes']:.0f}",
                f"{kernels:.2g}",
                f"{moved['h100:1']:.0f} ({found[0]['floor']:.0f})",
                f"{timed[name]['ratio'][1]:.2f} ({min(everywhere):.2f} to {max(everywhere):.2f})",
            ]
        )
    headings = (
        "update of",
        "state, bytes per parameter",
        "kernels per leaf (maximum over H100, TPU v5e, v5p, v6e)",
        "bytes moved per parameter on H100 (at least)",
        "time on a CPU, `optax.adamw` = 1 (range over sizes)",
    )
    return headings, lines


def timings_table() -> Table:
    """Every size: time over that of optax.adamw, and temporaries."""
    measured = updates("update_cost")
    cells: dict[str, dict[str, str]] = {}
    for update in measured:
        temporary = update.get("temporary_bytes")
        more = f", {temporary / 2**20:.0f} MiB" if temporary and temporary > 2**20 else ""
        cell = f"{update['ratio'][1]:.2f}{more}"
        cells.setdefault(update["optimizer"], {})[update["size"]] = cell
    sizes = list(dict.fromkeys(update["size"] for update in measured))
    return ["", *sizes], [
        [f"`{name}`", *(row.get(size, "") for size in sizes)] for name, row in cells.items()
    ]


def compiled_table() -> Table:
    """Every target and precision, of AdamW and what is built on it."""
    lines = [
        [
            update["target"].partition(":")[0],
            update["dtype"],
            f"`{update['optimizer']}`",
            f"{update['kernels_per_leaf']:.2f}",
            f"{update['temporary_bytes'] / 2**10:,.1f}",
            f"{update['in_place']:.1%}",
            f"{update['moved']:.1f}",
            f"{update['floor']:.1f}",
            f"{update['state_bytes']:.1f}",
        ]
        for update in updates("compiled_cost")
    ]
    headings = (
        "target", "params", "update of", "kernels per leaf", "temporaries, KiB", "in place",
        "bytes moved per parameter", "at least", "bytes of state per parameter",
    )  # fmt: skip
    return headings, lines


def cost_figure(updates: list[dict[str, Any]]) -> Figure:
    """Time of an update over that of optax.adamw: median and quartiles."""
    figure = Figure(figsize=(8, 0.9 + 0.32 * len(updates)), layout="constrained")
    axes = figure.subplots()
    for height, update in enumerate(reversed(updates)):
        low, median, high = update["ratio"]
        name = update["optimizer"]
        colour = METHOD_COLOURS["gpa"] if name.startswith("gpa") else "0.7"
        axes.barh(height, median, color=colour)
        axes.plot([low, high], [height, height], color="0.2", linewidth=1)
        axes.text(max(high, median) + 0.05, height, f"{median:.2f}", va="center")
    axes.axvline(1, color="0.2", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(updates)), [u["optimizer"] for u in reversed(updates)])
    axes.set_xlabel("Time of an update, relative to optax.adamw")
    axes.tick_params(left=False)
    return figure
