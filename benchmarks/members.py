"""The members of studies that were made, one in a line of a file, so that none is made twice."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.ensemble import Member, Result, Workload


class Members(Mapping[str, Result]):
    """Results by the identity of their member, in a file of JSON lines that only grows.

    A line is written at once, so that a process that ends leaves whole ones. Of two lines with one
    identity the later counts.
    """

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[str, Result] = {}
        self.origins: dict[str, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            self._take(json.loads(line))

    def add(self, result: Result, origin: Mapping[str, Any]) -> None:
        """Stores a result, with where it is from: versions, hardware, date."""
        member = result.member
        record = {
            "identity": member.identity,
            "member": member.changes(),
            "curve": {
                name: [float(f"{value:.7g}") for value in values] if name != "step" else values
                for name, values in result.curve.items()
            },
            "final": float(f"{result.final:.7g}"),
            "seconds": float(f"{result.seconds:.4g}"),
            **origin,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._take(record)

    def _take(self, record: dict[str, Any]) -> None:
        identity, member = record.pop("identity"), read(record.pop("member"))
        result = Result(member, record.pop("curve"), record.pop("final"), record.pop("seconds"))
        self.results[identity], self.origins[identity] = result, record

    def __getitem__(self, identity: str) -> Result:
        return self.results[identity]

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


def read(changes: Mapping[str, Any]) -> Member:
    """The member of which `changes` says what is not default."""
    default, workload = Workload(), dict(changes.get("workload", {}))
    workload["model"] = dataclasses.replace(default.model, **workload.get("model", {}))
    return Member(**{**changes, "workload": dataclasses.replace(default, **workload)})
