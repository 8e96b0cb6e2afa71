"""The runs of `benchmarks.ensemble` as records of a store."""

import dataclasses
import functools
import math
import operator
from pathlib import Path
from typing import Any

from benchmarks.ensemble import Member, Result, train
from benchmarks.store import Kind, rounded
from benchmarks.workloads import Data, ImageWorkload, Workload


def record_of(result: Result) -> dict[str, Any]:
    return {
        "identity": result.member.identity,
        **result.member.changes(),
        "curve": rounded(result.curve),
        "final": round(result.final, 6) if math.isfinite(result.final) else None,
        "cpu_seconds": round(result.seconds, 1),
    }


def in_record(record: dict[str, Any]) -> tuple[Member, Result]:
    fields = {field.name for field in dataclasses.fields(Member)} & record.keys()
    values = {name: record[name] for name in fields}
    if "workload" in values:
        values["workload"] = workload_of(dict(values["workload"]))
    member = Member(**values)
    final = math.inf if record["final"] is None else record["final"]
    return member, Result(member, record["curve"], final, record["cpu_seconds"])


def workload_of(changed: dict[str, Any]) -> Workload | ImageWorkload:
    if "images" in changed:
        return ImageWorkload(**changed)
    model = dataclasses.replace(Workload().model, **changed.pop("model", {}))
    return Workload(model, **changed)


def told(result: Result) -> str:
    member = result.member
    changed = {k: v for k, v in member.changes().items() if k not in ("optimizer", "knobs")}
    parts = {**changed, **dict(member.knobs)}
    what = f"{member.optimizer}, " + ", ".join(f"{k} {v}" for k, v in parts.items())
    return f"{what}: {result.final:.4f} in {result.seconds:.0f} s"


MEMBERS = Kind(operator.attrgetter("identity"), record_of, in_record, told)


def train_member(member: Member, folder: Path, at_y: bool = False) -> Result:
    """Trains a member, as a worker does."""
    [result] = train([member], loaded(member.workload, folder), at_y)
    return result


@functools.lru_cache(maxsize=8)
def loaded(workload: Workload | ImageWorkload, folder: Path) -> Data:
    return workload.load(folder)
