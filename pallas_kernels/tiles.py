"""Block sizes from a table: the first row that fits a chip and a shape is taken, unless the tuning cache has an entry.

A table belongs to an op and lists its rows from special to general; its last row fits everything. What a row holds is the
op's own (a frozen dataclass of block sizes).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from jaxpar.pallas_kernels.tuning import cache

CHIPS = (
    ("TPU v5 lite", "v5e"),
    ("TPU v5", "v5p"),
    ("TPU v6", "v6e"),
    ("TPU7x", "tpu7x"),
    ("NVIDIA H", "hopper"),
    ("NVIDIA GH", "hopper"),
    ("NVIDIA B", "blackwell"),
    ("NVIDIA GB", "blackwell"),
)
"""How JAX's `device_kind` begins, and the chip's short name; the first that fits."""


def chip(device_kind: str | None) -> str | None:
    """The short name of a kind of device, "v5e" for "TPU v5 lite"; None where the tables know none."""
    for start, name in CHIPS:
        if device_kind is not None and device_kind.startswith(start):
            return name
    return None


@dataclass(frozen=True)
class Row:
    """Block sizes and what they are for.

    Attributes:
      tiles: the block sizes.
      chips: short names of the chips they are for. None: all.
      most: pairs of a dimension's name and its largest size they are for.
    """

    tiles: Any
    chips: tuple[str, ...] | None = None
    most: tuple[tuple[str, int], ...] = ()


def look_up(
    table: Iterable[Row], device_kind: str | None, *, op: tuple[str, str] | None = None, dtype=None, **sizes: int
):
    """The tiles that the tuning cache has for this, else those of the first row that fits.

    Args:
      device_kind: as JAX names it; None where it is not known.
      op: the op and the implementation, by which the cache knows them; None: the table only.
      dtype: of the operands, or a name for those of several; the cache's entries are of one.
      sizes: the sizes of the dimensions that the table's rows and the cache's entries name.

    Raises:
      ValueError: no row fits; a cache that cannot be used (see `tuning.cache.find`).
    """
    short, rows = chip(device_kind), tuple(table)
    if op is not None:
        found = cache.find(*op, short, dtype, sizes, type(rows[0].tiles))
        if found is not None:
            return found
    for row in rows:
        if row.chips is not None and short not in row.chips:
            continue
        if all(sizes[name] <= size for name, size in row.most):
            return row.tiles
    raise ValueError(f"no row of the table fits a {device_kind} and {sizes}")
