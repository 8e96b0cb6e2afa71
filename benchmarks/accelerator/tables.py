"""The tables of docs/accelerator.md: what was expected on paper, and what was measured."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.accelerator import gain, right, step, update
from benchmarks.accelerator.plan import PEAKS

Table = tuple[Sequence[str], list[Sequence[str]]]


class Measured(NamedTuple):
    """A measurement, with where and when it was made."""

    device: str
    date: str
    name: str
    found: dict[str, Any]


def measured(folder: Path, part: str) -> list[Measured]:
    """The newest measurements of a part on each device, in the order of the plan."""
    newest: dict[tuple[str, str], Measured] = {}
    for path in folder.glob(f"{part}-*.json"):
        content = json.loads(path.read_text())
        device = content["device"]["kind"]
        for name, found in content["measurements"].items():
            one = Measured(device, found["date"][:10], name, found)
            known = newest.get((device, name))
            if "failed" not in found and (known is None or known.found["date"] < found["date"]):
                newest[device, name] = one
    module = {"right": right, "update": update, "step": step, "gain": gain}[part]
    order = module.measurements(False)
    return sorted(newest.values(), key=lambda one: (one.device, order.index(one.name)))


def plan(folder: Path) -> Table:
    """What an H100 has to do, how long that should take, and what it took."""
    headings = ("", "", "operations", "bytes", "expected, ms", "measured on an H100, ms")
    lines = []
    for part, module in (("update", update), ("step", step), ("gain", gain)):
        here = {one.name: one for one in measured(folder, part) if "H100" in one.device}
        for name in module.measurements(False):
            found = here[name].found if name in here else {}
            # A batch that did not fit was halved: then it is not what was planned.
            planned = str(found.get("sequences", "")) in name
            rows = found[f"{part}s"] if found and planned else {}
            for what, work in module.expected(name, PEAKS["H100"]).items():
                lines.append(
                    [
                        name,
                        f"`{what}`" if part == "update" else what,
                        amount(work["operations"]),
                        amount(work["bytes"]),
                        milliseconds(work["seconds"]),
                        milliseconds(median(rows[what])) if what in rows else "not yet",
                    ]
                )
    return headings, lines


def median(row: dict[str, Any]) -> float:
    """The median of the seconds; what was not repeated has only one number."""
    seconds = row["seconds"]
    return seconds[1] if isinstance(seconds, list) else seconds


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds > 10 else f"{1e3 * seconds:,.2f}"


def amount(number: float) -> str:
    """In units of 10^9."""
    return f"{number / 1e9:,.1f} G" if number else ""


def trajectories(folder: Path) -> Table:
    headings = (
        "device, date", "base", "decay at", "params", "largest error of x, y, z", "same bits twice",
    )  # fmt: skip
    lines = []
    for one in measured(folder, "right"):
        for case in one.found.get("cases", []):
            lines.append(
                [
                    f"{one.device}, {one.date}",
                    case["base"],
                    case["base_params"],
                    case["dtype"],
                    f"{max(case['errors'][name] for name in 'xyz'):.1e}",
                    "yes" if case["same_bits"] else "**no**",
                ]
            )
    return headings, lines


def kernels(folder: Path) -> Table:
    headings = ("device, date", "params", "leaves", "kernels in the program", "kernels that ran")
    lines = []
    for one in measured(folder, "right"):
        for dtype, row in one.found.get("updates", {}).items():
            ran = "not known" if row["ran"] is None else f"{row['ran']:.0f}"
            cells = [dtype, f"{row['leaves']}", f"{row['compiled']:.0f}", ran]
            lines.append([f"{one.device}, {one.date}", *cells])
    return headings, lines


def updates(folder: Path) -> Table:
    headings = (
        "device, date", "shapes", "update of", "ms (quartiles)", "times the first",
        "bytes per parameter", "GB/s", "of a copy", "expected, ms",
    )  # fmt: skip
    lines = []
    for one in measured(folder, "update"):
        for name, row in one.found["updates"].items():
            low, median, high = row["seconds"]
            moved = row["bytes_per_param"] * one.found["params"]
            expected = row["predicted_seconds"]
            lines.append(
                [
                    f"{one.device}, {one.date}",
                    one.name.partition(", ")[2],
                    f"`{name}`",
                    f"{1e3 * median:.3f} ({1e3 * low:.3f} to {1e3 * high:.3f})",
                    f"{row['ratio'][1]:.2f}" if "ratio" in row else "",
                    f"{row['bytes_per_param']:.1f}",
                    f"{moved / median / 1e9:,.0f}",
                    f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else "",
                    "" if expected is None else f"{1e3 * expected:.3f}",
                ]
            )
    return headings, lines


def steps(folder: Path) -> Table:
    headings = (
        "device, date", "", "ms (quartiles)", "tokens a second", "of a product", "the optimizer",
        "memory, GiB", "expected, ms",
    )  # fmt: skip
    lines = []
    for one in measured(folder, "step"):
        size = f"{one.found['sequences']} x {one.found['length']} tokens"
        for name, row in one.found["steps"].items():
            low, median, high = row["seconds"]
            peak, expected = row.get("peak_bytes"), row["predicted_seconds"]
            share = row.get("optimizer_share")
            lines.append(
                [
                    f"{one.device}, {one.date}",
                    f"{name}, {size}",
                    f"{1e3 * median:.1f} ({1e3 * low:.1f} to {1e3 * high:.1f})",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['share_of_product']:.0%}",
                    "" if share is None else f"{share[1]:.1%}",
                    "" if peak is None else f"{peak / 2**30:.1f}",
                    "" if expected is None else f"{1e3 * expected:.1f}",
                ]
            )
    return headings, lines


def gains(folder: Path) -> Table:
    headings = (
        "device, date", "model, steps", "", "learning rate", "warmup", "loss at the end",
        "against AdamW", "saves", "at twice AdamW's rate, saves", "seeds",
    )  # fmt: skip
    lines = []
    for one in measured(folder, "gain"):
        found = one.found["contrasts"]
        for name, row in found.items():
            rule, beside = row.get("by_rule"), ["", "", ""]
            if rule:
                beside = [difference(row), saving(row), f"{difference(rule)}, {saving(rule)}"]
            lines.append(
                [
                    f"{one.device}, {one.date}",
                    one.name,
                    name,
                    f"{row['learning_rate']:.3g}",
                    f"{row['warmup']:.0%}",
                    f"{row['final']:.4f}",
                    *beside,
                    f"{found[gain.USUAL.optimizer]['seeds']}",
                ]
            )
    return headings, lines


def difference(row: dict[str, Any]) -> str:
    interval = row.get("interval")
    ends = f" ({interval[0]:+.4f} to {interval[1]:+.4f})" if interval else ""
    return f"{row['difference']:+.4f}{ends}"


def saving(row: dict[str, Any]) -> str:
    if "saving" not in row:
        return "diverged"
    interval = row.get("saving_interval")
    ends = f" ({interval[0]:.0%} to {interval[1]:.0%})" if interval else ""
    return f"{row['saving']:.1%}{ends}"


def bars(folder: Path) -> Table:
    """The goals, beside what was measured."""
    headings = ("device, date", "", "wanted", "measured", "")
    lines = []
    for part, module in (("right", right), ("update", update), ("gain", gain)):
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for one in measured(folder, part):
            found.setdefault((one.device, one.date), {})[one.name] = one.found
        for (device, date), results in found.items():
            for bar in module.bars(results):
                wanted = f"{'at most' if bar.at_most else 'at least'} {bar.limit:.3g}"
                verdict = "met" if bar.met else "**missed**"
                lines.append(
                    [f"{device}, {date}", bar.what, wanted, f"{bar.measured:.3g}", verdict]
                )
    return headings, lines


TABLES = {
    "accelerator-plan": plan,
    "accelerator-bars": bars,
    "accelerator-trajectories": trajectories,
    "accelerator-kernels": kernels,
    "accelerator-updates": updates,
    "accelerator-steps": steps,
    "accelerator-gains": gains,
}
