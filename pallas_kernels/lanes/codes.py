"""Codes of 8 or 4 bits as operands of the matrix instruction."""

from __future__ import annotations

import numpy as np

UNIT = 2.0**-6
"""What a code of 1 is as an operand."""


def widened(bits: int, machine, word) -> list:
    """Pairs of bfloat16, `UNIT` times codes, of a word: codes n and n + 16 / bits of it are the n-th pair.

    As in `matmul.gpu_registers._pairs`: a number n in the lower half of a bfloat16 is n · 2⁻¹³³.
    """
    # Bits, times 2¹²⁷ or, where they are 16 times as much, 2¹²³, and what a code is above its lowest.
    masks = ((0x000F000F, 0x7F007F00), (0x00F000F0, 0x7D007D00)) if bits == 4 else ((0x00FF00FF, 0x7F007F00),)
    lowest = 0xBE00BE00 if bits == 4 else 0xC000C000
    found = []
    # Of each code the highest bit.
    word = word ^ np.uint32(0x88888888 if bits == 4 else 0x80808080)
    for shift in (0, 8):
        for mask, times in masks:
            part = word >> shift if shift else word
            found.append(machine.fused(part & np.uint32(mask), times, lowest))
    return found
