"""What the warps of the Hopper kernel for few rows of x do with weights in 4 or 8 bits: codes are widened in registers.

The transposed product yᵀ = wᵀ · xᵀ is computed, so that codes are the matrix instruction's first operand, of 16 columns of w and 16
values along K, and rows of x its second, of 8 columns. Codes lie along columns in memory; read as 2-byte elements, transposed,
a word has two neighbouring columns of two bytes along K. A byte of 4-bit codes is two neighbours along K, so that a word is a whole
operand of a thread: columns 2 · group and 2 · group + 1, and four values along K each, which are taken in the order 0, 2, 1, 3. Two words
of 8-bit codes are. The scales of a step's group are behind its sum.

Functions are programs of threads (`jaxpar.pallas_kernels.lanes`); `s` is `gpu_codes.Settings`.
"""

from __future__ import annotations

from jaxpar.pallas_kernels import lanes
from jaxpar.pallas_kernels.lanes.codes import UNIT, widened

ROWS = 64
"""Rows of bytes of codes that a warp has of a step."""
TILE = 16
"""Columns of w, and values along K, of a product."""
COLUMNS = 8
"""Rows of x that are multiplied at once."""


class _Place:
    """Where a thread is: words."""

    def __init__(self, machine):
        thread = machine.thread()
        self.lane, self.warp = thread & 31, thread >> 5
        self.group, self.pair = self.lane >> 2, self.lane & 3


def begin(s, machine, memories, words, numbers) -> list:
    """Words before the first step, whose first value along K is `numbers[0]`."""
    del words
    return [machine.number(0.0)] * s.sums + _rows_of_x(s, machine, memories[0], _Place(machine), numbers[0])


def step(s, machine, memories, words, numbers) -> list:
    """Sums [columns of w / 16][rows of x / 8][4] with a step's products, whose first value along K is `numbers[0]`, and behind
    them what the next step has of x."""
    codes, scales, x = memories
    at, (first,) = _Place(machine), numbers
    following = _rows_of_x(s, machine, x, at, first + s.step * s.splits)
    words = iter(words)
    totals = [[next(words) for _ in range(4)] for _ in range(s.sums // 4)]
    operands = [[_operand(s, machine, next(words), next(words)) for _ in range(s.columns)] for _ in range(s.products)]
    group = None
    if s.groups > 1:
        # Of the groups that the step has; behind K any of them.
        group = (first + at.warp * s.depth) // s.group - first // s.group
        group = machine.where(group < s.groups, group, 0)
    found = []
    for tile in range(s.width // TILE):
        sums = [[machine.number(0.0)] * 4 for _ in range(s.columns)]
        for product, operand in enumerate(_weights(s, machine, codes, at, tile)):
            sums = [machine.product(one, operand, operands[product][n]) for n, one in enumerate(sums)]
        here = at.group * 2 + TILE * tile
        here = here if group is None else here + group * s.width
        # Of columns 2 · group and 2 · group + 1 of the tile.
        scale = [machine.load(scales, here + n) * (1 / UNIT) for n in (0, 1)]
        for n, one in enumerate(sums):
            total = totals[tile * s.columns + n]
            found += [machine.multiply_add(one[i], scale[i // 2], total[i]) for i in range(4)]
    return found + following


def _rows_of_x(s, machine, x, at, first) -> list:
    """Two words of each product and eight rows: [product][column][2]."""
    found = []
    for product in range(s.products):
        k = first + at.warp * s.depth + TILE * product
        # Behind K codes are 0, whatever they are multiplied with.
        k = machine.where(k < s.inputs, k, 0)
        for n in range(s.columns):
            row = at.group + COLUMNS * n
            # What rows there are not are multiplied with is not written.
            row = row if s.there % COLUMNS == 0 else machine.where(row < s.there, row, 0)
            start = row * (s.inputs // 2) + k // 2
            if s.bits == 4:
                found += machine.pair(x, start + at.pair * 2)
            else:
                found += [machine.load(x, start + at.pair + TILE // 4 * half) for half in (0, 1)]
    return found


def _operand(s, machine, *two) -> tuple:
    """The second operand: values along K in the order of the first one."""
    a, b = (machine.bits(word) for word in two)
    return (machine.picked(a, b, 0x5410), machine.picked(a, b, 0x7632)) if s.bits == 4 else (a, b)


def _weights(s, machine, codes, at, tile: int):
    """The first operands of a tile of columns, one of each 16 values along K."""
    for rows in range(0, ROWS, 32):
        four = machine.matrices(codes, at.warp * ROWS + at.lane + rows, at.lane * 0 + tile, transposed=True)
        wide = [widened(s.bits, machine, word) for word in four]
        if s.bits == 4:
            yield from ((pairs[0], pairs[2], pairs[1], pairs[3]) for pairs in wide)
        else:
            yield from ((a[0], a[1], b[0], b[1]) for a, b in zip(wide[::2], wide[1::2], strict=True))


def send(s, machine, memories, words, numbers) -> list:
    """Each block of the cluster gets its columns of all sums."""
    del numbers
    at, words = _Place(machine), iter(words[: s.sums])
    for tile in range(s.width // TILE):
        column = at.group * 2 + TILE * tile
        for n in range(s.columns):
            four = [next(words) for _ in range(4)]
            for e in (0, 1):
                row = at.warp * s.rows + at.pair * 2 + (COLUMNS * n + e)
                place = row * s.share + column % s.share
                machine.send(memories[0], column // s.share, place, [four[e], four[2 + e]], s.splits)
    return []


def gather(s, machine, memories, words, numbers) -> list:
    """Add up what all warps of the cluster have sent, and write it, two columns of bfloat16 a word."""
    del words
    sums, out = memories
    half = s.share // 2
    for first in range(0, s.there * half, lanes.THREADS):
        index = machine.thread() + first
        here = index < s.there * half
        index = machine.where(here, index, 0)
        row, column = index // half, index % half
        found = [None, None]
        for worker in range(s.workers):
            place = (row + worker * s.rows) * s.share + column * 2
            for e in (0, 1):
                part = machine.load(sums, place + e)
                found[e] = part if found[e] is None else found[e] + part
        machine.store(out, out.index(row, column), [machine.packed(*found)], here)
    return []
