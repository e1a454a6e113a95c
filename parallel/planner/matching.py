"""Pairing two groups so that the worst pair is as good as can be: the bottleneck of a bipartite graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def bottleneck(
    left: Sequence[int], right: Sequence[int], cost: Callable[[int, int], float]
) -> tuple[float, dict[int, int]]:
    """The largest cost of the best pairing, and the pairing.

    Every member of the smaller group gets one of the other. Thresholds are tried by bisection over the costs, each with
    augmenting paths (Kuhn 1955). Ties go to the first in order.

    Returns:
      (0.0, {}) where a group is empty.
    """
    if len(left) > len(right):
        worst, pairs = bottleneck(right, left, lambda a, b: cost(b, a))
        return worst, {b: a for a, b in pairs.items()}
    table = [[cost(a, b) for b in right] for a in left]
    levels = sorted({c for row in table for c in row})
    low, high = 0, len(levels) - 1
    best: tuple[float, list[int]] = (0.0, [])
    while low <= high:
        middle = (low + high) // 2
        found = _match(table, levels[middle], len(right))
        if found is None:
            low = middle + 1
        else:
            best, high = (levels[middle], found), middle - 1
    worst, owner = best
    return worst, {left[i]: right[j] for j, i in enumerate(owner) if i >= 0}


def _match(table: list[list[float]], most: float, columns: int) -> list[int] | None:
    """The row that each column is paired with (-1: none), no cost above `most`; None where a row is left over."""
    owner = [-1] * columns

    def place(row: int, seen: set[int]) -> bool:
        for column, c in enumerate(table[row]):
            if c <= most and column not in seen:
                seen.add(column)
                if owner[column] < 0 or place(owner[column], seen):
                    owner[column] = row
                    return True
        return False

    return owner if all(place(row, set()) for row in range(len(table))) else None
