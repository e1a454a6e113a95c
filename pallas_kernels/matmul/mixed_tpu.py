"""The mixed product for TPUs by Pallas' Mosaic backend: one kernel that walks 4-bit and 8-bit blocks.

COMET (arXiv 2410.12168), section 4, has a kernel for NVIDIA GPUs of an earlier generation, whose matrix units multiply 4-bit
integers. Here a block of K is a step of the grid. Which kind it is stands in scalar memory, as what kinds there are is data:
the step's integers are multiplied as int4 or as int8, summed in int32, and added to a float32 sum with the scales of their
block. 4-bit weights are read as they are packed; the channels of x are ordered as a byte holds those of w, even ones first.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpar.pallas_kernels import versions
from jaxpar.pallas_kernels.formats.quantised import Quantised
from jaxpar.pallas_kernels.matmul.mosaic_tpu import LANES, ROWS, MatmulTiles, four_bits
from jaxpar.pallas_kernels.tiles import Row, look_up

LARGEST_BLOCK = 1024
"""Of K, which is a step."""
TABLE = (
    Row(MatmulTiles(64, 1024, 0), most=(("rows", 64),)),
    Row(MatmulTiles(512, 512, 0)),
)
"""Block sizes by the rows of x; along K a step is a block of the format's. That they compile for every chip is tested; which
are fastest has not been measured."""


def misfit(x, scales_x, w: Quantised, eight) -> str | None:
    """Why the kernel cannot do a product, as the end of a sentence; None where it can.

    Args:
      x: int8 [M, K]; scales_x: float32 [M, blocks]; w: [K, N]; eight: bool [blocks].
    """
    (K, N), blocks = w.shape, eight.shape[0]
    block = K // blocks
    if not four_bits(w):
        return f"takes w in int4, got {w.format.name}"
    if N % LANES or block % LANES or block > LARGEST_BLOCK:
        return (
            f"takes N that is a multiple of {LANES} and blocks of {LANES} to {LARGEST_BLOCK} channels, multiples of {LANES}, "
            f"got {N} and {block}"
        )
    return None


def mixed_mosaic_tpu(x_MxK, scales_x, w: Quantised, eight, *, interpret=False, tiles: MatmulTiles | None = None):
    """Σ over blocks of (Σ over a block of x · w, in int32) · their scales: float32 [M, N].

    Args:
      x_MxK: int8, within ±7 in blocks that are not `eight`.
      scales_x: float32 [M, blocks].
      interpret: True, or `pltpu.InterpretParams`, to run in an interpreter.
      tiles: instead of those of the table.
    """
    (M, K), N, blocks = x_MxK.shape, w.shape[1], eight.shape[0]
    tiles = look_up(TABLE, versions.device_kind("tpu"), rows=M) if tiles is None else tiles
    rows = min(_up(tiles.rows, ROWS), _up(M, ROWS))
    columns = max(n for n in range(LANES, max(tiles.columns, LANES) + 1, LANES) if N % n == 0)
    block, whole = K // blocks, _up(M, rows)
    padded = lambda x: jnp.pad(x, ((0, whole - M), (0, 0)))
    # Even channels of a block, then its odd ones: what the low and the high halves of the codes are multiplied with.
    x = padded(x_MxK).reshape(whole, blocks, block // 2, 2).swapaxes(2, 3).reshape(whole, K)
    arrays = (
        eight.astype(jnp.int32),
        x,
        jax.lax.bitcast_convert_type(w.codes, jnp.int8),
        padded(scales_x).T[:, :, None],
        jnp.broadcast_to(w.scales, (blocks, N))[:, None, :],
    )
    run = pl.pallas_call(
        partial(kernel, bool(interpret)),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(whole // rows, N // columns, blocks),
            in_specs=[
                pl.BlockSpec((rows, block), lambda m, n, k, eight: (m, k)),
                pl.BlockSpec((block // 2, columns), lambda m, n, k, eight: (k, n)),
                pl.BlockSpec((None, rows, 1), lambda m, n, k, eight: (k, m, 0)),
                pl.BlockSpec((None, 1, columns), lambda m, n, k, eight: (k, 0, n)),
            ],
            out_specs=pl.BlockSpec((rows, columns), lambda m, n, k, eight: (m, n)),
        ),
        out_shape=versions.out_shape((whole, N), jnp.float32, *arrays),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
    )
    return run(*arrays)[:M]


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def kernel(interpret: bool, eight, x, codes, scales_x, scales_w, out):
    """One block: x int8 [rows, block], codes int8 [block/2, columns]. The sum stays in `out` over the blocks."""
    k = pl.program_id(2)

    @pl.when(k == 0)
    def start():
        out[...] = jnp.zeros_like(out)

    def add(kind):
        both = codes[...].astype(jnp.int32)
        # Each half to the top, and back with copies of its sign.
        w = jnp.concatenate([((both << shift) >> 28).astype(jnp.int8) for shift in (28, 24)], axis=0)
        operands = x[...].astype(kind), w.astype(kind)
        if interpret:
            # What an interpreter runs on has no product of int4; what int4 holds of a number is the same.
            operands = (operand.astype(jnp.int8) for operand in operands)
        whole = jax.lax.dot(*operands, preferred_element_type=jnp.int32)
        out[...] += whole.astype(jnp.float32) * scales_x[...] * scales_w[...]

    pl.when(eight[k] != 0)(partial(add, jnp.int8))
    pl.when(eight[k] == 0)(partial(add, jnp.int4))
