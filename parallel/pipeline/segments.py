"""A table's ticks as few loops: a schedule of hundreds of ticks compiles as two or three scans. And what of a table is
the same in all turns of a loop and on all devices, so that the program need not look it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from jaxpar.parallel.pipeline.tasks import Kind

if TYPE_CHECKING:
    from jaxpar.parallel.pipeline.table import Table

PASSED = {
    "residual": ((Kind.F,), (Kind.B, Kind.BI)),
    "gradient": ((Kind.F,), (Kind.B, Kind.BI)),
    "weight": ((Kind.BI,), (Kind.BW,)),
}
"""Of the buffers that a device's own actions write: the kinds that write and that read."""


@dataclass(frozen=True)
class Segment:
    """`repeats` times the ticks `pattern`, from tick `start` on."""

    start: int
    pattern: tuple[Kind, ...]
    repeats: int

    @property
    def stop(self) -> int:
        return self.start + len(self.pattern) * self.repeats


def segments(row_kind: np.ndarray, longest: int = 8) -> tuple[Segment, ...]:
    """A sequence of kinds, [T], cut into repeated patterns of at most `longest` ticks: F×3, (F B)×8, B×3.

    A pattern with several kinds starts with F. Inside a loop body a buffer's writer must stand before its reader (F
    writes what B reads): the other way around XLA copies the whole buffer in every turn, because the value read is still
    in use when the buffer is written.
    """
    kinds = [Kind(int(k)) for k in row_kind]

    def repeats(start: int, period: int) -> int:
        pattern, n = kinds[start : start + period], 1
        while kinds[start + n * period : start + (n + 1) * period] == pattern:
            n += 1
        return n

    found: list[Segment] = []
    t = 0
    while t < len(kinds):
        period, n = 1, repeats(t, 1)
        if kinds[t] is Kind.F:
            for candidate in range(2, min(longest, (len(kinds) - t) // 2) + 1):
                again = repeats(t, candidate)
                if again > 1 and again * candidate > n * period:
                    period, n = candidate, again
            if period == 1 and n > 1:
                # One F less here, where that F opens the loop that follows.
                u = t + n - 1
                n -= any(repeats(u, c) > 1 for c in range(2, min(longest, (len(kinds) - u) // 2) + 1))
        found.append(Segment(t, tuple(kinds[t : t + period]), n))
        t += period * n
    return tuple(found)


def constants(table: Table, segment: Segment) -> list[dict]:
    """For each tick of the segment's pattern: the columns that have one value in all turns and on all devices, by name.
    NumPy scalars; routes' slots are [R]."""
    found: list[dict] = []
    for i in range(len(segment.pattern)):
        ticks = slice(segment.start + i, segment.stop, len(segment.pattern))
        part = {name: x[ticks] for name, x in table.columns().items()}
        found.append({name: x[0, ..., 0] for name, x in part.items() if (x == x[:1, ..., :1]).all()})
    return found


def passed_on(table: Table, loops: Sequence[Segment]) -> frozenset[str]:
    """The buffers that a table of one kind a tick needs none of: whatever any device reads from them, the last action
    that writes there made it, for the same stage and microbatch, in the same turn of the loop. With several stages that is
    so of `weight` where BW follows its BI everywhere, with one stage also of `residual` and `gradient` where B follows F.
    """
    turn = np.concatenate([s.start + np.arange(s.stop - s.start) // len(s.pattern) * len(s.pattern) for s in loops])
    task = np.stack([table.stage, table.microbatch], -1)

    def made_here(t: int, writers: tuple[Kind, ...]) -> bool:
        active = table.kind[t] != Kind.IDLE
        before = [s for s in range(turn[t], t) if table.row_kind[s] in writers]
        if not before:
            return False
        s = before[-1]
        return bool(((table.kind[s] == table.row_kind[s]) & (task[s] == task[t]).all(-1))[active].all())

    def passed(buffer: str) -> bool:
        writers, readers = PASSED[buffer]
        if buffer == "gradient" and (table.receive_gradient < table.slots["gradient"]).any():
            return False
        return all(made_here(t, writers) for t in range(table.length) if table.row_kind[t] in readers)

    return frozenset(filter(passed, PASSED))
