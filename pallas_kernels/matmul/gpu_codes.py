"""The frame of the Hopper kernel for few rows of x and weights in 4 or 8 bits: what a block copies, and what its warps are given
(`gpu_codes_program`: what they do).

A block is one warpgroup and has 64 or 128 columns of w; several share a multiprocessor. It copies the codes and scales of its steps
along K ahead, and each of its warps sums a quarter of each step. x is read by threads, a step ahead: all blocks read the same. The blocks of a cluster share columns and divide the steps; in the
end each adds up its share of the columns. It does not depend on an order.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu, lanes, versions
from jaxpar.pallas_kernels.matmul import gpu_codes_program as program
from jaxpar.pallas_kernels.matmul import gpu_registers
from jaxpar.pallas_kernels.matmul.gpu_codes_program import COLUMNS, ROWS, TILE

WARPS = 4
MOST = 16
"""Rows of x: a thread has all of a step's in registers."""
SPLITS = 8
"""Blocks of a cluster, at most."""


@dataclass(frozen=True)
class CodeTiles:
    """How K is divided.

    Attributes:
      columns: of w, of a block: 64 or 128.
      stages: steps along K that a block is ahead.
      blocks: K is divided over a cluster of up to `SPLITS` blocks where no more blocks than this come of it.
    """

    columns: int = 64
    stages: int = 2
    blocks: int = 528

    def __post_init__(self):
        if self.columns not in (64, 128):
            raise ValueError(f"CodeTiles.columns must be 64 or 128, got {self.columns}")
        if min(self.stages, self.blocks) < 1:
            raise ValueError(f"CodeTiles needs a stage and a block at least, got {self.stages} and {self.blocks}")


@dataclass(frozen=True)
class Settings:
    """What the kernel knows before it is traced.

    Attributes:
      there: rows of x.
      width: columns of w of a block.
      splits: blocks of a cluster.
      stages: steps that a block may be ahead.
      inputs: K; `steps`: along it.
      group: values along K that share a scale of w; `groups`: that a step may touch.
      bits: of w's codes: 4 or 8.
      interpret: whether the kernel will run in the interpreter, where the blocks of a cluster are the warpgroups of one.
    """

    there: int
    width: int
    splits: int
    stages: int
    inputs: int
    group: int
    groups: int
    bits: int
    interpret: bool

    @property
    def columns(self) -> int:
        return -(-self.there // COLUMNS)

    @property
    def rows(self) -> int:
        return self.columns * COLUMNS

    @property
    def depth(self) -> int:
        """Of K, that a warp has of a step."""
        return ROWS * 8 // self.bits

    @property
    def products(self) -> int:
        """Along a warp's K."""
        return self.depth // TILE

    @property
    def step(self) -> int:
        """Of K."""
        return WARPS * self.depth

    @property
    def steps(self) -> int:
        return -(-self.inputs // self.step)

    @property
    def share(self) -> int:
        """Columns that each block of a cluster adds up."""
        return self.width // self.splits

    @property
    def workers(self) -> int:
        """Warps of a cluster."""
        return WARPS * self.splits

    @property
    def sums(self) -> int:
        """Words of a thread."""
        return self.width // TILE * self.columns * 4

    @property
    def words(self) -> int:
        """Of a thread, from step to step: sums, and what the next step has of x."""
        return self.sums + self.products * self.columns * 2

    @property
    def codes(self) -> lanes.Kind:
        return lanes.Kind(self.width)

    def scratch(self) -> dict:
        """Shared memory and barriers by name, for each warpgroup, and sums for each block that gets them and each that sends."""
        each = self.splits if self.interpret else 1
        slots = (each, self.stages)
        return {
            "codes_tile": plgpu.SMEM((*slots, WARPS * ROWS, self.width), jnp.int8, transforms=self.codes.transforms),
            "scales_tile": plgpu.SMEM((*slots, self.groups, self.width), jnp.float32),
            "sums": plgpu.SMEM((each, self.splits, WARPS, self.rows, self.share), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=each * self.stages),
            "all_here": plgpu.Barrier(num_arrivals=each),
        }


def few_rows(s: Settings, names, *refs) -> None:
    """`x [M, K] · w [K, N]`, x in bfloat16 and w in 4 or 8 bits with a scale for each group of values along K."""
    x = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    column, warpgroup = lax.axis_index("column"), lax.axis_index("warpgroup")
    here = pl.ds(column * s.width, s.width)
    split = warpgroup if s.interpret else lax.axis_index("split") if s.splits > 1 else 0
    count = lax.div(s.steps - split + s.splits - 1, s.splits)

    def run(body, refs, kinds, state, numbers, words):
        bound = lambda *args: body(s, *args)
        return lanes.run(bound, refs, kinds, state, numbers, words, interpret=s.interpret)

    def fetch(n, slot):
        @pl.when(n < count)
        def _():
            k, ready = split + n * s.splits, x.ready.at[warpgroup * s.stages + slot]
            at = lambda ref: ref.at[warpgroup, slot]
            # That rows begin with whole tiles is to be seen.
            rows = pl.ds(k * (WARPS * ROWS), WARPS * ROWS)
            plgpu.copy_gmem_to_smem(x.codes.at[rows, here], at(x.codes_tile), ready)
            groups = pl.ds(lax.div(k * s.step, s.group), s.groups)
            plgpu.copy_gmem_to_smem(x.scales.at[groups, here], at(x.scales_tile), ready)

    for n in range(min(s.stages, -(-s.steps // s.splits))):
        fetch(n, n)

    def step(n, words):
        slot = lax.rem(n, s.stages)
        plgpu.barrier_wait(x.ready.at[warpgroup * s.stages + slot])
        tiles = [x.codes_tile.at[warpgroup, slot], x.scales_tile.at[warpgroup, slot], x.x]
        first = (split + n * s.splits) * s.step
        words = run(program.step, tiles, [s.codes, *[lanes.NUMBERS] * 2], [words], (first,), s.words)
        # All threads have read what the next copies overwrite.
        plgpu.commit_smem()
        fetch(n + s.stages, slot)
        return words

    words = run(program.begin, [x.x], [lanes.NUMBERS], [], (split * s.step,), s.words)
    words = lax.fori_loop(0, count, step, words)
    to = x.sums.at[:, split] if s.interpret else x.sums.at[0, split]
    run(program.send, [to], [lanes.NUMBERS], [words], (), 0)
    if s.interpret or s.splits == 1:
        plgpu.commit_smem()
        plgpu.barrier_arrive(x.all_here)
        plgpu.barrier_wait(x.all_here)
    else:
        gpu_registers.meet()
    own = pl.ds((column * s.width + split * s.share) // 2, s.share // 2)
    run(program.gather, [x.sums.at[warpgroup], x.out.at[:, own]], [lanes.NUMBERS] * 2, [], (), 0)


def splits_of(steps: int, columns: int, blocks: int) -> int:
    """Over how many blocks K is divided: a power of two that each has a step, and there are `blocks` at most."""
    count = 1
    while 2 * count <= min(SPLITS, steps, blocks // columns):
        count *= 2
    return count


def depth_of(bits: int) -> int:
    """Values along K of a step."""
    return WARPS * ROWS * 8 // bits


def product(x, codes, scales, *, bits: int, tiles: CodeTiles, interpret) -> jax.Array:
    """`x · w`, bfloat16 [M, N].

    Args:
      x: bfloat16 [M, K], M up to `MOST`, and K a step at least.
      codes: int8 [K · bits / 8, N], packed.
      scales: float32 [groups, N].
    """
    (M, K), N = x.shape, codes.shape[1]
    depth, many = depth_of(bits), scales.shape[0]
    steps, group = -(-K // depth), K // many
    touched = depth // group if depth % group == 0 else depth // group + 2
    groups = 1 if group % depth == 0 or many == 1 else min(touched, many)
    splits = splits_of(steps, N // tiles.columns, tiles.blocks)
    settings = Settings(M, tiles.columns, splits, tiles.stages, K, group, groups, bits, bool(interpret))
    pairs = lax.bitcast_convert_type(x.reshape(M, K // 2, 2), jnp.float32)
    arrays = {"codes": codes, "scales": scales, "x": pairs}
    scratch = settings.scratch()
    clustered = splits > 1 and not interpret
    call = gpu.kernel(
        lambda *refs: few_rows(settings, (*arrays, "out", *scratch), *refs),
        [versions.out_shape((M, N // 2), jnp.float32, *arrays.values())],
        grid={"column": N // tiles.columns},
        cluster={"split": splits} if clustered else {},
        warpgroups=splits if interpret else 1,
        scratch=scratch.values(),
        interpret=interpret,
        name="quant_matmul_codes",
    )
    return lax.bitcast_convert_type(call(*arrays.values())[0], jnp.bfloat16).reshape(M, N)
