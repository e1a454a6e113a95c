"""The machine that computes a program for the 128 threads of a warpgroup: what each instruction is, for the interpreter."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.pallas_kernels.lanes.memory import CHUNK, THREADS, Kind


class Array:
    """A reference's numbers, or its bytes [rows, width]."""

    def __init__(self, ref, kind: Kind):
        self.ref, self.shape, self.written = ref, ref.shape, False
        self.numbers = ref[...].reshape(-1) if not kind.width else None
        self.bytes = lax.bitcast_convert_type(ref[...], jnp.uint8).reshape(-1, kind.width) if kind.width else None

    def index(self, row, column):
        """Of a number in a matrix."""
        return row * self.shape[-1] + column

    def write_back(self) -> None:
        if self.written:
            self.ref[...] = self.numbers.reshape(self.shape)


LANES = (4, 8, 4)
"""Warps, groups and pairs of `THREADS`."""


def _halves(word):
    """[128, 2] bfloat16 of a word."""
    return lax.bitcast_convert_type(word.astype(jnp.uint32), jnp.bfloat16)


def _float(bits: int) -> float:
    """The bfloat16 that the lower half is."""
    return float(np.uint32((bits & 0xFFFF) << 16).view(np.float32))


def _word(halves):
    return lax.bitcast_convert_type(halves, jnp.uint32)


class Threads:
    """Computes a program for the 128 threads of a warpgroup: `Chip` says what each instruction is."""

    # A kernel has no constants that are arrays: threads are moved by reshaping.

    def thread(self):
        return lax.iota(jnp.int32, THREADS)

    def number(self, value: float):
        return jnp.full((THREADS,), value, jnp.float32)

    def bits(self, word):
        return lax.bitcast_convert_type(word, jnp.uint32)

    def load(self, memory, index):
        return memory.numbers[index]

    def pair(self, memory, index) -> list:
        return [self.load(memory, index), self.load(memory, index + 1)]

    def store(self, memory, index, values, where=None) -> None:
        index = index if where is None else jnp.where(where, index, memory.numbers.shape[0])
        for n, value in enumerate(values):
            value = value if value.dtype == jnp.float32 else lax.bitcast_convert_type(value, jnp.float32)
            memory.numbers, memory.written = memory.numbers.at[index + n].set(value, mode="drop"), True

    def send(self, memory, block, index, values, blocks: int) -> None:
        """`memory` is that of all blocks, one behind another."""
        self.store(memory, block * (memory.numbers.shape[0] // blocks) + index, values)

    def matrices(self, tile, row, chunk, *, transposed=False) -> list:
        axis = lambda shape, n: lax.broadcasted_iota(jnp.int32, shape, n)
        found = []
        for n in range(4):
            lanes_ = [one.reshape(4, 4, 8)[:, n] for one in (row, chunk)]
            if transposed:
                # Byte `low` of row 2 · pair + `half`, and of the element `group`: [warp, group, pair, half, low].
                shape = (*LANES, 2, 2)
                rows, chunks = (jnp.broadcast_to(one.reshape(4, 1, 4, 2, 1), shape) for one in lanes_)
                byte = 2 * axis(shape, 1) + axis(shape, 4)
            else:
                shape = (*LANES, 4)
                rows, chunks = (jnp.broadcast_to(one.reshape(4, 8, 1, 1), shape) for one in lanes_)
                byte = 4 * axis(shape, 2) + axis(shape, 3)
            four = tile.bytes[rows, CHUNK * chunks + byte].reshape(THREADS, 4)
            found.append(lax.bitcast_convert_type(four, jnp.uint32))
        return found

    def fused(self, word, times: int, plus: int):
        # XLA takes subnormal numbers for 0 on CPUs: they are whole numbers of the smallest one here. Sums are float32's.
        halves = []
        for low, half in ((True, word << 16), (False, word & np.uint32(0xFFFF0000))):
            scale, shift = (_float(one if low else one >> 16) for one in (times, plus))
            small = ((half >> 16) & np.uint32(0x7F)).astype(jnp.float32) * (scale * 2.0**-133)
            small = jnp.where(half >> 31 > 0, -small, small)
            number = lax.bitcast_convert_type(half, jnp.float32) * scale
            halves.append(jnp.where((half & np.uint32(0x7F800000)) > 0, number, small) + shift)
        return self.packed(*halves)

    def picked(self, a, b, selector: int):
        bytes_ = [one >> 8 * n & np.uint32(255) for one in (a, b) for n in range(4)]
        found = [bytes_[selector >> 4 * n & 15] << 8 * n for n in range(4)]
        return found[0] | found[1] | found[2] | found[3]

    def packed(self, low, high):
        return _word(jnp.stack([low, high], -1).astype(jnp.bfloat16))

    def turned(self, word):
        rows = _halves(word).reshape(4, 8, 8).swapaxes(1, 2)
        return _word(rows.reshape(THREADS, 2))

    def product(self, total, a, b) -> list:
        # Words: (along k, below, warp, group, pair, e); (along k, warp, ...); (below, warp, group, pair) and e.
        a = jnp.stack([_halves(word) for word in a]).reshape(2, 2, *LANES, 2)
        a = a.transpose(2, 1, 3, 0, 4, 5).reshape(4, 16, 16).astype(jnp.float32)
        b = jnp.stack([_halves(word) for word in b]).reshape(2, *LANES, 2)
        b = b.transpose(1, 2, 0, 3, 4).reshape(4, 8, 16).astype(jnp.float32)
        found = jnp.einsum("wmk,wnk->wmn", a, b, precision="highest")
        found = found.reshape(4, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, THREADS)
        return [old + new for old, new in zip(total, found, strict=True)]

    def shuffled(self, word, mask: int):
        bits = word.reshape(4, 2, 2, 2, 2, 2)
        return lax.rev(bits, [5 - n for n in range(5) if mask >> n & 1]).reshape(THREADS)

    def multiply_add(self, a, b, c):
        return a * b + c

    def exp2(self, word):
        return jnp.exp2(word)

    def log2(self, word):
        return jnp.log2(word)

    def inverse(self, word):
        return 1 / word

    def maximum(self, a, b):
        return jnp.fmax(a, b)

    def where(self, predicate, a, b):
        return jnp.where(predicate, a, b)

    def unless(self, number, change: Callable, words: list) -> list:
        return [jnp.where(number < 1, new, old) for new, old in zip(change(words), words, strict=True)]
