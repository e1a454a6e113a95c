"""The frame of the Hopper decoding kernel for keys and values in 8 or 4 bits: what a block copies, and what its warps are given
(`gpu_codes_program`: what they do).

A block is one warpgroup, which copies its steps ahead, and several blocks share a multiprocessor. Each warp has a key/value head
of its own, or a part of a step's tokens where heads are few, and waits for no other one but for its turn to overwrite what
was read. A token's codes of all heads of the block are copied as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import lanes
from jaxpar.pallas_kernels.decode import gpu_codes_program as program
from jaxpar.pallas_kernels.decode.gpu_kernel import place, sources
from jaxpar.pallas_kernels.lanes import CHUNK

WARPS = 4
COLUMNS, TILE = program.COLUMNS, program.TILE


@dataclass(frozen=True)
class Settings:
    """What the kernel knows before it is traced.

    Attributes:
      queries: of a row, T.
      shared: query heads that share a key/value head.
      slots: how many a row can have.
      tokens: of a step.
      piece: tokens that a copy takes: a step's, or a page's.
      page: slots of a page; None: the cache is dense.
      splits: parts that a row's steps are divided into, one after another.
      stages: steps that shared memory holds.
      size: head size.
      bits: of a code, 4 or 8.
      blocks: scales of a head of a token.
      together: whether scales of the block's heads are copied as they lie in memory, those of a token side by side; or those of
        a head's tokens are, as XLA has turned them.
      abreast: key/value heads of a block: 1, 2 or 4.
    """

    scale: float
    cap: float | None
    windowed: bool
    queries: int
    shared: int
    slots: int
    tokens: int
    piece: int
    page: int | None
    splits: int
    stages: int
    size: int
    bits: int
    blocks: int
    together: bool
    abreast: int
    interpret: bool = False

    @property
    def there(self) -> int:
        """Queries that share a head; `rows`: in whole columns of a product."""
        return self.queries * self.shared

    @property
    def rows(self) -> int:
        return -(-self.there // COLUMNS) * COLUMNS

    @property
    def columns(self) -> int:
        return self.rows // COLUMNS

    @property
    def parts(self) -> int:
        """Warps that a head has."""
        return WARPS // self.abreast

    @property
    def width(self) -> int:
        """Bytes of a token's codes."""
        return self.size * self.bits // 8

    @property
    def words(self) -> int:
        """Of a thread, from step to step: sums, and the largest logit and the sum of weights of each of its queries."""
        return self.columns * (4 * self.size // TILE + 4)

    @property
    def chunks(self) -> int:
        """Of a token's codes."""
        return self.width // CHUNK

    @property
    def pieces(self) -> int:
        """Copies of a step."""
        return self.tokens // self.piece

    @property
    def tile(self) -> lanes.Kind:
        """A token's codes of all heads of the block."""
        return lanes.Kind(self.abreast * self.width)


def scratch(s: Settings) -> dict:
    """Shared memory and barriers by name."""
    tile = plgpu.SMEM((s.stages, s.tokens, s.tile.width), jnp.int8, transforms=s.tile.transforms)
    numbers = (s.tokens, s.abreast) if s.together else (s.pieces, s.abreast, s.blocks, s.piece)
    # The largest logit and the sum of weights are marks.
    alone = {"sums": (WARPS, s.rows, s.size), "marks": (WARPS, 2, s.rows)} if s.parts > 1 else {}
    return {
        "k_tile": tile,
        "v_tile": tile,
        "k_numbers": plgpu.SMEM((s.stages, *numbers), jnp.float32),
        "v_numbers": plgpu.SMEM((s.stages, *numbers), jnp.float32),
        **{name: plgpu.SMEM(shape, jnp.float32) for name, shape in alone.items()},
        "ready": plgpu.Barrier(num_arrivals=4 * s.pieces, num_barriers=s.stages),
    }


def decode(s: Settings, names, *refs) -> None:
    """out and lse of some heads' queries over a split of a row."""
    x = place(s, names, refs)

    def run(body, refs, kinds, state, numbers, count):
        bound = lambda *args: body(s, *args)
        return lanes.run(bound, refs, kinds, state, numbers, count, interpret=s.interpret)

    def fetch(n, slot):
        @pl.when(n < x.steps)
        def _():
            ready = x.ready.at[slot]
            heads = pl.ds(x.group * s.abreast, s.abreast)
            bytes_ = pl.ds(x.group * s.tile.width, s.tile.width)
            for n_piece, (first, row, token) in enumerate(sources(s, x, (x.first + n) * s.tokens)):
                here, there = pl.ds(token, s.piece), pl.ds(first, s.piece)
                for name in ("k", "v"):
                    tile, numbers = getattr(x, f"{name}_tile").at[slot], getattr(x, f"{name}_numbers").at[slot]
                    codes, scales = getattr(x, name), getattr(x, f"{name}_scales")
                    plgpu.copy_gmem_to_smem(codes.at[x.base + row, here, bytes_], tile.at[there], ready)
                    if s.together:
                        plgpu.copy_gmem_to_smem(scales.at[x.base + row, here, heads], numbers.at[there], ready)
                    else:
                        plgpu.copy_gmem_to_smem(scales.at[row, heads, :, here], numbers.at[n_piece], ready)

    for n in range(s.stages):
        fetch(n, n)
    per_query = 2 * s.columns * s.size // TILE
    queries = run(
        program.load_queries,
        [x.q.at[x.batch, pl.ds(x.group * s.abreast, s.abreast)]],
        [lanes.NUMBERS],
        [],
        (),
        per_query,
    )
    older = s.queries - 1
    behind, low = x.length - older, x.low - older

    def body(n, state):
        slot, start = lax.rem(n, s.stages), (x.first + n) * s.tokens
        plgpu.barrier_wait(x.ready.at[slot])
        clear = start + s.tokens <= lax.min(behind, s.slots)
        if s.windowed:
            clear = clear & (start >= x.low)
        tiles = [x.k_tile.at[slot], x.v_tile.at[slot], x.k_numbers.at[slot], x.v_numbers.at[slot]]
        kinds = [s.tile, s.tile, lanes.NUMBERS, lanes.NUMBERS]
        numbers = start, clear.astype(jnp.int32), behind, low
        state = run(program.step, tiles, kinds, [state, queries], numbers, s.words)
        # All threads have read what the next copies overwrite.
        plgpu.commit_smem()
        fetch(n + s.stages, slot)
        return state

    state = lax.fori_loop(0, x.steps, body, run(program.begin, [], [], [], (), s.words))
    there = [x.out.at[x.batch, x.group, x.split], x.lse.at[x.batch, x.group, x.split]]
    if s.parts == 1:
        run(program.leave, there, [lanes.NUMBERS] * 2, [state], (), 0)
        return
    run(program.leave, [x.sums, x.marks], [lanes.NUMBERS] * 2, [state], (), 0)
    plgpu.commit_smem()
    run(program.merge, [x.sums, x.marks, *there], [lanes.NUMBERS] * 4, [], (), 0)
