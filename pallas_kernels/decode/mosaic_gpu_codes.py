"""Decoding from keys and values in 8 or 4 bits on Hopper GPUs: how the kernel is called (`gpu_codes`: what it does).

The grid is key/value heads, up to four together, x splits x rows. As in `mosaic_gpu`, steps follow from lengths and the window,
pages are looked up where a copy's address is made, and splits are merged by their log-sum-exp.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp

from jaxpar.pallas_kernels import gpu, versions
from jaxpar.pallas_kernels.attention.merging import merge
from jaxpar.pallas_kernels.decode import gpu_codes, mosaic_gpu
from jaxpar.pallas_kernels.decode import gpu_codes_program as program
from jaxpar.pallas_kernels.decode.gpu_codes import WARPS, Settings
from jaxpar.pallas_kernels.decode.mosaic_tpu import kept_name, most_blocks
from jaxpar.pallas_kernels.formats.quantised import Quantised
from jaxpar.pallas_kernels.tiles import Row, look_up

NAME = "mosaic_gpu_codes"
MOST_SUMS = 2048
"""Queries that share a key/value head, in whole eights, times the head size: what a thread's registers hold of sums."""
LEAST_TOKENS = 16
"""Of a step, that a warp has."""


@dataclass(frozen=True)
class CodeTiles:
    """How much of the cache a step takes, and how often a row is divided.

    Attributes:
      tokens: of a step; at least 16 for each warp that a head has.
      stages: steps that shared memory holds.
      blocks: that are wanted at once: rows are divided so that whole rounds of so many come out.
    """

    tokens: int = 64
    stages: int = 2
    blocks: int = 396

    def __post_init__(self):
        if self.tokens not in (32, 64, 128):
            raise ValueError(f"CodeTiles.tokens must be 32, 64 or 128, got {self.tokens}")
        for name in ("stages", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"CodeTiles.{name} must be at least 1, got {getattr(self, name)}")


TABLE = (
    Row(CodeTiles(128, 2, 396), most=(("abreast", 2), ("row_bytes", 64))),
    Row(CodeTiles(64, 2, 264), most=(("abreast", 2),)),
    Row(CodeTiles(64, 2, 396), most=(("bits", 4), ("row_bytes", 256))),
    Row(CodeTiles(32, 2, 396), most=(("row_bytes", 512),)),
    Row(CodeTiles(32, 2, 132)),
)
"""Tiles by the bits of a code, the heads that a block has and the bytes that they have of a token: three blocks in a multiprocessor, or
two where warps that share a head need room for their sums. That they compile and fit is tested; nothing has been measured."""


def misfit(q, k, v, lens, **more) -> str | None:
    """Why the kernel cannot do this call, as the end of a sentence; None where it can."""
    if not isinstance(k, Quantised):
        return f"takes keys and values in int8 or int4, got {k.dtype}"
    if reason := mosaic_gpu.misfit_of_both(q, k, v, lens, **more):
        return reason
    T, H, K = q.shape[1:]
    rows = mosaic_gpu.rows_of(T, H // k.shape[-2])
    if rows * K > MOST_SUMS:
        return f"takes {MOST_SUMS // K} queries that share a key/value head of {K}, got {rows}"
    return None


def decode_mosaic_gpu_codes(
    q_BxTxHxK, k, v, lens_B, *, scale, window=None, cap=None, layer=None, table_BxP=None, interpret=False, tiles=None
):
    """See `api.decode_attention`: out, and lse.

    Args:
      interpret: True, or `plgpu.InterpretGPUParams`, to run in an interpreter (from JAX 0.11 on).
      tiles: instead of those of the table.
    """
    B, T, H, K = q_BxTxHxK.shape
    (places, G), paged = k.shape[-3:-1], table_BxP is not None
    slots = places * table_BxP.shape[1] if paged else places
    if tiles is None:
        sizes = sizes_of(q_BxTxHxK, k, slots)
        op = ("decode_attention", NAME)
        tiles = look_up(TABLE, versions.device_kind("cuda"), op=op, dtype=kept_name(k), **sizes)
    blocks = k.scales.shape[-1]
    tokens = max(tiles.tokens if paged or places >= tiles.tokens else 64, LEAST_TOKENS * WARPS // abreast(G))
    settings = Settings(
        scale,
        cap,
        window is not None,
        queries=T,
        shared=H // G,
        slots=slots,
        tokens=tokens,
        piece=min(tokens, places) if paged else tokens,
        page=places if paged else None,
        splits=1,
        stages=tiles.stages,
        size=K,
        bits=mosaic_gpu.bits_of(k),
        blocks=blocks,
        together=together(G, blocks),
        abreast=abreast(G),
        interpret=bool(interpret),
    )
    groups = G // settings.abreast
    splits = mosaic_gpu.splits_of(B * groups, most_blocks(settings, window), tiles.blocks)
    settings = Settings(**vars(settings) | {"splits": splits})
    arrays = {
        **mosaic_gpu.which(settings, k, lens_B, window, layer, table_BxP),
        "q": program.operands(settings, mosaic_gpu.grouped(q_BxTxHxK, G, settings.rows)),
        **mosaic_gpu.stored("k", k, layer, settings.together),
        **mosaic_gpu.stored("v", v, layer, settings.together),
    }
    # A token's codes of all heads side by side.
    arrays |= {name: arrays[name].reshape(*arrays[name].shape[:2], -1) for name in ("k", "v")}
    parts = (B, groups, splits, settings.abreast, settings.there)
    shapes = {"out": (*parts, K), "lse": parts}
    held = gpu_codes.scratch(settings)
    call = gpu.kernel(
        partial(gpu_codes.decode, settings, (*arrays, *shapes, *held)),
        [versions.out_shape(shape, jnp.float32, *arrays.values()) for shape in shapes.values()],
        grid={"group": groups, "split": splits, "batch": B},
        warpgroups=1,
        scratch=held.values(),
        interpret=gpu.interpreter(interpret),
        name="decode_attention_codes",
    )
    out, lse = merge(*call(*arrays.values()), axis=2)
    apart = lambda x: jnp.moveaxis(x.reshape(B, G, T, H // G, *x.shape[4:]), 2, 1)
    out = apart(out).reshape(B, T, H, K).astype(q_BxTxHxK.dtype)
    return out, jnp.swapaxes(apart(lse).reshape(B, T, H), 1, 2)


def abreast(groups: int) -> int:
    """Key/value heads of a block: a warp or several each."""
    return next(n for n in (4, 2, 1) if groups % n == 0)


def together(groups: int, blocks: int) -> bool:
    """Whether scales are copied as they lie: 16 bytes of a token, which a copy has at least. Others are turned beforehand, in
    XLA."""
    return abreast(groups) == WARPS and blocks == 1


def sizes_of(q, k, slots: int) -> dict[str, int]:
    """What tiles are looked up by."""
    heads = abreast(k.shape[-2])
    row_bytes = heads * q.shape[3] * mosaic_gpu.bits_of(k) // 8
    return mosaic_gpu.sizes_of(q, k, slots) | {"abreast": heads, "row_bytes": row_bytes}
