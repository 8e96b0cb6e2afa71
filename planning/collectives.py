"""What a compiled program sends between devices, read from its text (HLO)."""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np

KINDS = (
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
# Several of these may stand in one line, in any order; reducers (to_apply) hold no collectives.
CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|false_computation|"
    r"called_computations)=(\{[^}]*\}|%[\w.-]+)"
)
HEAD = re.compile(r"^(ENTRY )?%([\w.-]+) \(.*\{$")
LINE = re.compile(
    r"^\s+(?P<root>ROOT )?%(?P<name>[\w.-]+) = (?P<shape>\(.*?\)|\S+) (?P<opcode>[a-z][a-z0-9-]*)"
    r"\((?P<operands>[^)]*)\)(?P<attributes>.*)$"
)
ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One of a program's collectives."""

    kind: str
    """One of `KINDS`."""
    bytes: int
    """Of the whole array on a device: what an all-gather makes, a reduce-scatter takes, a permute
    passes on."""


class Traffic(NamedTuple):
    """The collectives of a program."""

    executions: Counter[Collective]
    """How often each is executed when the program runs once."""
    unknown_loops: int
    """Loops with collectives whose number of iterations is not known; it is taken to be one."""

    def total(self, kind: str) -> tuple[int, int]:
        """Executions and bytes of a kind."""
        of_kind = [(c.bytes, n) for c, n in self.executions.items() if c.kind == kind]
        return sum(n for _, n in of_kind), sum(size * n for size, n in of_kind)


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    text: str
    """Between the parentheses: the value of a constant, the index of a parameter."""
    attributes: str

    def called(self, attribute: str = "") -> list[str]:
        """The computations that it runs."""
        found = [m for m in CALLED.finditer(self.attributes) if m[0].startswith(attribute)]
        return [name for m in found for name in re.findall(r"%([\w.-]+)", m[1])]

    def index(self) -> int:
        return int(re.search(r"index=(\d+)", self.attributes)[1])


class Computation(dict[str, Instruction]):
    """Instructions by name."""

    root: Instruction


def read(hlo: str) -> tuple[dict[str, Computation], str]:
    """The computations by name, and the name of the one that is the program."""
    computations, entry, here = {}, "", None
    for line in hlo.splitlines():
        if head := HEAD.match(line):
            here = computations[head[2]] = Computation()
            entry = head[2] if head[1] else entry
        elif here is not None and (found := LINE.match(line)):
            operands = re.findall(r"%([\w.-]+)", found["operands"])
            instruction = Instruction(
                *found.group("name", "shape", "opcode"),
                operands,
                *found.group("operands", "attributes"),
            )
            here[instruction.name] = instruction
            if found["root"]:
                here.root = instruction
    return computations, entry


def traffic(hlo: str) -> Traffic:
    """Counts the collectives of an optimized HLO module.

    A start and its done count once, and the collectives in a loop as often as the loop iterates. Of
    the branches of a conditional, the one that sends the most counts.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.
    """
    computations, entry = read(hlo)
    unknown = 0

    def walk(name: str) -> Counter[Collective]:
        nonlocal unknown
        computation = computations[name]
        found: Counter[Collective] = Counter()
        # On a TPU a chain of fusions carries one collective along beside other work, and each
        # fusion repeats its instruction. It counts in the fusion where it starts.
        starts = any('"AsyncCollectiveStart"' in i.attributes for i in computation.values())
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                if "chain_id=" in instruction.attributes and not starts:
                    continue
                if name.startswith("all-reduce-scatter"):  # a fusion that keeps its own part only
                    kind = "reduce-scatter"
                found[Collective(kind, size(instruction, computation))] += 1
            elif instruction.opcode == "while":
                inside = walk(*instruction.called("body"))
                turns = trip_count(instruction, computation, computations)
                unknown += bool(inside) and turns is None
                for collective, count in inside.items():
                    found[collective] += count * (1 if turns is None else turns)
            elif instruction.opcode == "conditional":
                found += max(map(walk, instruction.called()), key=bytes_of)
            elif instruction.opcode not in ("async-update", "async-done"):
                for called in instruction.called():
                    found += walk(called)
        return found

    return Traffic(walk(entry), unknown)


def bytes_of(executions: Counter[Collective]) -> int:
    return sum(collective.bytes * count for collective, count in executions.items())


def size(instruction: Instruction, computation: Computation) -> int:
    """Bytes of the operands or of the results, the larger; a start's result is that of its done."""
    results = [instruction.shape]
    if instruction.opcode.endswith("-start"):
        results = [i.shape for i in computation.values() if instruction.name in i.operands]
    operands = [computation[name].shape for name in instruction.operands]
    return max(sum(map(array_bytes, operands)), sum(map(array_bytes, results)))


def array_bytes(shape: str) -> int:
    """Bytes of an array or of a tuple of them, such as (f32[2,3]{1,0}, bf16[])."""
    total = 0
    for dtype, dimensions in ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
        elements = np.prod([int(d) for d in dimensions.split(",") if d], dtype=np.int64)
        total += -(-int(elements) * bits // 8)
    return total


def trip_count(
    loop: Instruction, outside: Computation, computations: dict[str, Computation]
) -> int | None:
    """How often a loop iterates: as the compiler noted, or else from its counter's start, step and
    limit, if these are constants; None if neither is known."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (computations[loop.called(key)[0]] for key in ("condition", "body"))
    initial, last = outside[loop.operands[0]], body.root
    if condition.root.opcode != "compare" or {initial.opcode, last.opcode} != {"tuple"}:
        return None

    def constant(computation: Computation, name: str) -> int | None:
        instruction = computation[name]
        while instruction.opcode in ("copy", "bitcast", "copy-start", "copy-done", "convert"):
            instruction = computation[instruction.operands[0]]
        number = re.fullmatch(r"-?\d+", instruction.text)
        return int(number[0]) if instruction.opcode == "constant" and number else None

    left, right = (condition[name] for name in condition.root.operands)
    if left.opcode != "get-tuple-element" or "direction=LT" not in condition.root.attributes:
        return None
    counter, limit = left.index(), constant(condition, right.name)
    if limit is None and right.opcode == "get-tuple-element":
        limit = constant(outside, initial.operands[right.index()])
    start = constant(outside, initial.operands[counter])
    add = body[last.operands[counter]]
    steps = [constant(body, name) for name in add.operands] if add.opcode == "add" else []
    step = next(filter(None, steps), None)
    if None in (start, limit, step):
        return None
    return max(0, -(-(limit - start) // step))
