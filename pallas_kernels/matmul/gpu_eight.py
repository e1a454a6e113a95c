"""The 8-bit product for Hopper GPUs: what the blocks of a cluster and their warpgroups do.

cluster     blocks that run together share the rows of a and of b that they have in common: each copies its part of them
            from the second-level cache and sends it to all. A place is free when the last of them is done with it
block       stays, and goes from tile to tile of the result: its feeder is at the next tile while the last one is written
warpgroup   begins a step's product before the one before it is done, whose place it frees a step later
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.gpu import ACROSS, ALONG
from jaxpar.pallas_kernels.matmul.gpu_kernels import CHUNK, COMPUTE, STEP, Settings, roles

PLACE = ROW, COLUMN = "cluster_row", "cluster_column"
"""A block's place in its cluster: blocks of a column have rows of b in common, those of a row have rows of a."""
SPAN = 128
"""Columns of a product of float8: its sum is in registers beside the float32 one, and of 256 there is no room for both."""


@dataclass(frozen=True)
class Eight(Settings):
    """`Settings`, and of the blocks:

    Attributes:
      cluster: blocks along the rows, and along the columns, of the result that share their copies.
      tiles: what clusters make, along the rows and along the columns of the result.
      clusters: that run; each makes every so manieth tile.
      band: along the rows, tiles that are made before the next ones along the columns.
    """

    cluster: tuple[int, int] = (1, 1)
    tiles: tuple[int, int] = (1, 1)
    clusters: int = 1
    band: int = 1

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """Where the sums of a warpgroup's float8 products begin, [ROWS, SPAN] or narrower each."""
        return tuple((row, column) for row in self.pieces for column in range(0, self.columns, SPAN))


def eight_scratch(settings: Eight) -> dict:
    rows, columns, stages = settings.rows, settings.columns, settings.stages
    scratch = {
        "a_tile": plgpu.SMEM((stages, COMPUTE, rows, STEP), settings.operand),
        "b_tile": plgpu.SMEM((stages, columns, STEP), settings.operand),
        "a_scales": plgpu.SMEM((COMPUTE, rows), jnp.float32),
        "b_scales": plgpu.SMEM((columns,), jnp.float32),
        "out_tile": settings.out_tile(),
        "scales_ready": plgpu.Barrier(num_arrivals=COMPUTE + 1),
        "scales_used": plgpu.Barrier(num_arrivals=COMPUTE),
        "ready": plgpu.Barrier(num_arrivals=COMPUTE + 1, num_barriers=stages),
        # Those of all blocks that this one's copies go to, and whose copies come here: of its row and its column.
        "used": plgpu.ClusterBarrier(collective_axes=PLACE, num_arrivals=COMPUTE, num_barriers=stages),
    }
    if settings.interpret:
        # It copies a block's tiles by itself: that no block goes on without its neighbours' part must be said there.
        scratch["sent"] = plgpu.ClusterBarrier(collective_axes=PLACE, num_arrivals=1, num_barriers=stages)
    return scratch


def eight(settings: Eight, names, *refs) -> None:
    """`a [M, K] · b [N, K]ᵀ` of 8-bit operands, and at the end the scales of rows `a` and of rows `b`.

    Integers are summed in int32 by the matrix unit from beginning to end. Its sums of float8 have fewer bits than float32
    has (DeepSeek-V3, arXiv 2412.19437, section 3.3.2): each step's is added to a float32 one.
    """
    x = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    x.cluster, x.warpgroup = lax.axis_index("cluster"), lax.axis_index("warpgroup")
    place = [lax.axis_index(name) for name in PLACE]
    rows, columns, steps = settings.rows, settings.columns, settings.steps
    count = lax.div(settings.tiles[0] * settings.tiles[1] - 1 - x.cluster, settings.clusters) + 1
    slot_of = lambda step: lax.rem(step, settings.stages)

    def arrived(slot):
        """Wait for what the blocks of the cluster copy to this place."""
        plgpu.barrier_wait(x.ready.at[slot])
        if settings.interpret:
            plgpu.barrier_wait(x.sent.at[slot])

    def each_tile(make):
        """`make(n, row, column)` of this block's n-th tile, which begins at this row and this column."""

        @pl.loop(0, count)
        def _(n):
            found = plgpu.planar_snake(x.cluster + n * settings.clusters, settings.tiles, 0, settings.band)
            row, column = (at * size + here for at, size, here in zip(found, settings.cluster, place, strict=True))
            make(n, row * COMPUTE * rows, column * columns)

    def whole(first, total_ref):
        """The sum of a tile whose steps begin with `first`, in int32."""

        def begin(step):
            slot = slot_of(step)
            arrived(slot)
            plgpu.wgmma(total_ref, x.a_tile.at[slot, x.warpgroup], x.b_tile.at[slot].transpose((1, 0)))

        begin(first)

        @pl.loop(1, steps)
        def _(n):
            begin(first + n)
            plgpu.wgmma_wait(1)
            plgpu.barrier_arrive(x.used.at[slot_of(first + n - 1)])

        total = total_ref[...]
        plgpu.barrier_arrive(x.used.at[slot_of(first + steps - 1)])
        return total

    def in_parts(first) -> list[jax.Array]:
        """The sums of a tile whose steps begin with `first`, part by part, in float32."""
        span = min(columns, SPAN)

        def step(n, totals):
            slot = slot_of(first + n)
            arrived(slot)
            for i, (row, column) in enumerate(settings.parts):
                a = x.a_tile.at[slot, x.warpgroup, pl.ds(row, gpu.ROWS)]
                b = x.b_tile.at[slot, pl.ds(column, span)]
                totals[i] = totals[i] + gpu.mma((gpu.ROWS, span), a, b, transposed=True)
            plgpu.barrier_arrive(x.used.at[slot])
            return totals

        return lax.fori_loop(0, steps, step, [gpu.zeros((gpu.ROWS, span)) for _ in settings.parts])

    def multiply():
        @each_tile
        def _(n, row, column):
            if jnp.issubdtype(settings.operand, jnp.integer):
                totals = {
                    (0, 0): pl.run_scoped(lambda ref: whole(n * steps, ref), plgpu.ACC((rows, columns), jnp.int32))
                }
            else:
                totals = dict(zip(settings.parts, in_parts(n * steps), strict=True))
            plgpu.barrier_wait(x.scales_ready)
            write(x, settings, totals, row + x.warpgroup * rows, column)
            # The scales were read as copies do not read; the next tile's may follow.
            plgpu.commit_smem()
            plgpu.barrier_arrive(x.scales_used)

        plgpu.wait_smem_to_gmem(0)

    def feed():
        @each_tile
        def _(n, row, column):
            a_rows = [pl.ds(row + w * rows, rows) for w in range(COMPUTE)]
            b_rows = pl.ds(column, columns)

            @pl.loop(0, steps)
            def _(k):
                step, along = n * steps + k, pl.ds(k * STEP, STEP)
                slot = slot_of(step)

                @pl.when(step >= settings.stages)
                def _():
                    plgpu.barrier_wait(x.used.at[slot])

                ready = x.ready.at[slot]
                for w, here in enumerate(a_rows):
                    plgpu.copy_gmem_to_smem(x.a.at[here, along], x.a_tile.at[slot, w], ready, collective_axes=COLUMN)
                plgpu.copy_gmem_to_smem(x.b.at[b_rows, along], x.b_tile.at[slot], ready, collective_axes=ROW)
                if settings.interpret:
                    plgpu.barrier_arrive(x.sent.at[slot])

            # Behind this tile's steps, none of which waits for it: the last tile's are read when its steps are done.
            @pl.when(n > 0)
            def _():
                plgpu.barrier_wait(x.scales_used)

            for w, here in enumerate(a_rows):
                plgpu.copy_gmem_to_smem(x.scales_a.at[here], x.a_scales.at[w], x.scales_ready)
            plgpu.copy_gmem_to_smem(x.scales_b.at[b_rows], x.b_scales, x.scales_ready)

        # A block must not end while others of its cluster still tell it that they are done.
        @pl.loop(lax.max(count * steps - settings.stages, 0), count * steps)
        def _(step):
            plgpu.barrier_wait(x.used.at[slot_of(step)])

        plgpu.barrier_wait(x.scales_used)

    roles(x, multiply, feed)


def write(x, settings: Eight, totals: dict, first_row, first_column) -> None:
    """A warpgroup's tile of the result, chunk by chunk, from sums by the row and the column that they begin with."""
    shape = (gpu.ROWS, CHUNK)
    chunks = [
        (row, column, total[i : i + gpu.ROWS, j : j + CHUNK])
        for (top, left), total in totals.items()
        for row, i in ((top + i, i) for i in range(0, total.shape[0], gpu.ROWS))
        for column, j in ((left + j, j) for j in range(0, total.shape[1], CHUNK))
    ]
    for count, (row, column, total) in enumerate(chunks):
        along = gpu.load(x.a_scales.at[x.warpgroup, pl.ds(row, gpu.ROWS)], ALONG)
        across = gpu.load(x.b_scales.at[pl.ds(column, CHUNK)], ACROSS)
        scaled = total.astype(jnp.float32) * lax.broadcast_in_dim(along, shape, [0])
        scaled = scaled * lax.broadcast_in_dim(across, shape, [1])
        tile = x.out_tile.at[x.warpgroup, count % settings.out_slots]
        # Of the tile before this one, too.
        plgpu.wait_smem_to_gmem(settings.out_slots - 1, wait_read_only=True)
        tile[...] = scaled.astype(settings.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, x.out.at[pl.ds(first_row + row, gpu.ROWS), pl.ds(first_column + column, CHUNK)])
