"""`lanes.Threads`, which stands for a warpgroup's instructions, against the instructions' own tables (PTX ISA 9.0), written out
thread by thread; and that a program written for both machines is the same on a chip, as far as can be seen without one."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxpar.pallas_kernels import lanes
from jaxpar.pallas_kernels.lanes.threads import Array

pytestmark = pytest.mark.quick
MACHINE = lanes.Threads()
WARPS, LANES = range(4), range(32)


def bfloat16(rng, *shape):
    return rng.standard_normal(shape).astype(ml_dtypes.bfloat16)


def words(pairs):
    """uint32 [128] of bfloat16 pairs [128, 2], the first in the lower half."""
    bits = pairs.view(np.uint16).astype(np.uint32)
    return jnp.asarray(bits[:, 0] | bits[:, 1] << 16)


def halves(word):
    """The other way round."""
    word = np.asarray(word)
    return np.stack([word & 0xFFFF, word >> 16], -1).astype(np.uint16).view(ml_dtypes.bfloat16)


def test_products_are_those_of_the_fragments_that_the_instruction_has():
    """Matrix fragments for mma.m16n8k16 with .bf16."""
    rng = np.random.default_rng(0)
    a, b, c = bfloat16(rng, 4, 16, 16), bfloat16(rng, 4, 16, 8), rng.standard_normal((4, 16, 8)).astype(np.float32)
    left, right, total = (
        np.empty((4, 128, 2), ml_dtypes.bfloat16),
        np.empty((2, 128, 2), ml_dtypes.bfloat16),
        np.empty((4, 128)),
    )
    for warp, lane in np.ndindex(4, 32):
        group, inside = lane >> 2, lane % 4
        for i in range(8):
            row = group if i in (0, 1, 4, 5) else group + 8
            column = inside * 2 + (i & 1) + (8 if i >= 4 else 0)
            left[i // 2, 32 * warp + lane, i % 2] = a[warp, row, column]
        for i in range(4):
            row = inside * 2 + (i & 1) + (8 if i >= 2 else 0)
            right[i // 2, 32 * warp + lane, i % 2] = b[warp, row, group]
        for i in range(4):
            total[i, 32 * warp + lane] = c[warp, group + 8 * (i >= 2), inside * 2 + (i & 1)]
    found = MACHINE.product(list(jnp.asarray(total, jnp.float32)), *(list(map(words, some)) for some in (left, right)))
    exact = c + a.astype(np.float64) @ b.astype(np.float64)
    for warp, lane in np.ndindex(4, 32):
        for i in range(4):
            expected = exact[warp, (lane >> 2) + 8 * (i >= 2), lane % 4 * 2 + (i & 1)]
            assert abs(float(found[i][32 * warp + lane]) - expected) < 1e-5


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [32, 64, 256])
def test_matrices_are_loaded_as_ldmatrix_does(width, transposed):
    """Each lane says where a row is; a lane gets two neighbours of a row, or of a column."""
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (40, width)).astype(np.uint8)
    row, chunk = rng.integers(0, 40, 128), rng.integers(0, width // 16, 128)
    memory = Array(jnp.asarray(tile.view(np.int8)), lanes.Kind(width))
    at = (jnp.asarray(one, jnp.int32) for one in (row, chunk))
    found = MACHINE.matrices(memory, *at, transposed=transposed)
    for warp, lane, n in np.ndindex(4, 32, 4):
        rows = [
            tile[row[i], 16 * chunk[i] : 16 * chunk[i] + 16].view(np.uint16)
            for i in range(32 * warp + 8 * n, 32 * warp + 8 * n + 8)
        ]
        matrix = np.stack(rows).T if transposed else np.stack(rows)
        low, high = matrix[lane // 4, 2 * (lane % 4)], matrix[lane // 4, 2 * (lane % 4) + 1]
        assert int(found[n][32 * warp + lane]) == int(low) | int(high) << 16


@pytest.mark.parametrize("width", [32, 64, 128, 256, 512])
def test_places_are_those_of_the_patterns_that_copies_write(width):
    """CUTLASS' Swizzle<1, 4, 3>, <2, 4, 3> and <3, 4, 3>: bits of an address from the fourth on are changed by those from the
    seventh on. Wider tiles are several, one behind another, eight rows at a time; and what eight lanes read lies apart."""
    pattern = min(width, 128)
    mask = {32: 1, 64: 3, 128: 7}[pattern]
    row, chunk = (one.reshape(-1) for one in np.mgrid[:64, : width // 16])
    tile = row // 8 * (width // pattern) + chunk // (pattern // 16)
    plain = tile * 8 * pattern + row % 8 * pattern + chunk % (pattern // 16) * 16
    np.testing.assert_array_equal(lanes.place(row, chunk, width), plain ^ ((plain >> 7 & mask) << 4))
    found = lanes.place(row, chunk, width).reshape(64, -1)
    assert len(np.unique(found)) == found.size
    for first in range(0, 64, 8):
        for column in range(width // 16):
            assert len(set((found[first : first + 8, column] % 128).tolist())) == 8


def test_exchanges_between_lanes():
    word = jnp.arange(128, dtype=jnp.float32)
    for mask in (1, 2, 4, 8, 16, 5, 31):
        np.testing.assert_array_equal(MACHINE.shuffled(word, mask), np.arange(128) ^ mask)
    rows = bfloat16(np.random.default_rng(0), 4, 8, 8)
    found = halves(MACHINE.turned(words(rows.reshape(128, 2)))).reshape(4, 8, 8)
    np.testing.assert_array_equal(found, rows.swapaxes(1, 2))


@pytest.mark.parametrize(
    ("times", "plus"), [(0x7F00, 0xBE00), (0x7D00, 0xBE00), (0x7F00, 0xC000), (0x3F80, 0x0000), (0x3F80, 0x3F80)]
)
def test_fused_multiplication_knows_subnormal_numbers(times, plus):
    """Every bit pattern of a number, codes in the lower eight bits among them. Rounded once, from float64."""
    bits = np.arange(2**16, dtype=np.uint32)
    scale, shift = (float(np.uint16(one).view(ml_dtypes.bfloat16)) for one in (times, plus))
    with np.errstate(all="ignore"):
        exact = (bits << 16).view(np.float32).astype(np.float64) * scale + shift
        # What is left to float32's own rounding is not asked for, nor what it has no room for.
        asked = np.isfinite(exact) & (exact.astype(np.float32) == exact) & (abs(exact) < 2.0**127)
        asked &= (abs(exact) > 2.0**-120) | (exact == 0)
        right = exact.astype(np.float32).astype(ml_dtypes.bfloat16)
    assert asked[:256].all() or plus == 0
    found = np.concatenate(
        [
            halves(MACHINE.fused(jnp.asarray(some * 0x10001), times * 0x10001, plus * 0x10001))
            for some in bits.reshape(-1, 128)
        ]
    )
    assert asked.sum() > 2000
    for half in (0, 1):
        np.testing.assert_array_equal(found[asked, half], right[asked])


def test_packing_rounds_to_nearest_even():
    low, high = np.float32([1.00390625, 1.01171875, -3.3e38, 2.0**-130]), np.float32([0.1, -0.1, 7.0, np.inf])
    given = [jnp.asarray(np.resize(one, 128)) for one in (low, high)]
    found = halves(MACHINE.packed(*given))
    np.testing.assert_array_equal(found[:3, 0], low[:3].astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(found[:4, 1], high.astype(ml_dtypes.bfloat16))
    assert float(MACHINE.maximum(jnp.float32(np.nan), jnp.float32(2))) == 2


class Ref:
    """As the interpreter's references are read and written."""

    def __init__(self, array):
        self.array, self.shape = jnp.asarray(array), array.shape

    def __getitem__(self, index):
        return self.array

    def __setitem__(self, index, value):
        self.array = value


def test_a_program_reads_and_writes_memory_and_carries_words():
    source, to = Ref(np.arange(512, dtype=np.float32)), Ref(np.zeros((2, 128), np.float32))
    state = jnp.arange(256, dtype=jnp.float32)

    def body(machine, memories, some, numbers):
        thread = machine.thread()
        machine.store(memories[1], thread * 2, [some[0], some[1]], thread < numbers[0])
        changed = machine.unless(numbers[1], lambda found: [one * 2.0 for one in found], [some[0]])
        return [machine.load(memories[0], thread * 4 + 1), *changed]

    for flag in (0, 1):
        found = lanes.run(body, [source, to], [lanes.NUMBERS] * 2, [state], (100, flag), 2, interpret=True)
        found = np.asarray(found).reshape(2, 128)
        np.testing.assert_array_equal(found[0], np.arange(128) * 4 + 1)
        np.testing.assert_array_equal(found[1], np.arange(128) * (1 if flag else 2))
    written = np.asarray(to.array).reshape(128, 2)
    np.testing.assert_array_equal(written[:100], np.stack([np.arange(100), 128 + np.arange(100)], -1))
    assert not written[100:].any()
    assert lanes.run(lambda *_: [], [], [], [], (), 0, interpret=True) is None
