"""Quantised products for TPUs by Pallas' Mosaic backend: W8A8 in integers, and W4A16 with weights unpacked in VMEM.

    W8A8    int8 · int8 summed in int32 in VMEM over blocks of K, exactly; scales of rows and columns at the end
    W4A16   4-bit weights are read as they are packed, unpacked to the compute dtype with the scales of their groups in VMEM, and
            multiplied there: a quarter of bfloat16's bytes are read, and as many operations done

A byte holds the weights of two neighbours along K. Rather than to interleave them again, which a TPU is slow at, the even
and the odd channels of x are multiplied with the low and the high halves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpar.pallas_kernels import versions
from jaxpar.pallas_kernels.formats.elements import Int
from jaxpar.pallas_kernels.formats.quantised import Quantised
from jaxpar.pallas_kernels.formats.scales import Float32
from jaxpar.pallas_kernels.matmul.products import integer, integers, operands_name
from jaxpar.pallas_kernels.tiles import Row, look_up

LANES = 128
LARGEST_GROUP = 1024
LARGEST_WHOLE = 4096
"""Of K that is not cut into blocks."""
ROWS = 32
"""Rows of an int8 tile: of bfloat16 and float32 they are fewer, and divide it."""


@dataclass(frozen=True)
class MatmulTiles:
    """The largest blocks of M, N and K."""

    rows: int
    columns: int
    sums: int


TABLE = (
    Row(MatmulTiles(64, 512, 1024), most=(("rows", 64),)),
    Row(MatmulTiles(256, 256, 512)),
)
"""Block sizes by the rows of x. That they compile for every chip is tested; which are fastest has not been measured."""


def misfit(a, b, axes, dtype) -> str | None:
    """Why no kernel multiplies these operands, as the end of a sentence; None where one does."""
    if tuple(axes) != (-1, -2):
        return "multiplies x [M, K] with w [K, N], each quantised along K"
    K, N = b.shape
    if N % LANES or K % LANES:
        return f"takes K and N that are multiples of {LANES}, got {K} and {N}"
    if integer(a) and integer(b):
        scales = [name for name, q, axis in (("x", a, -1), ("w", b, -2)) if q.scales.shape[axis] != 1]
        if scales or a.format.element.bits != 8 or b.format.element.bits != 8:
            return f"takes int8 with a scale a row or tensor, got {a.format.name} and {b.format.name}"
        return None
    if isinstance(a, Quantised):
        return f"takes x in the compute dtype or in int8 with w in int8, got {a.format.name}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes x in bfloat16 or float32, got {jnp.dtype(dtype)}"
    if not (isinstance(b, Quantised) and four_bits(b)):
        return f"takes w in int4, got {b.format.name if isinstance(b, Quantised) else b.dtype}"
    group = K // b.scales.shape[-2]
    if group % 32 or group > LARGEST_GROUP or b.scales.shape[-1] != N:
        return f"takes groups of 32 to {LARGEST_GROUP} values, multiples of 32, got {b.format.name} with {group}"
    step = math.lcm(group, 2 * LANES)
    if K % step and K > LARGEST_WHOLE:
        return f"takes K = {K} with groups of {group} where it is a multiple of {step} or at most {LARGEST_WHOLE}"
    return None


def four_bits(q: Quantised) -> bool:
    return isinstance(q.format.element, Int) and q.format.element.bits == 4 and isinstance(q.format.scale, Float32)


def product_mosaic_tpu(a, b: Quantised, dtype, *, interpret=False, tiles: MatmulTiles | None = None) -> jax.Array:
    """`products.product` of x [M, K] and w [K, N], in `dtype`.

    Args:
      interpret: True, or `pltpu.InterpretParams`, to run in an interpreter.
      tiles: instead of those of the table.
    """
    M, (K, N) = a.shape[0], b.shape
    if tiles is None:
        sizes = dict(rows=M, columns=N, sums=K)
        op = "quant_matmul", "mosaic_tpu"
        tiles = look_up(TABLE, versions.device_kind("tpu"), op=op, dtype=operands_name(a, b, dtype), **sizes)
    rows = min(_up(tiles.rows, ROWS), _up(M, ROWS))
    padded = lambda x: jnp.pad(x, ((0, _up(M, rows) - M), (0, 0)))
    # Blocks of K are whole groups; even and odd channels are half of one each, in whole lanes.
    step = LANES if isinstance(a, Quantised) else math.lcm(K // b.scales.shape[-2], 2 * LANES)
    block = (rows, _divisor(N, tiles.columns, LANES), _divisor(K, tiles.sums, step))
    run = partial(_run, block=block, interpret=interpret, dtype=dtype)
    if isinstance(a, Quantised):
        scales_a = jnp.broadcast_to(a.scales, (M, 1))
        scales_b = jnp.broadcast_to(b.scales, (1, N))
        return run(padded(integers(a)), integers(b), padded(scales_a), scales_b)[:M]
    # Even channels, odd channels: what the low and the high halves of the codes are multiplied with.
    even, odd = (padded(a.astype(dtype).reshape(M, K // 2, 2)[:, :, i]) for i in (0, 1))
    return run((even, odd), jax.lax.bitcast_convert_type(b.codes, jnp.int8), None, b.scales)[:M]


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _divisor(size: int, most: int, step: int) -> int:
    """The largest divisor of `size` that is a multiple of `step` and at most `most`, or one step; without any, `size`."""
    return max((n for n in range(step, max(most, step) + 1, step) if size % n == 0), default=size)


def _run(x, w, scales_x, scales_w, *, block, interpret, dtype):
    rows, columns, sums = block
    if scales_x is None:
        (M, K), N = x[0].shape, w.shape[1]
        K *= 2
        group = 2 * w.shape[0] // scales_w.shape[0]
        inputs = [pl.BlockSpec((rows, sums // 2), lambda m, n, k: (m, k))] * 2
        inputs += [
            pl.BlockSpec((sums // 2, columns), lambda m, n, k: (k, n)),
            pl.BlockSpec((None, sums // group, columns), lambda m, n, k: (k, 0, n)),
        ]
        # Those of a block of K are a matrix of their own: rows of one could not be cut where they are no whole tile.
        scales_w = scales_w.reshape(K // sums, sums // group, N)
        kernel, arrays, kind = four_kernel, (*x, w, scales_w), jnp.float32
    else:
        (M, K), N = x.shape, w.shape[1]
        inputs = [
            pl.BlockSpec((rows, sums), lambda m, n, k: (m, k)),
            pl.BlockSpec((sums, columns), lambda m, n, k: (k, n)),
            pl.BlockSpec((rows, 1), lambda m, n, k: (m, 0)),
            pl.BlockSpec((1, columns), lambda m, n, k: (0, n)),
        ]
        kernel, arrays, kind = eight_kernel, (x, w, scales_x, scales_w), jnp.int32
    return pl.pallas_call(
        kernel,
        grid=(M // rows, N // columns, K // sums),
        in_specs=inputs,
        out_specs=pl.BlockSpec((rows, columns), lambda m, n, k: (m, n)),
        out_shape=versions.out_shape((M, N), dtype, *arrays),
        scratch_shapes=[pltpu.VMEM((rows, columns), kind)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )(*arrays)


def eight_kernel(x, w, scales_x, scales_w, out, total):
    """One block of K: x [rows, sums] and w [sums, columns] int8; total int32."""

    @pl.when(pl.program_id(2) == 0)
    def start():
        total[...] = jnp.zeros_like(total)

    total[...] += jax.lax.dot(x[...], w[...], preferred_element_type=jnp.int32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def end():
        out[...] = (total[...].astype(jnp.float32) * scales_x[...] * scales_w[...]).astype(out.dtype)


def four_kernel(even, odd, codes, scales, out, total):
    """One block of K: even and odd [rows, sums/2] of x, codes int8 [sums/2, columns], scales float32 [groups, columns]; total
    float32."""
    k, groups, (pairs, columns) = pl.program_id(2), scales.shape[0], codes.shape

    @pl.when(k == 0)
    def start():
        total[...] = jnp.zeros_like(total)

    both = codes[...].astype(jnp.int32)
    for x, shift in ((even, 28), (odd, 24)):
        # The half to the top, and back with copies of its sign.
        whole = ((both << shift) >> 28).astype(jnp.float32)
        values = (whole.reshape(groups, pairs // groups, columns) * scales[...][:, None, :]).reshape(pairs, columns)
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        total[...] += jax.lax.dot(
            x[...], values.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32
        )

    @pl.when(k == pl.num_programs(2) - 1)
    def end():
        out[...] = total[...].astype(out.dtype)
