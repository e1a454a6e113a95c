"""Flash attention for Hopper GPUs by Pallas' Mosaic GPU backend, forward and backward: how kernels are called (`gpu_kernels`:
what they do).

Dao et al. 2022 and 2023, Shah et al. 2024: the T x S logits exist a block at a time, in registers. Blocks of keys that no
query of a block sees are neither computed nor fetched (`labels`), wherever causality, window, documents and offsets put
them, and those of which all is seen are not masked.

The backward pass is one kernel (`gpu_fused`), which sums dk and dv in registers and adds to dq in memory: the last bits of dq
are not the same on every run. With XLA's flag for the same results on every run (`gpu.same_bits`), on JAX before 0.11, with
head size 256, and with 128 where query heads share keys, it is two: dq over blocks of keys; dk and dv over the query heads that share them and over blocks of
queries, each sum in registers and in a fixed order.

Head sizes are padded with zeros to 64, 128 or 256, queries and keys to whole blocks of 128. With 256, dk and dv together do
not fit a thread's registers: they are summed by a kernel each, which makes the weights once more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels import gpu, versions
from jaxpar.pallas_kernels.attention import gpu_fused, gpu_kernels
from jaxpar.pallas_kernels.attention.labels import Kinds, Labels, Span, kinds, labels
from jaxpar.pallas_kernels.attention.mask import MaskSpec
from jaxpar.pallas_kernels.tiles import Row, chip, look_up

SIZES = (64, 128, 256)
"""Head sizes of the tiles."""
BLOCK = gpu_kernels.COMPUTE * gpu_kernels.ROWS
"""Rows of a block: queries by queries, keys by keys."""
FEWEST = 64
"""Queries for which None chooses the kernels."""


@dataclass(frozen=True)
class AttentionTiles:
    """Tokens of the other side that a step takes, 64 or 128, and how many steps shared memory holds.

    Attributes:
      keys, stages: of the forward pass.
      keys_back, stages_q: of dq.
      queries_back, stages_k: of dk with dv, or of all three in one kernel, whose step is 64 queries.
      kernels_back: how many kernels the backward pass may be, 1 or 2 (`Call.may_be_one`).
    """

    keys: int
    keys_back: int
    queries_back: int
    stages: int = 2
    stages_q: int = 2
    stages_k: int = 2
    kernels_back: int = 1

    def __post_init__(self):
        if self.kernels_back not in (1, 2):
            raise ValueError(f"AttentionTiles.kernels_back must be 1 or 2, got {self.kernels_back}")
        for name in ("keys", "keys_back", "queries_back"):
            if getattr(self, name) not in (64, 128):
                raise ValueError(f"AttentionTiles.{name} must be 64 or 128 tokens, got {getattr(self, name)}")
        for name in ("stages", "stages_q", "stages_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"AttentionTiles.{name} must be at least 1 step, got {getattr(self, name)}")


TABLE = (
    Row(AttentionTiles(128, 64, 64, stages=3, stages_q=3, stages_k=3), most=(("head_size", 64),)),
    Row(AttentionTiles(128, 64, 64, stages_q=3), most=(("head_size", 128),)),
    Row(AttentionTiles(64, 64, 64, stages_q=1, stages_k=1)),
)
"""Tiles by head size. That they compile for Hopper GPUs and fit their registers is tested. Measured on an H100 as they are, and
not yet beside others: `jaxpar tune` does that."""


def misfit(q, k, v, *, mask: MaskSpec, scale, cap=None, q_start=0, k_start=0, lse_out=False) -> str | None:
    """Why the kernels cannot do this call, as the end of a sentence; None where they can."""
    (B, T, _, K), S = q.shape, k.shape[1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, got {q.dtype}"
    if SIZES[-1] < K:
        return f"takes a head size up to {SIZES[-1]}, got {K}"
    if not B * T * S:
        return f"needs a row, a query and a key at least, got {B}, {T} and {S}"
    kind = versions.device_kind("cuda")
    if kind is not None and chip(kind) != "hopper":
        return f"is written for Hopper GPUs, and here is a {kind}"
    return None


def unwise(q, k, v, **call) -> str | None:
    """Why None leaves a call to XLA: it has next to nothing of what a block is for. On an H100 the kernels were eight to ten
    times as fast as XLA forwards, and four to five times with the backward pass (`experiments/bench/kernels.py`)."""
    if q.shape[1] < FEWEST:
        return f"multiplies {BLOCK} queries at once, so that only its name chooses it for fewer than {FEWEST}, and here are {q.shape[1]}"
    return None


def plan(q, k, v, *, mask: MaskSpec, scale, cap=None, q_start=0, k_start=0, interpret=False, tiles=None) -> HopperPlan:
    """The plan of a call.

    Args:
      interpret: True, or `plgpu.InterpretGPUParams`, to run in an interpreter (from JAX 0.11 on).
      tiles: as they are, instead of those of the table.
    """
    if tiles is None:
        sizes = dict(head_size=q.shape[3], queries=q.shape[1], keys=k.shape[1])
        tiles = look_up(TABLE, versions.device_kind("cuda"), op=("attention", "mosaic_gpu"), dtype=q.dtype, **sizes)
    return HopperPlan(scale, cap, tiles, gpu.interpreter(interpret))


@dataclass(frozen=True)
class HopperPlan:
    """A plan (see `differentiable.Plan`)."""

    scale: float
    cap: float | None
    tiles: AttentionTiles
    interpret: Any = False

    def forward(self, q, k, v, mask, starts):
        T, K = q.shape[1], q.shape[3]
        call = Call(self, q, k, mask, starts)
        q, k, v = map(call.whole, (q, k, v))
        numbers = versions.out_shape((q.shape[0], q.shape[2], q.shape[1]), jnp.float32, q, k, v)
        out, lse = call.by_queries(
            gpu_kernels.forward,
            {"q": q, "k": k, "v": v},
            {"out": versions.out_shape(q.shape, q.dtype, q, k, v), "lse": numbers},
            self.tiles.keys,
            self.tiles.stages,
        )
        return out[:, :T, :, :K], lse[:, :, :T]

    def backward(self, q, k, v, mask, starts, lse, drop, d_out, precise=False):
        call = Call(self, q, k, mask, starts)
        # A query that sees nothing has lse = -inf, and -inf - -inf would be NaN.
        lse = jnp.where(lse == -jnp.inf, 0, lse)
        arrays = {name: call.whole(x) for name, x in (("q", q), ("k", k), ("v", v), ("d_out", d_out))}
        arrays |= {"lse": call.numbers(lse), "drop": call.numbers(drop)}
        cut = lambda found, like: found[:, : like.shape[1], :, : like.shape[3]]
        if call.may_be_one(self.tiles.kernels_back):
            found = call.at_once(arrays, self.tiles.stages_k, precise)
            return tuple(cut(one, like) for one, like in zip(found, (q, k, v), strict=True))
        shape = lambda name: versions.out_shape(arrays[name].shape, arrays[name].dtype, *arrays.values())
        tiles = self.tiles
        (dq,) = call.by_queries(
            gpu_kernels.backward_q, arrays, {"dq": shape("q")}, tiles.keys_back, tiles.stages_q, precise
        )
        outs = {"dk": shape("k"), "dv": shape("v")}
        parts = [outs] if call.size < SIZES[-1] else [{name: out} for name, out in outs.items()]
        sums = [
            call.by_keys(gpu_kernels.backward_k, arrays, part, tiles.queries_back, tiles.stages_k, precise)
            for part in parts
        ]
        dk, dv = (x for part in sums for x in part)
        return cut(dq, q), cut(dk, k), cut(dv, v)


class Call:
    """Shapes and labels of one pass. Arrays of a kernel are [B, tokens, heads, size], or [B, H, T] of numbers."""

    def __init__(self, plan: HopperPlan, q, k, mask: MaskSpec, starts):
        self.plan, self.mask, self.starts = plan, mask, starts
        self.B, T, self.H, K = q.shape
        self.G = k.shape[2]
        self.sizes = T, k.shape[1]
        self.tokens = tuple(_round_up(size, BLOCK) for size in self.sizes)
        self.size = next(size for size in SIZES if size >= K)
        self.dtype = q.dtype
        self.kinds = kinds(mask, padded=self.sizes != self.tokens)

    def whole(self, x_BxNxHxK):
        """Tokens padded to whole blocks and heads to a tile's size."""
        _, N, _, K = x_BxNxHxK.shape
        return jnp.pad(x_BxNxHxK, ((0, 0), (0, _round_up(N, BLOCK) - N), (0, 0), (0, self.size - K)))

    def numbers(self, x_BxHxT):
        """Float32 numbers of queries, padded to whole blocks."""
        return jnp.pad(x_BxHxT.astype(jnp.float32), ((0, 0), (0, 0), (0, self.tokens[0] - self.sizes[0])))

    def by_queries(self, kernel, arrays, outs, columns: int, stages: int, precise: bool = False):
        """Run a kernel for each block of queries over the steps of keys that it needs. `precise`: outputs in float32."""
        found = labels(self.mask, self.starts, self.sizes, (BLOCK, columns))
        clear = may_be_clear(self.kinds, found, (BLOCK, columns))
        grid = self.H, self.tokens[0]
        return self._run(kernel, arrays, outs, found, (found.keys, clear), grid, columns, stages, precise)

    def may_be_one(self, kernels_back: int) -> bool:
        """Whether the backward pass is one kernel. Where query heads share keys two were faster at head size 128, on an H100."""
        if kernels_back == 2 or self.size == SIZES[-1] or (self.size == SIZES[1] and self.H > self.G):
            return False
        return gpu.MAY_ADD and not gpu.same_bits()

    def at_once(self, arrays, stages: int, precise: bool):
        """dq, dk and dv by one kernel, for each block of keys; dq in float32, dk and dv too if `precise`."""
        columns = gpu_fused.COLUMNS
        like = tuple(arrays.values())
        kind = jnp.float32 if precise else self.dtype
        outs = {name: versions.out_shape(arrays[x].shape, kind, *like) for name, x in (("dk", "k"), ("dv", "v"))}
        shape = arrays["q"].shape
        if self.plan.interpret:
            shape = self.tokens[1] // BLOCK, *shape
        found, clear = self._by_keys(columns)
        dk, dv, dq = self._run(
            gpu_fused.backward,
            arrays,
            outs,
            found,
            (found.queries, clear),
            (self.G, self.tokens[1]),
            columns,
            stages,
            precise,
            added={"dq": shape},
        )
        dq = (jnp.sum(dq, axis=0) if self.plan.interpret else dq) * self.plan.scale
        return dq.astype(kind), dk, dv

    def _by_keys(self, columns: int):
        """Labels by blocks of keys, and the runs of steps of queries that see all of one."""
        found = labels(self.mask, self.starts, self.sizes, (columns, BLOCK))
        clear = may_be_clear(self.kinds, found, (columns, BLOCK))
        return found, None if clear is None else jnp.swapaxes(clear, 1, 2)

    def by_keys(self, kernel, arrays, outs, columns: int, stages: int, precise: bool = False):
        """Run a kernel for each block of keys over the query heads that share it and the steps of queries that need it."""
        found, clear = self._by_keys(columns)
        grid = self.G, self.tokens[1]
        return self._run(kernel, arrays, outs, found, (found.queries, clear), grid, columns, stages, precise)

    def _run(
        self, kernel, arrays, outs, found: Labels, spans, grid, columns: int, stages: int, precise: bool, added=None
    ):
        """The kernel's outputs. `added`: shapes by name of float32 sums that it adds to, which come behind them."""
        plan, (heads, tokens), added = self.plan, grid, added or {}
        twice = precise and not added
        settings = gpu_kernels.Settings(
            self.kinds,
            scale=plan.scale,
            cap=plan.cap,
            shared=self.H // self.G,
            one_row=found.keys.first.shape[0] == 1,
            columns=columns,
            stages=stages,
            size=self.size,
            dtype=self.dtype,
            interpret=bool(plan.interpret),
            outs=tuple(outs),
            precise=precise,
        )
        if twice:
            outs = outs | {name + gpu_kernels.REST: out for name, out in outs.items()}
        span, clear = spans
        span = [*span] if clear is None else [*span, *run_of(clear)]
        arrays = {"spans": jnp.stack(span, axis=-1), "window": found.window} | arrays
        if self.kinds.names:
            arrays |= {"q_labels": found.q, "k_labels": found.k}
        module = gpu_fused if kernel is gpu_fused.backward else gpu_kernels
        scratch = getattr(module, f"{kernel.__name__}_scratch")(settings)
        call = gpu.kernel(
            partial(kernel, settings, (*arrays, *added, *outs, *scratch)),
            outs.values(),
            grid={"head": heads, "block": tokens // BLOCK, "batch": self.B},
            warpgroups=gpu_kernels.COMPUTE + 1,
            scratch=scratch.values(),
            interpret=plan.interpret,
            name="_".join(("attention", kernel.__name__, *settings.outs)),
        )
        found = gpu.adding(call, added.values())(*arrays.values())
        if not twice:
            return found
        found = [x.astype(jnp.float32) for x in found]
        count = len(settings.outs)
        return [a + b for a, b in zip(found[:count], found[count:], strict=True)]


def may_be_clear(kind: Kinds, found: Labels, blocks: tuple[int, int]) -> jax.Array | None:
    """bool [R, blocks of queries, blocks of keys]: every query of one sees every key of the other. None without a mask."""
    if not kind.names:
        return None
    ends = []
    for axis, (x, block) in enumerate(zip((found.q, found.k), blocks, strict=True)):
        cut = x.reshape(*x.shape[:2], -1, block)
        low, high = (jnp.expand_dims(f(cut, axis=-1), 3 - axis) for f in (jnp.min, jnp.max))
        ends += [{name: end[:, n] for n, name in enumerate(kind.names)} for end in (low, high)]
    q_low, q_high, k_low, k_high = ends
    clear = True
    if kind.causal:
        clear = clear & (k_high["index"] <= q_low["index"])
    if kind.window:
        clear = clear & (q_high["index"] - k_low["index"] < found.window[0])
    if kind.segments:
        q, k = (low["segment"] for low in (q_low, k_low))
        clear = clear & (q == q_high["segment"]) & (k == k_high["segment"]) & (q == k) & (q != 0)
    return clear


def run_of(clear_RxNxM) -> Span:
    """The first run of clear blocks in each row: all there are, for causal masks, windows and packed documents."""
    first = jnp.argmax(clear_RxNxM, axis=-1)
    M = clear_RxNxM.shape[-1]
    after = ~clear_RxNxM & (jax.lax.broadcasted_iota(jnp.int32, clear_RxNxM.shape, 2) > first[..., None])
    last = jnp.where(jnp.any(after, axis=-1), jnp.argmax(after, axis=-1), M) - 1
    some = jnp.any(clear_RxNxM, axis=-1)
    whole = lambda x, none: jnp.where(some, x, none).astype(jnp.int32)
    return Span(whole(first, 0), whole(last, -1))


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step
