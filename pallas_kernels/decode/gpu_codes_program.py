"""What the warps of the Hopper decoding kernel do with keys and values in 8 or 4 bits: codes are widened in registers.

Both products are transposed, so that codes are the matrix instruction's first operand, of 16 rows, and the few
queries that share a head its second, of 8 columns:

    logits^T [tokens, queries] = keys [tokens, channels] q^T          out^T [channels, queries] = values^T weights^T

Which channels of a token, or of the result, an operand's word has is free where queries, or the result, are in the same order:
a word of four codes of 8 bits or eight of 4 is widened pair by pair with no exchange. Values are read as 2-byte elements,
transposed, so that a word has the same channels of two tokens. Weights come out of the first product as the second one takes
them but for a transposition of 8 x 8 in registers. Codes are multiplied as they are, which is exact; a scale of a token's head is
behind the product with the keys and on the weight of the values, of each block of channels apart where there are several.

Functions are programs of threads (`jaxpar.pallas_kernels.lanes`); `s` is `gpu_codes.Settings`.
"""

from __future__ import annotations

import math
from functools import reduce

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxpar.pallas_kernels import lanes
from jaxpar.pallas_kernels.gpu import LOG2
from jaxpar.pallas_kernels.lanes import CHUNK
from jaxpar.pallas_kernels.lanes.codes import UNIT, widened

TILE = 16
"""Tokens that a warp multiplies at once, and channels of the result."""
COLUMNS = 8
"""Queries that are multiplied at once."""


def query_channels(bits: int, size: int) -> np.ndarray:
    """The channel that the queries' operand has of product, half of it, pair of lanes and number of the pair: [size / 16, 2, 4, 2].
    They are those of `widened` words of the keys."""
    per_word, per_chunk = 32 // bits, 8 * CHUNK // bits
    product, half, pair, e = np.ogrid[: size // TILE, :2, :4, :2]
    chunk, inside = np.divmod(product, per_chunk // TILE)
    return chunk * per_chunk + pair * per_word + 2 * inside + half + e * (per_word // 2)


def operands(s, q_BxGxRxK):
    """Queries as `load_queries` reads them, float32 [B, G, words, 32]: a word is two bfloat16s.

    Args:
      q_BxGxRxK: bfloat16; rows as `Settings.rows`.
    """
    B, G = q_BxGxRxK.shape[:2]
    q = q_BxGxRxK[..., query_channels(s.bits, s.size)]
    # [B, G, column, group, product, half, pair, e]
    q = q.reshape(B, G, s.columns, COLUMNS, *q.shape[3:]).transpose(0, 1, 2, 4, 5, 3, 6, 7)
    return lax.bitcast_convert_type(q, jnp.float32).reshape(B, G, -1, 32)


class _Place:
    """Where a thread is: words."""

    def __init__(self, s, machine):
        thread = machine.thread()
        self.lane, self.warp = thread & 31, thread >> 5
        self.group, self.pair = self.lane >> 2, self.lane & 3
        self.head = self.warp // s.parts
        # The first of this warp's tokens of a step.
        self.token = (self.warp % s.parts) * (s.tokens // s.parts)


def load_queries(s, machine, memories, words, numbers) -> list:
    del words, numbers
    at = _Place(s, machine)
    count = s.columns * s.size // TILE * 2
    return [machine.load(memories[0], (at.head * count + n) * 32 + at.lane) for n in range(count)]


def begin(s, machine, memories, words, numbers) -> list:
    """Words before the first step."""
    del memories, words, numbers
    nothing, none = machine.number(0.0), machine.number(-math.inf)
    return [nothing] * (s.words - 4 * s.columns) + [none] * (2 * s.columns) + [nothing] * (2 * s.columns)


def step(s, machine, memories, words, numbers) -> list:
    """A step of the softmax as it comes: words as `Settings.words`, the queries' operands behind them."""
    k_tile, v_tile, k_numbers, v_numbers = memories
    start, clear, behind, low = numbers
    at = _Place(s, machine)
    sums, tops, totals, queries = _parted(s, machine, words)
    tiles = s.tokens // s.parts // TILE
    # Lanes say where rows of four matrices are: 8 tokens and 8 more, of a chunk, and the same of the next one.
    row = at.token + (at.lane & 15)

    def scale_at(block, token):
        if s.together:
            return token * s.abreast + at.head
        return ((token // s.piece * s.abreast + at.head) * s.blocks + block) * s.piece + token % s.piece

    token_of = lambda tile, below: at.token + at.group + (TILE * tile + 8 * below)

    logits = []
    for tile in range(tiles):
        found = None
        for block, parts in _blocks(s, _keys(s, machine, k_tile, row + TILE * tile, at)):
            fresh = [[machine.number(0.0)] * 4 for _ in range(s.columns)]
            for product, operand in parts:
                for n in range(s.columns):
                    fresh[n] = machine.product(fresh[n], operand, queries[n][product])
            scales = [machine.load(k_numbers, scale_at(block, token_of(tile, below))) for below in (0, 1)]
            scales = [one * (s.scale / UNIT / (1 if s.cap else LOG2)) for one in scales]
            for n in range(s.columns):
                for i in range(4):
                    old = None if found is None else found[n][i]
                    fresh[n][i] = _plus(machine, fresh[n][i], scales[i // 2], old)
            found = fresh
        logits.append(found)
    if s.cap is not None:
        logits = [[[_capped(s, machine, one) for one in four] for four in tile] for tile in logits]
    logits = _masked(s, machine, logits, at, start, clear, behind, low)

    weights = [[[None] * 4 for _ in range(s.columns)] for _ in range(tiles)]
    for n in range(s.columns):
        for e in (0, 1):
            top = tops[n][e]
            for tile in range(tiles):
                for below in (0, 1):
                    top = machine.maximum(top, logits[tile][n][2 * below + e])
            for mask in (4, 8, 16):
                top = machine.maximum(top, machine.shuffled(top, mask))
            # A query that has seen nothing yet has -inf; -inf - -inf would be NaN.
            level = machine.where(top > -math.inf, top, 0.0)
            shrink = machine.exp2(tops[n][e] - level)
            tops[n][e], total = top, totals[n][e] * shrink
            for tile in range(tiles):
                for below in (0, 1):
                    weight = machine.exp2(logits[tile][n][2 * below + e] - level)
                    weights[tile][n][2 * below + e] = weight
                    total = total + weight
            totals[n][e] = total
            for part in sums:
                for below in (0, 1):
                    part[n][2 * below + e] = part[n][2 * below + e] * shrink

    for tile in range(tiles):
        for block, parts in _blocks(s, _values(s, machine, v_tile, row + TILE * tile, at)):
            scales = [machine.load(v_numbers, scale_at(block, token_of(tile, below))) for below in (0, 1)]
            right = [_weights(machine, weights[tile][n], scales) for n in range(s.columns)]
            for product, operand in parts:
                for n in range(s.columns):
                    sums[product][n] = machine.product(sums[product][n], operand, right[n])
    return [word for part in (*sums, tops, totals) for some in part for word in some]


def _parted(s, machine, words):
    """sums [size / 16][column][4], tops and totals [column][2], and the queries' operands, if there, [column][size / 16][2]."""
    queries = [machine.bits(word) for word in words[s.words :]]
    words = iter([*words[: s.words], *queries])
    some = lambda count: [next(words) for _ in range(count)]
    products = range(s.size // TILE)
    sums = [[some(4) for _ in range(s.columns)] for _ in products]
    tops, totals = ([some(2) for _ in range(s.columns)] for _ in range(2))
    return sums, tops, totals, [[some(2) for _ in products] for _ in range(s.columns if queries else 0)]


def _chunks(s, machine, tile, row, at, transposed: bool):
    """(chunk, its word of the first 8 tokens, and of the next 8)"""
    for chunk in range(0, s.chunks, 2):
        column = at.head * s.chunks + (at.lane >> 4) + chunk
        four = machine.matrices(tile, row, column, transposed=transposed)
        yield chunk, four[0], four[1]
        yield chunk + 1, four[2], four[3]


def _keys(s, machine, tile, row, at):
    """(chunk, product, operand) of 16 tokens' keys."""
    for chunk, *two in _chunks(s, machine, tile, row, at, False):
        first, second = (widened(s.bits, machine, word) for word in two)
        for n in range(0, len(first), 2):
            operand = first[n], second[n], first[n + 1], second[n + 1]
            yield chunk, chunk * (len(first) // 2) + n // 2, operand


def _values(s, machine, tile, row, at):
    """(chunk, product, operand) of 16 tokens' values, transposed: the product is the 16 channels of the result."""
    for chunk, *two in _chunks(s, machine, tile, row, at, True):
        first, second = (widened(s.bits, machine, word) for word in two)
        for n in range(0, len(first), 2):
            operand = first[n], first[n + 1], second[n], second[n + 1]
            yield chunk, chunk * (len(first) // 2) + n // 2, operand


def _blocks(s, parts):
    """(block of channels with a scale of its own, its products and operands)"""
    chunks = s.chunks // s.blocks
    found: dict[int, list] = {}
    for chunk, product, operand in parts:
        found.setdefault(chunk // chunks, []).append((product, operand))
    return found.items()


def _plus(machine, a, b, c):
    return a * b if c is None else machine.multiply_add(a, b, c)


def _capped(s, machine, logit):
    # As `gpu.scaled`.
    bent = machine.inverse(machine.exp2(logit * (2 / s.cap / LOG2)) + 1.0)
    return bent * (-2 * s.cap / LOG2) + s.cap / LOG2


def _masked(s, machine, logits, at, start, clear, behind, low):
    """-inf where nothing is seen; untouched where all queries see all of the step.

    Args:
      behind: the token behind the last one that the first query sees.
      low: the first one that it sees.
    """

    def hide(words):
        words, found = iter(words), []
        for tile in range(len(logits)):
            for n in range(s.columns):
                for below in (0, 1):
                    token = start + at.token + at.group + (TILE * tile + 8 * below)
                    for e in (0, 1):
                        query = (at.pair * 2 + (COLUMNS * n + e)) // s.shared
                        seen = (token < behind + query) & (token < s.slots)
                        if s.windowed:
                            seen = seen & (token >= low + query)
                        found.append(machine.where(seen, next(words), -math.inf))
        return found

    flat = iter(machine.unless(clear, hide, [word for tile in logits for four in tile for word in four]))
    return [[[next(flat) for _ in range(4)] for _ in tile] for tile in logits]


def _weights(machine, four, scales) -> tuple:
    """Weights times values' scales as the second operand: [tokens, queries] pairs of which become pairs of tokens."""
    # The scale of what nobody has written may be NaN.
    scaled = [machine.where(four[i] > 0.0, four[i] * scales[i // 2], 0.0) for i in range(4)]
    return tuple(machine.turned(machine.packed(*scaled[2 * below : 2 * below + 2])) for below in (0, 1))


def leave(s, machine, memories, words, numbers) -> list:
    """Write out and lse of the split to global memory; where a head has several warps, sums and marks of each to shared memory."""
    del numbers
    sums_memory, marks = memories
    at = _Place(s, machine)
    sums, tops, totals, _ = _parted(s, machine, words)
    # Of a 2-byte element of the values; channels that a thread has side by side.
    together = CHUNK // s.bits
    for n in range(s.columns):
        for e in (0, 1):
            query, top, total = at.pair * 2 + (COLUMNS * n + e), tops[n][e], totals[n][e]
            for mask in (4, 8, 16):
                total = total + machine.shuffled(total, mask)
            row, here, times = at.warp * s.rows + query, None, None
            if s.parts == 1:
                row, here = at.head * s.there + query, query < s.there
                times, lse = _share(machine, total), _lse(machine, top, total)
                machine.store(marks, row, [lse], here)
            else:
                machine.store(marks, at.warp * (2 * s.rows) + query, [top])
                machine.store(marks, at.warp * (2 * s.rows) + query + s.rows, [total])
            each = [part[n][2 * below + e] for part in sums for below in (0, 1)]
            for first in range(0, len(each), together):
                some = each[first : first + together]
                some = some if times is None else [one * times for one in some]
                channel = at.group * together + first // together * (8 * together)
                machine.store(sums_memory, row * s.size + channel, some, here)
    return []


def _share(machine, total):
    """What sums are multiplied by to be the result."""
    # What has seen a token has at least the weight of its largest logit, 1.
    return machine.inverse(machine.where(total < 0.5, 1.0, total) * UNIT)


def _lse(machine, top, total):
    seen = (machine.log2(machine.where(total < 0.5, 1.0, total)) + top) * LOG2
    return machine.where(total < 0.5, -math.inf, seen)


def merge(s, machine, memories, words, numbers) -> list:
    """Each head's warps as one: out and lse of the split, written to global memory."""
    del words, numbers
    sums, marks, out, lse = memories
    count = s.abreast * s.there

    def whole(row):
        """Where the sums of each of a query's warps are, what they count for, the largest logit and the sum of weights."""
        head, query = row // s.there, row % s.there
        warps = [head * s.parts + n for n in range(s.parts)]
        mark = lambda warp, which: machine.load(marks, (warp * 2 + which) * s.rows + query)
        tops = [mark(warp, 0) for warp in warps]
        top = reduce(machine.maximum, tops)
        level = machine.where(top > -math.inf, top, 0.0)
        shares = [machine.exp2(one - level) for one in tops]
        total = sum_of([mark(warp, 1) * share for warp, share in zip(warps, shares, strict=True)])
        return [(warp * s.rows + query) * s.size for warp in warps], shares, top, total

    sum_of = lambda words: reduce(lambda a, b: a + b, words)
    for first in range(0, count * s.size, lanes.THREADS):
        index = machine.thread() + first
        here = None if first + lanes.THREADS <= count * s.size else index < count * s.size
        index = index if here is None else machine.where(here, index, 0)
        places, shares, _, total = whole(index // s.size)
        parts = [
            machine.load(sums, start + index % s.size) * share for start, share in zip(places, shares, strict=True)
        ]
        machine.store(out, index, [sum_of(parts) * _share(machine, total)], here)
    for first in range(0, count, lanes.THREADS):
        row = machine.thread() + first
        here = row < count
        row = machine.where(here, row, 0)
        *_, top, total = whole(row)
        machine.store(lse, row, [_lse(machine, top, total)], here)
    return []
