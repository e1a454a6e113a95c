"""Products of a few rows of x with weights in 4 or 8 bits for Hopper GPUs: what is fast is what waits for nothing but w.

The transposed product yᵀ = wᵀ · xᵀ is computed: the matrix instruction takes 64 rows of its first operand and that from
registers, so that codes are widened from shared memory into registers and multiplied there (`gpu_registers`), and 8 or more
columns of its second one, which x's rows are. The scales of a step's group are behind its sum.

A block has `COLUMNS` columns of w and some warpgroups, each on its own: it copies the codes, scales and x of its steps along K
ahead, and sums its steps. The two blocks of a cluster share columns and divide K. In the end each block gets some rows of all
the sums, adds them up and writes them. Where few columns would leave processors idle, K is cut into parts besides, whose sums
XLA adds up. Neither depends on an order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu, versions
from jaxpar.pallas_kernels.matmul import gpu_registers as registers
from jaxpar.pallas_kernels.matmul.gpu_registers import COLUMNS, HALF

STEP = 2 * HALF
"""Of K."""
MOST = 64
"""Rows of x."""
CLUSTER = 2
"""Blocks of a cluster. Larger ones leave processors idle that do not come in as many: with 32 clusters of four a product took 1.6
times as long on an H200's 132."""
CUTS = 8
"""Of K between blocks, at most."""


@dataclass(frozen=True)
class FewRowsTiles:
    """How K is divided.

    Attributes:
      warpgroups: of a block.
      stages: steps along K that each warpgroup is ahead.
      blocks: K is cut, at most `CUTS` times, where no more blocks than this come of it.
    """

    warpgroups: int = 4
    stages: int = 4
    blocks: int = 132

    def __post_init__(self):
        if self.warpgroups not in (1, 2, 4, 8) or min(self.stages, self.blocks) < 1:
            raise ValueError(
                "FewRowsTiles must have 1, 2, 4 or 8 warpgroups, and a stage and a block at least, got "
                f"{self.warpgroups}, {self.stages} and {self.blocks}"
            )


@dataclass(frozen=True)
class Settings:
    """What the kernel knows before it is traced.

    Attributes:
      there: rows of x; `rows`: up to a multiple of 8.
      warpgroups: of a block.
      splits: blocks of a cluster.
      parts: of K, whose sums are added up behind the kernel.
      stages: steps that a warpgroup may be ahead.
      steps: along all of K.
      group: values along K that share a scale of w.
      bits: of w's codes: 4 or 8.
      dtype: of the result.
      interpret: whether the kernel will run in the interpreter, which has no clusters.
    """

    there: int
    warpgroups: int
    splits: int
    parts: int
    stages: int
    steps: int
    group: int
    bits: int
    dtype: jnp.dtype
    interpret: bool

    @property
    def rows(self) -> int:
        return -(-self.there // 8) * 8

    @property
    def share(self) -> int:
        """Rows that each block of a cluster adds up."""
        return self.rows // self.splits

    @property
    def workers(self) -> int:
        """Warpgroups of a cluster."""
        return self.warpgroups * self.splits

    @property
    def codes(self) -> int:
        """Rows of codes of a step."""
        return STEP * self.bits // 8

    def scratch(self) -> dict:
        slots = (self.warpgroups, self.stages)
        return {
            "codes_tile": plgpu.SMEM((*slots, self.codes, COLUMNS), jnp.int8, transforms=registers.CODES.transforms),
            "x_tile": plgpu.SMEM((*slots, 2, self.rows, HALF), jnp.bfloat16, transforms=registers.ROWS.transforms),
            "w_scales": plgpu.SMEM((*slots, COLUMNS), jnp.float32),
            "sums": plgpu.SMEM((self.workers, self.share, COLUMNS), jnp.float32),
            "out_tile": plgpu.SMEM((self.share, COLUMNS), self.dtype),
            # A step's codes and scales.
            "ready": plgpu.Barrier(num_arrivals=2, num_barriers=math.prod(slots)),
            "all_here": plgpu.Barrier(num_arrivals=self.warpgroups),
        }


def few_rows(settings: Settings, names, *refs) -> None:
    """`x [M, K] · w [K, N]`, x in bfloat16 and w in 4 or 8 bits with a scale for each group of values along K."""
    x = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    s, bits, interpret = settings, settings.bits, settings.interpret
    here = pl.ds(lax.axis_index("column") * COLUMNS, COLUMNS)
    warpgroup = lax.axis_index("warpgroup")
    split = 0 if interpret or s.splits == 1 else lax.axis_index("split")
    # Steps are dealt out one by one.
    worker, here_of_k = split * s.warpgroups + warpgroup, lax.axis_index("part")
    start, everyone = here_of_k * s.workers + worker, s.workers * s.parts
    count = lax.div(s.steps - start + everyone - 1, everyone)

    def fetch(n, slot):
        @pl.when(n < count)
        def _():
            k = start + n * everyone
            rows, ready = pl.ds(k * s.codes, s.codes), x.ready.at[warpgroup * s.stages + slot]
            plgpu.copy_gmem_to_smem(x.codes.at[rows, here], x.codes_tile.at[warpgroup, slot], ready)
            scales = x.scales.at[lax.div(k * STEP, s.group), here]
            plgpu.copy_gmem_to_smem(scales, x.w_scales.at[warpgroup, slot], ready)
            along = x.x.at[:, pl.ds(k * STEP, STEP)]
            registers.begin(along, x.x_tile.at[warpgroup, slot], interpret=interpret)

        registers.begun(interpret=interpret)

    def products(slot, first, second):
        for half in range(2):
            parts = registers.operand(bits, half, x.codes_tile.at[warpgroup, slot], interpret=interpret)
            for total, part in zip((first, second), parts, strict=True):
                total.add(part, x.x_tile.at[warpgroup, slot, half], transposed=True)
        return first.value(), second.value()

    def step(n, totals):
        slot = lax.rem(n, s.stages)
        plgpu.barrier_wait(x.ready.at[warpgroup * s.stages + slot])
        registers.arrived(s.stages - 1, interpret=interpret)
        sums = gpu.from_nothing(lambda *two: products(slot, *two), [(64, s.rows)] * 2, interpret=interpret)
        scales = registers.scales(bits, x.w_scales.at[warpgroup, slot], interpret=interpret)
        totals = [
            total + part * lax.broadcast_in_dim(scale / registers.UNIT, part.shape, [0])
            for total, part, scale in zip(totals, sums, scales, strict=True)
        ]
        # All threads have read what the next copy overwrites.
        plgpu.commit_smem()

        fetch(n + s.stages, slot)
        return totals

    for n in range(s.stages):
        fetch(n, n)
    totals = lax.fori_loop(0, count, step, [gpu.zeros((64, s.rows)) for _ in range(2)])
    registers.send(bits, totals, x.sums.at[worker], s.share, interpret=interpret)
    if interpret:
        plgpu.commit_smem()
        plgpu.barrier_arrive(x.all_here)
        plgpu.barrier_wait(x.all_here)
    else:
        registers.meet()

    @pl.when(warpgroup == 0)
    def _():
        layout = plgpu.Layout.WG_STRIDED((s.share, COLUMNS), vec_size=math.gcd(s.share, 4))
        total = gpu.load(x.sums.at[0], layout)
        for n in range(1, s.workers):
            total += gpu.load(x.sums.at[n], layout)
        x.out_tile[...] = total.astype(s.dtype)
        plgpu.commit_smem()
        # Rows that there are not are not written.
        some = math.gcd(s.share, s.there)
        for start in range(0, s.share, some):
            row = split * s.share + start

            @pl.when(row < s.there)
            def _(start=start, row=row):
                plgpu.copy_smem_to_gmem(x.out_tile.at[pl.ds(start, some)], x.out.at[here_of_k, pl.ds(row, some), here])

        plgpu.wait_smem_to_gmem(0)


def cuts(tiles: FewRowsTiles, steps: int, columns: int) -> int:
    """In how many parts K is cut: a power of two, that each warpgroup has a step and there are `tiles.blocks` blocks at most."""
    count = 1
    while 2 * count <= min(CUTS, tiles.blocks // columns, steps // tiles.warpgroups):
        count *= 2
    return count


def product(x, codes, scales, *, bits: int, dtype, tiles: FewRowsTiles, interpret) -> jax.Array:
    """`x · w`, [M, N] in `dtype`.

    Args:
      x: bfloat16 [M, K], M up to `MOST`.
      codes: int8 [K · bits / 8, N], packed.
      scales: float32 [groups, N].
    """
    (M, K), N = x.shape, codes.shape[1]
    count = cuts(tiles, K // STEP, N // COLUMNS)
    splits, warpgroups = min(count, CLUSTER), tiles.warpgroups
    parts = count // splits
    if interpret:
        # What a cluster's blocks are on the chip is one block.
        warpgroups, splits = warpgroups * splits, 1
    dtype = jnp.dtype(dtype)
    settings = Settings(
        M,
        warpgroups,
        splits,
        parts,
        tiles.stages,
        K // STEP,
        K // scales.shape[0],
        bits,
        dtype if parts == 1 else jnp.dtype(jnp.float32),
        bool(interpret),
    )
    arrays = {"codes": codes, "scales": scales, "x": x}
    scratch = settings.scratch()
    call = gpu.kernel(
        lambda *refs: few_rows(settings, (*arrays, "out", *scratch), *refs),
        [versions.out_shape((parts, M, N), settings.dtype, *arrays.values())],
        grid={"part": parts, "column": N // COLUMNS},
        cluster={"split": splits} if splits > 1 else {},
        warpgroups=warpgroups,
        scratch=scratch.values(),
        interpret=interpret,
        name="quant_matmul_few_rows",
    )
    sums = call(*arrays.values())[0]
    return sums[0] if parts == 1 else jnp.sum(sums, axis=0).astype(dtype)
