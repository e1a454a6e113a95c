"""A table's ticks as few loops: a schedule of hundreds of ticks compiles as two or three scans."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxpar.parallel.pipeline.tasks import Kind


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
