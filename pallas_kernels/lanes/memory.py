"""How shared memory lies that a program of threads reads: kinds of references, and the pattern that copies write."""

from __future__ import annotations

from dataclasses import dataclass

from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = 128
CHUNK = 16
"""Bytes of a row of a matrix in shared memory."""
PATTERN = 128
"""Bytes of a row of shared memory's pattern, at most."""


@dataclass(frozen=True)
class Kind:
    """What a reference is to: rows of bytes in shared memory's pattern, as a copy lays them, or numbers one after another.

    Attributes:
      width: bytes of a row in the pattern; 0: numbers of 32 bits, which lie without one.
    """

    width: int = 0

    @property
    def transforms(self) -> tuple:
        row = min(self.width, PATTERN)
        return (plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(row)) if self.width else ()


NUMBERS = Kind()


def place(row, chunk, width: int):
    """Where 16 bytes of a row of `width` bytes are in shared memory's pattern, in bytes; of words, or of arrays.

    Eight rows of a pattern's bytes lie together, and then the next bytes of the same rows. Of each 128 bytes in memory the 16
    have changed places by the number of those 128: of 128, 64 or 32 bytes a row, among 8, 4 or 2.
    """
    pattern = min(width, PATTERN)
    many = pattern // CHUNK
    inside = (chunk % many) ^ ((row % 8) // (8 // many))
    return ((row // 8) * (width // pattern) + chunk // many) * (8 * pattern) + (row % 8) * pattern + inside * CHUNK
