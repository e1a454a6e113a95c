"""The body of the products of a 16-bit x for Hopper GPUs, and what it shares with `gpu_eight`.

A block has two warpgroups that multiply and one that feeds them: it copies the tiles of the next steps along K into shared
memory as places get free. The two share what they can: rows of one block of w in `gpu_eight`, and of one block of x here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.gpu import ACROSS

COMPUTE = 2
"""Warpgroups that multiply; the next one feeds them."""
STEP = 128
"""Of K: a step's bytes of 8-bit operands are a row of shared memory's widest pattern."""
HALF = STEP // 2
"""Of K: a step's 16-bit operands are two such rows."""
CHUNK = 64
"""Columns of the result that leave together."""
REGISTERS, FEEDER_REGISTERS = 232, 40
"""Of a thread that multiplies, and of one that feeds: 65536 in all."""


@dataclass(frozen=True)
class Settings:
    """What a kernel knows before it is traced.

    Attributes:
      rows: of a warpgroup's tile of the result, 64 or 128.
      columns: of a warpgroup's tile of the result, 64, 128 or 256 (`gpu_eight`).
      stages: how many steps the feeder may be ahead.
      steps: along K.
      dtype: of the result.
      operand: of what the matrix unit multiplies in `gpu_eight`: int8 or float8.
      group: values along K that share a scale of w, in `sixteen`.
      bits: of w's codes in `sixteen`: 4 or 8.
      interpret: whether the kernel will run in the interpreter.
    """

    rows: int
    columns: int
    stages: int
    steps: int
    dtype: Any
    operand: Any = None
    group: int = 0
    bits: int = 8
    interpret: bool = False

    @property
    def pieces(self) -> tuple[int, ...]:
        """Where the rows of each matrix instruction begin."""
        return tuple(range(0, self.rows, gpu.ROWS))

    @property
    def out_slots(self) -> int:
        """Chunks of the result on their way out. Two of float32 would take the place of a step."""
        return 2 if jnp.dtype(self.dtype).itemsize == 2 else 1

    def out_tile(self):
        return plgpu.SMEM((COMPUTE, self.out_slots, gpu.ROWS, CHUNK), self.dtype)


def place(names, refs) -> SimpleNamespace:
    """References by name, and where this warpgroup is."""
    x = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    x.row, x.column, x.warpgroup = (lax.axis_index(n) for n in ("row", "column", "warpgroup"))
    return x


def roles(x, multiply, feed) -> None:
    """Which warpgroups do what."""
    gpu.roles(x.warpgroup, COMPUTE, multiply, feed, (REGISTERS, FEEDER_REGISTERS))


def feed(x, settings: Settings, copies) -> None:
    """Copy the tiles of each step when their place is free. `copies(step, slot)`: pairs of global and shared memory."""

    @pl.loop(0, settings.steps)
    def _(step):
        slot = lax.rem(step, settings.stages)

        @pl.when(step >= settings.stages)
        def _():
            plgpu.barrier_wait(x.used.at[slot])

        for source, to in copies(step, slot):
            plgpu.copy_gmem_to_smem(source, to, x.ready.at[slot])


def barriers(settings: Settings, copies: int) -> dict:
    """`ready`: a step's tiles are there. `used`: both warpgroups are done with them."""
    return {
        "ready": plgpu.Barrier(num_arrivals=copies, num_barriers=settings.stages),
        "used": plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=settings.stages),
    }


def write(x, settings: Settings, pieces, out, first_row, first_column) -> None:
    """A warpgroup's tile of the result, chunk by chunk."""
    chunks = [(n, start) for n in range(len(pieces)) for start in range(0, settings.columns, CHUNK)]
    for count, (n, start) in enumerate(chunks):
        tile = x.out_tile.at[x.warpgroup, count % settings.out_slots]
        if count >= settings.out_slots:
            plgpu.wait_smem_to_gmem(settings.out_slots - 1, wait_read_only=True)
        tile[...] = pieces[n][:, start : start + CHUNK].astype(settings.dtype)
        plgpu.commit_smem()
        to = out.at[pl.ds(first_row + n * gpu.ROWS, gpu.ROWS), pl.ds(first_column + start, CHUNK)]
        plgpu.copy_smem_to_gmem(tile, to)
    plgpu.wait_smem_to_gmem(0)


def sixteen_scratch(settings: Settings) -> dict:
    rows, columns, stages = settings.rows, settings.columns, settings.stages
    codes = settings.bits // 4
    return {
        "x_tile": plgpu.SMEM((stages, 2, rows, HALF), jnp.bfloat16),
        "codes_tile": plgpu.SMEM((stages, COMPUTE, codes, HALF, columns), jnp.int8),
        "w_scales": plgpu.SMEM((stages, COMPUTE, columns), jnp.float32),
        "wide": plgpu.SMEM((COMPUTE, 2, HALF, columns), jnp.bfloat16),
        "out_tile": settings.out_tile(),
        **barriers(settings, 2 + COMPUTE * (codes + 1)),
    }


def values(settings: Settings, codes: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """The two halves of a step's weights, bfloat16 [HALF, columns], from its int8 codes.

    A byte of 4-bit codes is 16 · high + low, with high signed and low + 8 its lower bits but for the sign bit turned: single
    operations on four bytes, where shifts would go byte by byte. All of it is exact.
    """
    if settings.bits == 8:
        return tuple(part.astype(jnp.bfloat16) for part in codes)
    (both,) = codes
    low = ((both & 15) ^ 8).astype(jnp.bfloat16) - 8
    high = (both & -16).astype(jnp.bfloat16) * 0.0625
    return low, high


def sixteen(settings: Settings, names, *refs) -> None:
    """`x [M, K] · w [K, N]`, x in bfloat16 and w in 4 or 8 bits with a scale for each group of values along K.

    The codes of a step are widened from shared memory to shared memory and multiplied as they are; the scales of their group
    are behind the step's sum.
    """
    x = place(names, refs)
    rows, columns, parts = settings.rows, settings.columns, settings.bits // 4
    shape = (gpu.ROWS, columns)

    def step(n, totals):
        slot = lax.rem(n, settings.stages)
        plgpu.barrier_wait(x.ready.at[slot])
        codes = [
            gpu.load(x.codes_tile.at[slot, x.warpgroup, part], plgpu.Layout.WGMMA_UPCAST_4X) for part in range(parts)
        ]
        for half, part in enumerate(values(settings, codes)):
            x.wide.at[x.warpgroup, half][...] = part
        plgpu.commit_smem()

        def product(start, total_ref):
            for half in range(2):
                a = x.x_tile.at[slot, half, pl.ds(start, gpu.ROWS)]
                plgpu.wgmma(total_ref, a, x.wide.at[x.warpgroup, half])
            plgpu.wgmma_wait(0)
            return total_ref[...]

        def added(total, start):
            part = pl.run_scoped(partial(product, start), plgpu.ACC(shape, jnp.float32))
            scales = gpu.load(x.w_scales.at[slot, x.warpgroup], ACROSS)
            return total + part * lax.broadcast_in_dim(scales, shape, [1])

        totals = [added(total, start) for total, start in zip(totals, settings.pieces, strict=True)]
        # The scales were read as copies do not read; one may follow.
        plgpu.commit_smem()
        plgpu.barrier_arrive(x.used.at[slot])
        return totals

    def multiply():
        totals = lax.fori_loop(0, settings.steps, step, [gpu.zeros(shape) for _ in settings.pieces])
        first_column = (x.column * COMPUTE + x.warpgroup) * columns
        write(x, settings, totals, x.out, x.row * rows, first_column)

    def copies(k, slot):
        for half, source in enumerate((x.x_first, x.x_second)):
            # Of 4-bit weights the halves are the even and the odd channels, of 8-bit ones half of a step each.
            at = k * HALF if settings.bits == 4 else k * STEP + half * HALF
            yield source.at[pl.ds(x.row * rows, rows), pl.ds(at, HALF)], x.x_tile.at[slot, half]
        for w in range(COMPUTE):
            here = pl.ds((x.column * COMPUTE + w) * columns, columns)
            for part in range(parts):
                yield x.codes.at[pl.ds((k * parts + part) * HALF, HALF), here], x.codes_tile.at[slot, w, part]
            yield x.scales.at[lax.div(k * STEP, settings.group), here], x.w_scales.at[slot, w]

    roles(x, multiply, lambda: feed(x, settings, copies))
