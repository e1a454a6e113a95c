"""The text of a compiled program (`compiled.as_text()`), read: instructions, loops, and what runs how often.

Only what `jaxpar.parallel.collectives` and `jaxpar.parallel.overlap` ask for. In a scheduled module, as compiled programs
are, the order of a computation's lines is the order in which they run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Instruction:
    """`%name = shape opcode(rest`.

    Attributes:
      rest: everything behind the opening parenthesis: operands, then attributes.
      root: it is its computation's result.
    """

    name: str
    shape: str
    opcode: str
    rest: str
    root: bool = False

    @property
    def operands(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-]+)", self.rest[: closing("(" + self.rest) - 1])

    def attribute(self, name: str) -> str:
        """The computation or word that stands behind `name=`; "" where there is none."""
        found = re.search(rf'\b{name}="?%?([\w.\-]+)', self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Run:
    """A computation whose instructions are scheduled one by one, and how often a program runs it."""

    body: list[Instruction]
    times: int


@dataclass(frozen=True)
class Module:
    """A program.

    Attributes:
      entry: the computation that it begins with.
      computations: each computation's instructions, in their order.
    """

    entry: str
    computations: dict[str, list[Instruction]]

    def runs(self) -> tuple[list[Run], int, int]:
        """What is scheduled: the entry, bodies of loops, branches, and computations that are called.

        Returns:
          the runs, with loops multiplied out; the number of loops whose trip count is unknown (once is assumed); the
          number of branches of conditionals (each counts as if it always ran).
        """
        runs: list[Run] = []
        unknown = branches = 0

        def walk(name: str, times: int) -> None:
            nonlocal unknown, branches
            body = self.computations.get(name, [])
            runs.append(Run(body, times))
            for one in body:
                match one.opcode:
                    case "while":
                        trips = self.trips(one)
                        unknown += trips is None
                        walk(one.attribute("body"), times * (trips or 1))
                    case "conditional":
                        for branch in self.branches(one):
                            branches += 1
                            walk(branch, times)
                    case "call":
                        walk(one.attribute("to_apply"), times)

        walk(self.entry, 1)
        return runs, unknown, branches

    def fused(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions that one instruction of a schedule stands for: its own, or all those inside a fusion or a
        wrapped asynchronous operation."""
        yield instruction
        if instruction.opcode in ("fusion", "async-start") and (inside := instruction.attribute("calls")):
            for one in self.computations.get(inside, []):
                yield from self.fused(one)

    def branches(self, conditional: Instruction) -> list[str]:
        names = re.search(r"branch_computations=\{([^}]*)\}", conditional.rest)
        if names:
            return [n.strip().lstrip("%") for n in names[1].split(",")]
        return [conditional.attribute(f"{b}_computation") for b in ("true", "false")]

    def trips(self, loop: Instruction) -> int | None:
        """How often a `while` runs its body: as XLA notes it, or else from a counter that goes up by 1 from a constant
        and is compared with one, as `lax.scan` makes it (XLA:TPU notes nothing). None: neither."""
        if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
            return int(noted[1])
        test = self.root(loop.attribute("condition"))
        if test is None or test.opcode != "compare" or test.attribute("direction") != "LT":
            return None
        counter, limit = (self.named.get(name) for name in test.operands)
        if counter is None or limit is None or (counter.opcode, limit.opcode) != ("get-tuple-element", "constant"):
            return None
        index = int(counter.attribute("index"))
        start = self.value(self.element(self.named.get(loop.operands[0]), index))
        step = self.element(self.root(loop.attribute("body")), index)
        steps = [] if step is None or step.opcode != "add" else [self.value(self.named.get(n)) for n in step.operands]
        stop = self.value(limit)
        return None if start is None or stop is None or 1 not in steps else max(0, stop - start)

    @cached_property
    def named(self) -> dict[str, Instruction]:
        return {one.name: one for body in self.computations.values() for one in body}

    def root(self, computation: str) -> Instruction | None:
        return next((one for one in self.computations.get(computation, []) if one.root), None)

    def element(self, whole: Instruction | None, index: int) -> Instruction | None:
        """What stands at a place of a tuple."""
        return self.named.get(whole.operands[index]) if whole is not None and whole.opcode == "tuple" else None

    def value(self, instruction: Instruction | None) -> int | None:
        """A whole number that is a constant, or a copy of one."""
        while instruction is not None and instruction.opcode in ("copy", "bitcast"):
            instruction = self.named.get(instruction.operands[0])
        if instruction is None or instruction.opcode != "constant":
            return None
        number = re.match(r"(-?\d+)\)", instruction.rest)
        return int(number[1]) if number else None


def parse(hlo: str) -> Module:
    """Read a module's text."""
    entry, lines, found = "", None, {}
    for line in hlo.splitlines():
        if lines is None:
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                lines = found.setdefault(head[2], [])
                entry = head[2] if head[1] else entry
        elif line == "}":
            lines = None
        elif (one := instruction(line)) is not None:
            lines.append(one)
    return Module(entry, found)


def instruction(line: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    text = line[head.end() :]
    end = closing(text) + 1 if text.startswith("(") else text.find(" ")
    opcode = re.match(r"\s*([\w\-]+)\(", text[end:])
    if opcode is None:
        return None
    return Instruction(head[2], text[:end], opcode[1], text[end + opcode.end() :], root=head[1] is not None)


def closing(text: str) -> int:
    """Where the parenthesis that opens `text` closes."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if depth == 0:
            return i
    raise ValueError(f"unbalanced parentheses in {text[:60]!r} ...")
