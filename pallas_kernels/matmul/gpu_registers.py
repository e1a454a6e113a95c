"""How codes [K, columns] of 4 or 8 bits become the first operand of Hopper's matrix instruction, which it takes from registers.

The instruction wants wᵀ: a thread has pairs of neighbours along K, of two columns eight apart (PTX ISA, "Register Fragments
for wgmma.mma_async.m64nNk16"). Codes lie along columns in memory. A thread reads four columns of a row at once, a word, and
gives them to two products of 64 columns, two each: which column is which row of a product is free, where the result's rows
are put back. A byte of 4-bit codes is a pair along K already; of 8-bit codes two rows make pairs.

    column = 16 · chunk + 4 · (lane / 4 % 4) + 2 · product + half        row of the product = 16 · warp + 8 · half + lane / 4
    chunk  = warp + 4 · (lane / 16)   of 4 bits                          2 · warp + lane / 16   of 8 bits

so that the 32 words that a warp reads lie in different banks of shared memory, in its pattern of 128 bytes.

Functions marked `interpret` say the same to Pallas' interpreter, which has no registers.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from jaxpar.pallas_kernels.gpu import ALONG

COLUMNS = 128
"""Of a warpgroup: two products."""
HALF = 64
"""Of K, of one product's operand in registers."""
UNIT = 2.0**-6
"""What a code of 1 is there."""
CODES = plgpu.RefType((plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(128)))
ROWS = plgpu.RefType((plgpu.TilingTransform((8, HALF)), plgpu.SwizzleTransform(128)))
"""How codes, and x, lie in shared memory: rows of 128 bytes, 16 bytes of which go to place (chunk xor row % 8)."""


def _i32():
    return ir.IntegerType.get_signless(32)


def _c(value: int):
    return utils.c(value, _i32())


def _asm(text: str, constraints: str, *operands, effects=False):
    out = _i32() if constraints.startswith("=") else ir.Type.parse("!llvm.void")
    return llvm.inline_asm(out, list(operands), text, constraints, asm_dialect=0, has_side_effects=effects)


def _place(bits: int):
    """(chunk, first column / 4 in it, lane % 4) of this thread, i32."""
    thread = utils.thread_idx()
    lane = lambda by, size: arith.andi(arith.shrui(thread, _c(by)), _c(size - 1))
    warp, high = lane(5, 4), lane(4, 2)
    chunk = arith.addi(warp, arith.shli(high, _c(2))) if bits == 4 else arith.addi(high, arith.shli(warp, _c(1)))
    return chunk, lane(2, 4), lane(0, 4)


def _at(pointer, offset, kind):
    return llvm.load(kind, utils.getelementptr(pointer, [offset], ir.IntegerType.get_signless(8)))


def _bytes(a, b, selector: int):
    """Four bytes of two words, by a digit each, the lowest first: 0 to 3 of a, 4 to 7 of b; plus 8, its highest bit everywhere."""
    return _asm("prmt.b32 $0, $1, $2, $3;", "=r,r,r,n", a, b, _c(selector))


def _masked(word, those: int, but: int):
    return arith.xori(arith.andi(word, _c(those)), _c(but))


def _pairs(bits: int, words) -> list:
    """Pairs of bfloat16 along K, `UNIT` times codes, of each of four columns.

    A byte n in the lower half of a bfloat16 is n · 2⁻¹³³, from its subnormal numbers on to its first normal ones, which is
    made a number by one multiplication and addition. The codes are so many more than their lowest. What is scarce is the unit
    for bits: it has one instruction for a pair and half of one for a mask.

    Args:
      words: of 4-bit codes one, neighbours along K in a byte; of 8-bit ones two, neighbours along K.
    """
    if bits == 4:
        low = _masked(words[0], 0x0F0F0F0F, 0x08080808)
        # Sixteen times as much.
        high = _masked(words[0], 0xF0F0F0F0 - 2**32, 0x80808080 - 2**32)
        found = [_bytes(low, high, 0x8480 + i * 0x1111) for i in range(4)]
        times, plus = 0x7D007F00, 0xBE00BE00 - 2**32  # 2¹²³ and 2¹²⁷, -8 · UNIT
    else:
        found = [_masked(_bytes(*words, 0x4400 + i * 0x1111), 0x00FF00FF, 0x00800080) for i in range(4)]
        times, plus = 0x7F007F00, 0xC000C000 - 2**32  # -128 · UNIT
    two = ir.VectorType.get((2,), ir.BF16Type.get())
    fused = lambda word: _asm("fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", word, _c(times), _c(plus))
    return [utils.bitcast(fused(word), two) for word in found]


def operand(bits: int, half: int, codes, *, interpret=False):
    """`UNIT` · wᵀ of two products, bfloat16 [64, HALF] each.

    Args:
      half: of the step: 0 or 1.
      codes: a reference to int8 [2 · HALF · bits / 8, COLUMNS] in shared memory.
    """
    if interpret:
        return _interpreted(bits, half, codes[...])
    out = plgpu.ShapeDtypeStruct((64, HALF), jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    def load(ctx, ref):
        del ctx
        pointer = utils.memref_ptr(ref)
        chunk, column, q = _place(bits)
        # Rows of the first and the second word; all others are whole eights below, in the same places.
        first = (
            (q, arith.addi(q, _c(4))) if bits == 4 else (arith.shli(q, _c(1)), arith.ori(arith.shli(q, _c(1)), _c(1)))
        )
        starts = []
        for row in first:
            there = arith.shli(arith.xori(chunk, row), _c(4))
            starts.append(arith.addi(arith.addi(arith.shli(row, _c(7)), there), arith.shli(column, _c(2))))
        word = lambda start, eight: _at(pointer, arith.addi(start, _c(eight * 8 * COLUMNS)), _i32())
        found = []
        for piece in range(HALF // 8):  # eight of K
            eights = half * HALF // 8 + piece
            if bits == 4:
                # Eight bytes along K are sixteen values.
                words = [word(starts[piece % 2], eights // 2)]
            else:
                words = [word(start, eights) for start in starts]
            found.append(_pairs(bits, words))
        layout = plgpu.Layout.WGMMA.to_mgpu()
        shape = layout.registers_shape((64, HALF))
        return tuple(
            mgpu.FragmentedArray(
                _registers=np.array([one[2 * product : 2 * product + 2] for one in found]).reshape(shape),
                _layout=layout,
                _is_signed=None,
            )
            for product in (0, 1)
        )

    return plgpu.inline_mgpu(arg_types=(CODES,), return_type=(out, out))(load)(codes)


def scales(bits: int, ref, *, interpret=False):
    """float32 [64] of the rows of two products, from a reference to [COLUMNS]."""
    if interpret:
        return _products(bits, ref[...])
    out = plgpu.ShapeDtypeStruct((64,), jnp.float32, layout=ALONG)

    def load(ctx, ref):
        del ctx
        chunk, column, _ = _place(bits)
        start = arith.addi(arith.shli(chunk, _c(6)), arith.shli(column, _c(4)))
        f32 = ir.F32Type.get()
        four = _at(utils.memref_ptr(ref), start, ir.VectorType.get((4,), f32))
        layout = ALONG.to_mgpu()
        one = lambda i: utils.vector_slice(four, slice(i, i + 1))
        return tuple(
            mgpu.FragmentedArray(
                _registers=np.array([one(2 * product), one(2 * product + 1)]).reshape(layout.registers_shape((64,))),
                _layout=layout,
                _is_signed=None,
            )
            for product in (0, 1)
        )

    return plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=(out, out))(load)(ref)


def send(bits: int, products, to, rows: int, *, interpret=False) -> None:
    """Two products [64, R] float32 as [R, COLUMNS]: block n of the cluster gets rows n · rows to (n + 1) · rows.

    Args:
      to: a reference to [rows, COLUMNS] in shared memory; the same place in each block's.
    """
    if interpret:
        to[...] = _whole(bits, products)
        return

    def store(ctx, first, second, ref):
        del ctx
        chunk, column, q = _place(bits)
        start = arith.addi(arith.shli(chunk, _c(6)), arith.shli(column, _c(4)))
        base = arith.addi(llvm.ptrtoint(_i32(), utils.memref_ptr(ref)), start)
        parts = [one.registers.reshape(-1, 2) for one in (first, second)]
        for eight in range(parts[0].shape[0]):
            four = [part[eight, half] for part in parts for half in (0, 1)]
            for e in (0, 1):
                row = arith.addi(arith.shli(q, _c(1)), _c(8 * eight + e))
                block = arith.divui(row, _c(rows))
                here = arith.addi(base, arith.muli(arith.remui(row, _c(rows)), _c(4 * COLUMNS)))
                there = _asm("mapa.shared::cluster.u32 $0, $1, $2;", "=r,r,r", here, block)
                values = [llvm.extractelement(pair, _c(e)) for pair in four]
                _asm(
                    "st.shared::cluster.v4.f32 [$0], {$1, $2, $3, $4};",
                    "r,f,f,f,f,~{memory}",
                    there,
                    *values,
                    effects=True,
                )

    layout = plgpu.Layout.WGMMA
    plgpu.inline_mgpu(arg_types=(layout, layout, plgpu.RefType()), return_type=())(store)(*products, to)


def meet() -> None:
    """All threads of the cluster's blocks are here, and what they have sent."""

    def wait(ctx):
        del ctx
        for what in ("arrive.release", "wait.acquire"):
            _asm(f"barrier.cluster.{what}.aligned;", "~{memory}", effects=True)

    plgpu.inline_mgpu(arg_types=(), return_type=())(wait)()


def begin(x, tile, *, interpret=False) -> None:
    """Begin to copy M rows of x, bfloat16 [M, 2 · HALF] in global memory, to `tile`, [2, R, HALF] in shared memory.

    Tensor copies are of eight rows at least, and to pad x to them were a kernel of its own. Other rows of the tile stay what
    they are, which no row that there is sees.
    """
    there, rows = x.shape[0], tile.shape[1]
    if interpret:
        halves = x[...].reshape(there, 2, HALF).swapaxes(0, 1)
        tile[...] = jnp.pad(halves, ((0, 0), (0, rows - there), (0, 0)))
        return

    def copy(ctx, source, to):
        del ctx
        i64 = ir.IntegerType.get_signless(64)
        thread = utils.thread_idx()
        # A thread has 16 bytes of each eighth row.
        row, chunk = arith.andi(arith.shrui(thread, _c(4)), _c(7)), arith.andi(thread, _c(15))
        stride = 2 * ir.MemRefType(source.type).get_strides_and_offset()[0][0]
        start = arith.addi(arith.muli(row, _c(stride)), arith.shli(chunk, _c(4)))
        source = arith.addi(llvm.ptrtoint(i64, utils.memref_ptr(source)), arith.extui(i64, start))
        place = arith.xori(arith.andi(chunk, _c(7)), row)
        half = arith.muli(arith.shrui(chunk, _c(3)), _c(rows * 2 * HALF))
        start = arith.addi(arith.addi(half, arith.shli(row, _c(7))), arith.shli(place, _c(4)))
        to = arith.addi(llvm.ptrtoint(_i32(), utils.memref_ptr(to)), start)
        for eight in range(rows // 8):
            _asm(
                "{ .reg .pred p; setp.lt.u32 p, $2, $3; @p cp.async.cg.shared.global [$0], [$1], 16; }",
                "r,l,r,n,~{memory}",
                arith.addi(to, _c(eight * 8 * 2 * HALF)),
                arith.addi(source, utils.c(eight * 8 * stride, i64)),
                row,
                _c(there - 8 * eight),
                effects=True,
            )

    plgpu.inline_mgpu(arg_types=(plgpu.RefType(), ROWS), return_type=())(copy)(x, tile)


def begun(*, interpret=False) -> None:
    """What was begun since the last call is one group of copies, or none."""
    if not interpret:
        plgpu.inline_mgpu()(lambda ctx: _asm("cp.async.commit_group;", "~{memory}", effects=True) and None)()


def arrived(but: int, *, interpret=False) -> None:
    """Wait until all groups of this warpgroup's copies but the last so many are done, and seen by the matrix unit."""
    if not interpret:
        plgpu.inline_mgpu()(lambda ctx: _asm(f"cp.async.wait_group {but};", "~{memory}", effects=True) and None)()
        plgpu.commit_smem()


def _digits(bits: int):
    """Sizes of a column's digits, and which of them are (product, warp, half, lane / 16, lane / 4 % 4)."""
    return ((2, 4, 4, 2, 2), (3, 1, 4, 0, 2)) if bits == 4 else ((4, 2, 4, 2, 2), (3, 0, 4, 1, 2))


def _products(bits: int, x):
    """[COLUMNS, ...] as two of [64, ...]."""
    sizes, order = _digits(bits)
    rest = tuple(range(5, 4 + x.ndim))
    parts = x.reshape(*sizes, *x.shape[1:]).transpose(*order, *rest).reshape(2, 64, *x.shape[1:])
    return parts[0], parts[1]


def _whole(bits: int, products):
    """Two of [64, R] as [R, COLUMNS]."""
    sizes, order = _digits(bits)
    x = jnp.stack(products).reshape(*(sizes[n] for n in order), -1)
    return x.transpose(*(order.index(n) for n in range(5)), 5).reshape(COLUMNS, -1).T


def _interpreted(bits: int, half: int, codes):
    rows = codes.shape[0] // 2
    codes = codes[half * rows : (half + 1) * rows].astype(jnp.int32)
    if bits == 4:
        codes = jnp.stack([((codes & 15) ^ 8) - 8, codes >> 4], 1).reshape(HALF, COLUMNS)
    return _products(bits, UNIT * codes.astype(jnp.bfloat16).T)
