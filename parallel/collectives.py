"""Collectives: what each moves, and how many a compiled program really has.

`count(hlo, sizes)` reads the text of a compiled step (`compiled.as_text()`): the truth after the partitioner and the
combiners, where `jaxpar.parallel.explain` only derives what the rules imply.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from jaxpar.parallel.hlo import Instruction, Module, parse

OPS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


@dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Attributes:
      op: its name in HLO.
      axes: the mesh axes it runs over; None where its groups are no product of mesh axes.
      group: devices in each group.
      nbytes: payload of one execution: the whole array, before it is scattered or after it is gathered.
      times: executions a step (loops multiplied out).
      where: what it is for: a tensor's name, or the operation's name in the program.
    """

    op: str
    axes: tuple[str, ...] | None
    group: int
    nbytes: int
    times: int
    where: str = ""

    @property
    def sent(self) -> int:
        """Bytes that a device sends in one execution of the ring algorithm.

        (n-1)/n of the payload to gather or to scatter; an all-reduce does both. Patarasuk & Yuan 2009.
        """
        n = self.group
        match self.op:
            case "all-reduce":
                return 2 * self.nbytes * (n - 1) // n
            case "collective-permute" | "collective-broadcast":
                return self.nbytes
            case _:
                return self.nbytes * (n - 1) // n

    def record(self) -> dict:
        """JSON-able."""
        return {
            "op": self.op,
            "axes": None if self.axes is None else list(self.axes),
            "group": self.group,
            "bytes": self.nbytes,
            "times": self.times,
            "sent_bytes_per_step": self.sent * self.times,
            "where": self.where,
        }


@dataclass(frozen=True)
class Counted:
    """The collectives of a compiled program.

    Attributes:
      collectives: one for each instruction, in no special order.
      unknown_loops: loops whose trip count the compiler did not state; their bodies are counted once.
      branches: branches of conditionals; each is counted as if it always ran.
    """

    collectives: tuple[Collective, ...]
    unknown_loops: int
    branches: int


def count(hlo: str, sizes: Mapping[str, int]) -> Counted:
    """Count the collectives in the text of a compiled program, loops multiplied out.

    Args:
      hlo: `compiled.as_text()`.
      sizes: `{axis: size}` of the mesh in its order, to name the axes that groups run over.
    """
    module = parse(hlo)
    runs, unknown, branches = module.runs()
    found = [read(one.instruction, run.times, sizes, one.scatters) for run in runs for one in places(module, run.body)]
    return Counted(tuple(found), unknown, branches)


@dataclass(frozen=True)
class Place:
    """Where a collective stands in a schedule.

    Attributes:
      instruction: the collective.
      first: the line of the schedule that begins it: its own, or that of the fusion it is in.
      last: the line with which it is over; `first` where nothing can run beside it.
      scatters: the fusion that it is in keeps a device's own part alone.
    """

    instruction: Instruction
    first: int
    last: int
    scatters: bool = False


def places(module: Module, body: list[Instruction]) -> list[Place]:
    """The collectives of a computation that is scheduled line by line, each once.

    Three ways to write one that other work runs beside: a pair, `all-gather-start` and `-done`; a pair `async-start` and
    `async-done` around a computation; and XLA:TPU's chain of fusions, in which a first one starts it, products carry it
    on as they compute, and a last one waits for it. All links of a chain hold a copy of the collective with one chain_id.
    """
    ends = {}
    for i, one in enumerate(body):
        if one.opcode.endswith("-done"):
            ends[next(iter(one.operands), "")] = i
    found: list[Place] = []
    chains: dict[str, int] = {}
    for i, one in enumerate(body):
        for inside in module.fused(one):
            if inside.opcode.removesuffix("-start") not in OPS:
                continue
            chain = inside.attribute("chain_id") if inside is not one else ""
            if chain in chains:
                at = chains[chain]
                found[at] = replace(found[at], last=i)
                continue
            if chain:
                chains[chain] = len(found)
            begins = one.opcode.endswith("-start")
            scatters = one.opcode == "fusion" and one.attribute("calls").startswith("all-reduce-scatter")
            found.append(Place(inside, i, ends.get(one.name, i) if begins else i, scatters))
    return found


def read(one: Instruction, times: int, sizes: Mapping[str, int], scatters: bool = False) -> Collective:
    """One instruction as a `Collective`. XLA:TPU writes a reduce-scatter as a fusion of an all-reduce and a slice."""
    op = one.opcode.removesuffix("-start")
    found = _collective(op, op != one.opcode, one.shape, one.rest, times, sizes)
    return replace(found, op="reduce-scatter") if scatters and op == "all-reduce" else found


def _collective(op, is_async: bool, shape: str, rest: str, times: int, sizes) -> Collective:
    if is_async and op != "all-reduce":
        shape = _elements(shape)[1]  # (operand, result, context...)
    groups = _pairs(rest) if op == "collective-permute" else _groups(rest, math.prod(sizes.values()))
    nbytes = _nbytes(shape)
    if op == "collective-permute":
        axes = _moved_axes(groups, sizes)
        group = math.prod(sizes[a] for a in axes)
    else:
        axes, group = _axes_of(groups, sizes), len(groups[0])
    if op == "reduce-scatter":
        nbytes *= group
    name = re.search(r'op_name="([^"]*)"', rest)
    return Collective(op, axes, group, nbytes, times, name[1] if name else "")


def _elements(shape: str) -> list[str]:
    """The elements of a tuple shape at its top level."""
    parts, depth, start = [], 0, 1
    for i, c in enumerate(shape):
        depth += (c in "({[") - (c in ")}]")
        if (depth == 1 and c == ",") or (depth == 0 and c == ")"):
            parts.append(shape[start:i])
            start = i + 1
    return parts


def _nbytes(shape: str) -> int:
    """Bytes of a shape, or of all elements of a tuple of shapes."""
    total = 0
    for dtype, dims in re.findall(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.match(r"[a-z]+(\d+)", dtype) or [0, 0])[1])
        total += -(-math.prod(int(d) for d in dims.split(",") if d) * bits // 8)
    return total


def _groups(rest: str, devices: int) -> list[list[int]]:
    """The replica groups, from any of the forms that XLA writes; all devices where none are written."""
    import numpy as np

    # [groups, size]<=[dims]T(permutation)
    if m := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        shape, dims = _ints(m[1]), _ints(m[2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        return (ids.transpose(_ints(m[3])) if m[3] else ids).reshape(shape).tolist()
    # mesh['a'=4,'b'=2] {'b'}, or with devices in another order: mesh['a'=4,'b'=2], device_ids=([2,2,2]T(1,0,2)) {'b'}
    form = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{([^}]*)\}"
    if m := re.search(form, rest):
        names = dict((k, int(v)) for k, v in re.findall(r"'([^']+)'=(\d+)", m[1]))
        groups = np.asarray(_groups_over(re.findall(r"'([^']+)'", m[4]), names))
        if m[2] is None:
            return groups.tolist()
        ids = np.arange(math.prod(_ints(m[2]))).reshape(_ints(m[2]))
        return (ids.transpose(_ints(m[3])) if m[3] else ids).ravel()[groups].tolist()
    if m := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest):
        return [_ints(g) for g in re.findall(r"\{([\d,]+)\}", m[1])]
    return [list(range(devices))]


def _groups_over(axes, sizes: Mapping[str, int]) -> list[list[int]]:
    """The groups of devices (by position in the mesh) that differ along `axes` alone."""
    import numpy as np

    names = list(sizes)
    ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    order = [i for i, n in enumerate(names) if n not in axes] + [names.index(a) for a in axes]
    return ids.transpose(order).reshape(-1, math.prod(sizes[a] for a in axes)).tolist()


def _axes_of(groups: list[list[int]], sizes: Mapping[str, int]) -> tuple[str, ...] | None:
    wanted = {frozenset(g) for g in groups}
    for axes in _subsets([a for a, n in sizes.items() if n > 1]):
        if {frozenset(g) for g in _groups_over(axes, sizes)} == wanted:
            return axes
    return None


def _subsets(axes: list[str]) -> Iterator[tuple[str, ...]]:
    return itertools.chain.from_iterable(itertools.combinations(axes, n) for n in range(len(axes) + 1))


def _pairs(rest: str) -> list[list[int]]:
    m = re.search(r"source_target_pairs=\{(\{[\d,{} ]*\})\}", rest)
    return [_ints(p) for p in re.findall(r"\{([\d,]+)\}", m[1])] if m else []


def _moved_axes(pairs: list[list[int]], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes along which any pair of source and target differ."""
    import numpy as np

    moved = set()
    for source, target in pairs:
        at = [np.unravel_index(i, tuple(sizes.values())) for i in (source, target)]
        moved |= {axis for axis, a, b in zip(sizes, *at, strict=True) if a != b}
    return tuple(a for a in sizes if a in moved)


def _ints(text: str) -> list[int]:
    return [int(i) for i in text.split(",") if i]
