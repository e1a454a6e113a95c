"""Flash attention for TPUs by Pallas' Mosaic backend, forward and backward: how kernels are called (`tpu_kernels`: what they do).

Dao et al. 2022 and 2023: the T x S logits exist a block at a time. Blocks of keys that no query of a block sees are neither
computed nor fetched (`labels`), wherever causality, window, documents and offsets put them. The backward pass is two
kernels, each sums its own output in VMEM in a fixed order: dq over blocks of keys; dk and dv over blocks of queries and
over the query heads that share a key/value head. Nothing is added atomically: results are the same on every run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpar.pallas_kernels import versions
from jaxpar.pallas_kernels.attention import tpu_kernels
from jaxpar.pallas_kernels.attention.labels import Labels, Span, kinds, labels
from jaxpar.pallas_kernels.attention.mask import MaskSpec
from jaxpar.pallas_kernels.tiles import Row, look_up

LANES = 128
LARGEST_HEAD = 256


@dataclass(frozen=True)
class AttentionTiles:
    """Queries and keys in a block, forward and backward."""

    queries: int
    keys: int
    queries_back: int
    keys_back: int

    def fit(self, queries: int, keys: int) -> AttentionTiles:
        """Blocks no larger than these, multiples of 128, that pad this many queries and keys least."""
        fit = lambda most, size: _round_up(-(-size // (-(-size // most))), LANES)
        return AttentionTiles(
            fit(self.queries, queries), fit(self.keys, keys), fit(self.queries_back, queries), fit(self.keys_back, keys)
        )


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


TABLE = (
    Row(AttentionTiles(512, 1024, 512, 512), most=(("head_size", 128),)),
    Row(AttentionTiles(512, 512, 512, 512)),
)
"""Block sizes by head size. That they compile for every chip is tested; which are fastest has not been measured."""


def misfit(q, k, v, *, mask: MaskSpec, scale, cap=None, q_start=0, k_start=0, lse_out=False) -> str | None:
    """Why the kernels cannot do this call, as the end of a sentence; None where they can."""
    (B, T, _, K), S = q.shape, k.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes bfloat16 or float32, got {q.dtype}"
    if K % 8 or K > LARGEST_HEAD:
        return f"takes a head size that is a multiple of 8 up to {LARGEST_HEAD}, got {K}"
    if not B * T * S:
        return f"needs a row, a query and a key at least, got {B}, {T} and {S}"
    return None


def unwise(q, k, v, **call) -> str | None:
    """Why None leaves this call to XLA."""
    T = q.shape[1]
    return f"pads {T} queries to {LANES}" if T < LANES else None


def plan(q, k, v, *, mask: MaskSpec, scale, cap=None, q_start=0, k_start=0, interpret=False, tiles=None) -> FlashPlan:
    """The plan of a call.

    Args:
      interpret: True, or `pltpu.InterpretParams`, to run in an interpreter.
      tiles: as they are, instead of those of the table.
    """
    if tiles is None:
        sizes = dict(head_size=q.shape[3], queries=q.shape[1], keys=k.shape[1])
        row = look_up(TABLE, versions.device_kind("tpu"), op=("attention", "mosaic_tpu"), dtype=q.dtype, **sizes)
        tiles = row.fit(q.shape[1], k.shape[1])
    counted = mask.causal and mask.q_index is None and mask.k_index is None and isinstance(mask.window, int)
    return FlashPlan(scale, cap, tiles, mask.window if counted else None, interpret)


@dataclass(frozen=True)
class FlashPlan:
    """A plan (see `differentiable.Plan`).

    Attributes:
      reach: a bound on how many tokens a query sees back, from which follows how many blocks a block can need at most.
    """

    scale: float
    cap: float | None
    tiles: AttentionTiles
    reach: int | None = None
    interpret: bool | pltpu.InterpretParams = False

    def forward(self, q, k, v, mask, starts):
        T, K = q.shape[1], q.shape[3]
        call = Call(self, q, k, mask, starts, (self.tiles.queries, self.tiles.keys))
        q, k, v = call.heads(q, 0), call.heads(k, 1), call.heads(v, 1)
        column = pltpu.VMEM((call.block[0], LANES), jnp.float32)
        out, lse = call.by_queries(
            tpu_kernels.forward,
            {"q": q, "k": k, "v": v},
            {"out": versions.out_shape(q.shape, q.dtype, q, k, v), "lse": call.row_shape(q, k, v)},
            {"top": column, "total": column, "sum": pltpu.VMEM((call.block[0], K), jnp.float32)},
        )
        return jnp.swapaxes(out, 1, 2)[:, :T], lse[:, :, 0, :T]

    def backward(self, q, k, v, mask, starts, lse, drop, d_out, precise=False):
        T, S = q.shape[1], k.shape[1]
        call = Call(self, q, k, mask, starts, (self.tiles.queries_back, self.tiles.keys_back))
        bq, bk = call.block
        # A query that sees nothing has lse = -inf, and -inf - -inf would be NaN.
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        arrays = {"q": call.heads(q, 0), "k": call.heads(k, 1), "v": call.heads(v, 1)}
        arrays |= {"d_out": call.heads(d_out, 0), "lse": call.rows(lse), "drop": call.rows(drop)}
        shape = lambda x: versions.out_shape(x.shape, jnp.float32 if precise else x.dtype, *arrays.values())
        column = pltpu.VMEM((bq, LANES), jnp.float32)
        total = lambda size: pltpu.VMEM((size, q.shape[3]), jnp.float32)
        (dq,) = call.by_queries(
            tpu_kernels.backward_q,
            arrays,
            {"dq": shape(arrays["q"])},
            {"lse_column": column, "drop_column": column, "sum": total(bq)},
        )
        dk, dv = call.by_keys(
            tpu_kernels.backward_k,
            arrays,
            {"dk": shape(arrays["k"]), "dv": shape(arrays["v"])},
            {"sum_k": total(bk), "sum_v": total(bk)},
        )
        back = lambda x, size: jnp.swapaxes(x, 1, 2)[:, :size]
        return back(dq, T), back(dk, S), back(dv, S)


class Call:
    """Shapes, labels and block specs of one pass. Arrays of a kernel are [B, heads, tokens, K], or [B, H, 1, T] by row."""

    def __init__(self, plan: FlashPlan, q, k, mask, starts, block: tuple[int, int]):
        self.plan, self.block = plan, block
        self.B, T, self.H, self.K = q.shape
        self.G = k.shape[2]
        self.sizes = T, k.shape[1]
        self.whole = tuple(_round_up(size, n) for size, n in zip(self.sizes, block, strict=True))
        self.counts = tuple(size // n for size, n in zip(self.whole, block, strict=True))
        self.labels: Labels = labels(mask, starts, self.sizes, block)
        self.settings = tpu_kernels.Settings(
            kinds(mask, padded=self.sizes != self.whole),
            scale=plan.scale,
            cap=plan.cap,
            one_row=self.labels.keys.first.shape[0] == 1,
            precision=jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
        )

    def heads(self, x_BxNxHxK, side: int):
        """[B, H, N, K], tokens padded to whole blocks of queries (side 0) or keys (side 1)."""
        x = jnp.swapaxes(x_BxNxHxK, 1, 2)
        more = self.whole[side] - self.sizes[side]
        return jnp.pad(x, ((0, 0), (0, 0), (0, more), (0, 0))) if more else x

    def rows(self, x_BxHxT):
        """[B, H, 1, T], padded to whole blocks."""
        more = self.whole[0] - self.sizes[0]
        return jnp.pad(x_BxHxT.astype(jnp.float32), ((0, 0), (0, 0), (0, more)))[:, :, None]

    def row_shape(self, *arrays):
        return versions.out_shape((self.B, self.H, 1, self.whole[0]), jnp.float32, *arrays)

    def steps(self, side: int) -> int:
        """How many blocks of the other side one of this side may need."""
        count, reach = self.counts[1 - side], self.plan.reach
        if reach is None:
            return count
        # Tokens that a block sees, or is seen by, stand in a row; at worst they begin with the last of a block.
        return min(count, (self.block[side] + reach - 3) // self.block[1 - side] + 2)

    def by_queries(self, kernel, arrays, outs, scratch):
        """Run a kernel for each block of queries over the blocks of keys that it needs: grid (B, H, blocks, steps)."""
        R = self.H // self.G
        other = lambda b, i, j, first, last: _at(self.settings.row(b), i, j, first, last)
        return self._run(
            kernel,
            arrays,
            outs,
            scratch,
            span=self.labels.keys,
            grid=(self.B, self.H, self.counts[0], self.steps(0)),
            place=(
                lambda b, h, i, j, first, last: (b, h, i),
                lambda b, h, i, j, first, last: (b, jax.lax.div(h, R), other(b, i, j, first, last)),
            ),
        )

    def by_keys(self, kernel, arrays, outs, scratch):
        """Run a kernel for each block of keys, over the query heads that share it and the blocks of queries that need it:
        grid (B, G, blocks, H/G, steps)."""
        R = self.H // self.G
        other = lambda b, i, j, first, last: _at(self.settings.row(b), i, j, first, last)
        return self._run(
            kernel,
            arrays,
            outs,
            scratch,
            span=self.labels.queries,
            grid=(self.B, self.G, self.counts[1], R, self.steps(1)),
            place=(
                lambda b, g, i, r, j, first, last: (b, g * R + r, other(b, i, j, first, last)),
                lambda b, g, i, r, j, first, last: (b, g, i),
            ),
        )

    def _run(self, kernel, arrays, outs, scratch, *, span: Span, grid, place):
        """`place`: the batch row, head and block of queries and of keys, by the grid's indices."""
        arrays, scratch = dict(arrays), dict(scratch)
        names = len(self.settings.kinds.names)
        for side, (name, label) in enumerate((("q_labels", self.labels.q), ("k_labels", self.labels.k))):
            if label is not None:
                arrays[name] = label
                scratch[f"{name}_columns"] = pltpu.VMEM((names, self.block[side], LANES), jnp.int32)
        spec = partial(self._spec, place)
        call = pl.pallas_call(
            partial(kernel, self.settings, (*arrays, *outs, *scratch)),
            out_shape=list(outs.values()),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=3,
                grid=grid,
                in_specs=[spec(name) for name in arrays],
                out_specs=[spec(name) for name in outs],
                scratch_shapes=list(scratch.values()),
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",) * 3 + ("arbitrary",) * (len(grid) - 3)
            ),
            interpret=self.plan.interpret,
            name=f"attention_{kernel.__name__}",
        )
        return call(span.first, span.last, self.labels.window, *arrays.values())

    def _spec(self, place, name: str) -> pl.BlockSpec:
        side = 1 if name in ("k", "v", "dk", "dv", "k_labels") else 0
        where, size = place[side], self.block[side]

        def index(*grid):
            *ids, first, last, _ = grid
            b, h, i = where(*ids, first, last)
            if name.endswith("labels"):
                return self.settings.row(b), 0, i
            return (b, h, 0, i) if name in ("lse", "drop") else (b, h, i, 0)

        if name.endswith("labels"):
            return pl.BlockSpec((None, len(self.settings.kinds.names), size), index)
        return pl.BlockSpec((None, None, 1, size) if name in ("lse", "drop") else (None, None, size, self.K), index)


def _at(row, i, step, first, last):
    """The block that is needed at a step. After the last one it stays, so that nothing more is fetched."""
    return jnp.minimum(first[row, i] + step, jnp.maximum(last[row, i], 0))
