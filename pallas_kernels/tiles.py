"""Block sizes from a table: the first row that fits a chip and a shape is taken.

A table belongs to an op and lists its rows from special to general; its last row fits everything. What a row holds is the
op's own (a frozen dataclass of block sizes).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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


def look_up(table: Iterable[Row], device_kind: str | None, **sizes: int):
    """The tiles of the first row that fits.

    Args:
      device_kind: as JAX names it; None where it is not known.
      sizes: the sizes of the dimensions that the table's rows name.
    """
    short = chip(device_kind)
    for row in table:
        if row.chips is not None and short not in row.chips:
            continue
        if all(sizes[name] <= size for name, size in row.most):
            return row.tiles
    raise ValueError(f"no row of the table fits a {device_kind} and {sizes}")
