"""Flash-decoding for TPUs by Pallas' Mosaic backend: how the kernel is called (`tpu_kernel`: what it does).

The grid is rows x splits x blocks of the cache. Which blocks a row needs follows from its length and the window; the others
are neither fetched nor computed. A page table is read where the next block's address is made, so that pages are fetched as
blocks of a dense cache are. Splits are merged by their log-sum-exp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxpar.pallas_kernels import versions
from jaxpar.pallas_kernels.attention.merging import merge
from jaxpar.pallas_kernels.decode.tpu_kernel import Settings, decode
from jaxpar.pallas_kernels.formats.elements import Int
from jaxpar.pallas_kernels.formats.quantised import Quantised
from jaxpar.pallas_kernels.formats.scales import Float32
from jaxpar.pallas_kernels.tiles import Row, look_up

LANES = 128
LARGEST_HEAD = 256
MOST_QUERIES = 16
MOST_ROWS = 1024
"""Queries times heads."""
MOST_SCALES = 16
"""Of one head of one token."""
ROWS = 16
"""Rows of a tile of bfloat16."""


@dataclass(frozen=True)
class DecodeTiles:
    """How much of the cache a step takes, and how often a row is divided.

    Attributes:
      keys: tokens times key/value heads in a block, at most. Pages are blocks, whatever their size.
      splits: of a row, which the cores of a chip share; 1 where there is one core.
    """

    keys: int
    splits: int


TABLE = (
    Row(DecodeTiles(2048, 2), chips=("v5p",), most=(("rows", 64), ("head_size", 128))),
    Row(DecodeTiles(2048, 1), most=(("rows", 64), ("head_size", 128))),
    Row(DecodeTiles(1024, 2), chips=("v5p",), most=(("rows", 256),)),
    Row(DecodeTiles(1024, 1), most=(("rows", 256),)),
    Row(DecodeTiles(256, 1)),
)
"""By queries times heads, and head size. That they compile for every chip is tested; which are fastest has not been measured."""


def misfit(q, k, v, lens, *, scale, window=None, cap=None, layer=None, table_BxP=None) -> str | None:
    """Why the kernel cannot do this call, as the end of a sentence; None where it can."""
    (B, T, H, K), S = q.shape, k.shape[-3]
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"takes queries in bfloat16 or float32, got {q.dtype}"
    if K % 8 or K > LARGEST_HEAD:
        return f"takes a head size that is a multiple of 8 up to {LARGEST_HEAD}, got {K}"
    if not 1 <= T <= MOST_QUERIES or T * H > MOST_ROWS:
        return f"takes 1 to {MOST_QUERIES} queries a row and {MOST_ROWS} with all heads, got {T} and {T * H}"
    if not B * S * (1 if table_BxP is None else table_BxP.shape[1]):
        return f"needs a row and a slot at least, got {B} and {S}"
    if not isinstance(k, Quantised):
        known = k.dtype in (jnp.bfloat16, jnp.float32)
        return None if known else f"takes keys and values in bfloat16 or float32, got {k.dtype}"
    element, scales = k.format.element, k.scales.shape[-1]
    if not (isinstance(element, Int) and element.bits in (4, 8) and isinstance(k.format.scale, Float32)):
        return f"takes keys and values in int8 or int4 with float32 scales, got {k.format.name}"
    if k.format.block == "tensor":
        return f"takes one scale a row or a block of it, got {k.format.name}"
    if scales > MOST_SCALES:
        return f"takes at most {MOST_SCALES} scales a head, got {scales} of {k.format.name}"
    return None


def decode_mosaic_tpu(
    q_BxTxHxK, k, v, lens_B, *, scale, window=None, cap=None, layer=None, table_BxP=None, interpret=False, tiles=None
):
    """See `api.decode_attention`: out, and lse.

    Args:
      interpret: True, or `pltpu.InterpretParams`, to run in an interpreter.
      tiles: instead of those of the table.
    """
    B, T, H, K = q_BxTxHxK.shape
    G = k.shape[-2]
    rows = rows_of(T, H)
    places = k.shape[-3]
    slots = places if table_BxP is None else places * table_BxP.shape[1]
    if tiles is None:
        sizes = dict(rows=rows, head_size=K, slots=slots)
        op = "decode_attention", "mosaic_tpu"
        tiles = look_up(TABLE, versions.device_kind("tpu"), op=op, dtype=kept_name(k), **sizes)
    tokens = block_tokens(tiles, places, G) if table_BxP is None else places
    bits = k.format.element.bits if isinstance(k, Quantised) else None
    settings = Settings(
        scale,
        cap,
        window is not None,
        tiles.splits,
        T,
        G,
        slots,
        tokens,
        bits,
        jax.lax.Precision.HIGHEST if q_BxTxHxK.dtype == jnp.float32 else None,
    )
    first, count = needed(settings, lens_B, window)
    steps = -(-most_blocks(settings, window) // tiles.splits)
    scalars = (first, count, lens_B, _one(0 if window is None else window), _one(0 if layer is None else layer))
    table = jnp.zeros((1, 1), jnp.int32) if table_BxP is None else table_BxP
    arrays = {"q": _queries(q_BxTxHxK, rows, bits), **_labels(settings, rows, H)}
    for name, x in (("k", k), ("v", v)):
        arrays |= _stored(name, x, layer)
    outs = _call(settings, rows, steps, table_BxP is not None, interpret)(scalars, table, arrays)
    out, lse = merge(outs[0], outs[1], 1)
    out = jnp.moveaxis(out, 1, -1).reshape(B, rows, K)[:, : T * H] if bits == 4 else out[:, 0, : T * H]
    lse = jnp.swapaxes(lse[:, 0, : T * H].reshape(B, T, H), 1, 2)
    return out.reshape(B, T, H, K).astype(q_BxTxHxK.dtype), lse


def rows_of(queries: int, heads: int) -> int:
    """M: queries with all heads, in whole tiles."""
    return _up(queries * heads, ROWS)


def kept_name(k) -> str:
    """How the tuning cache names the dtype of a key/value cache: "bfloat16", "int4_row"."""
    return k.format.name if isinstance(k, Quantised) else jnp.dtype(k.dtype).name


def block_tokens(tiles: DecodeTiles, slots: int, groups: int) -> int:
    """Tokens of a block: whole tiles, in which the scales of a block are a row, or all there are."""
    unit = LANES // math.gcd(LANES, groups)
    return min(max(tiles.keys // groups // unit * unit, unit), slots)


def needed(settings: Settings, lens_B, window):
    """int32 [B] each: the first block that a row's queries see, and how many from there on."""
    first = jnp.zeros_like(lens_B)
    if window is not None:
        first = jnp.maximum(lens_B - settings.queries - window + 1, 0) // settings.tokens
        # A row that has run far past its slots.
        first = jnp.minimum(first, (settings.slots - 1) // settings.tokens)
    behind = -(-jnp.minimum(lens_B, settings.slots) // settings.tokens)
    return first, jnp.maximum(behind - first, 0)


def most_blocks(settings: Settings, window) -> int:
    """How many blocks a row can need."""
    every = -(-settings.slots // settings.tokens)
    if not isinstance(window, int):
        return every
    # Tokens that a row's queries see stand in a row; at worst they begin with the last of a block.
    return min(every, (window + settings.queries - 2) // settings.tokens + 2)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _one(number):
    return jnp.reshape(jnp.asarray(number, jnp.int32), (1,))


def _queries(q_BxTxHxK, rows: int, bits):
    """[B, parts, M, K/parts]: even and odd channels apart where two of them share a byte of the keys."""
    B, T, H, K = q_BxTxHxK.shape
    q = jnp.pad(q_BxTxHxK.reshape(B, T * H, K), ((0, 0), (0, rows - T * H), (0, 0)))
    return jnp.moveaxis(q.reshape(B, rows, K // 2, 2), -1, 1) if bits == 4 else q[:, None]


def _labels(settings: Settings, rows: int, heads: int) -> dict:
    """Of each row of the queries its key/value head and its query; of each row of a block its head. Padding has no head."""
    n, G = np.arange(rows), settings.groups
    head = np.where(n < settings.queries * heads, n % heads // (heads // G), -1)
    columns = np.arange(settings.tokens * G)[None] % G
    return {
        "q_labels": jnp.asarray(np.stack([head, n // heads], axis=1), jnp.int32),
        "k_labels": jnp.asarray(columns, jnp.int32),
    }


def _stored(name: str, x, layer) -> dict:
    """Keys or values by the kernel's names: as they lie in memory, [L, rows or pages, tokens · G, K], and the layer's scales
    turned to [rows or pages, J, tokens · G], J of a head.

    A TPU pads what it reads to 128 numbers a row: scales as they lie would take more bytes than the codes.
    """
    layers = lambda part: part[None] if layer is None else part
    joined = lambda part: part.reshape(*part.shape[:-3], -1, part.shape[-1])
    if not isinstance(x, Quantised):
        return {name: joined(layers(x))}
    scales = x.scales if layer is None else x.scales[layer]
    return {name: joined(layers(x.codes)), f"{name}_scales": jnp.swapaxes(joined(scales), -1, -2)}


def _call(settings: Settings, rows: int, steps: int, paged: bool, interpret):
    """`(scalars, table, arrays) -> out [B, splits, parts, M, K/parts], lse [B, splits, 1, M]`, float32."""

    def place(b, split, step, first, count, lens, window, layer, table):
        """The layer, the row or page, and the block of it."""
        block, _ = settings.block(split, step, first[b], count[b])
        return (layer[0], table[b, block], 0) if paged else (layer[0], b, block)

    def scales_place(*grid):
        _, at, block = place(*grid)
        return at, 0, block

    def spec(name, x):
        if name.endswith("labels"):
            return pl.BlockSpec(x.shape, lambda *_: (0, 0))
        if name == "q":
            return pl.BlockSpec((None, *x.shape[1:]), lambda b, *_: (b, 0, 0, 0))
        keys = settings.tokens * settings.groups
        if name.endswith("scales"):
            return pl.BlockSpec((None, x.shape[1], keys), scales_place)
        return pl.BlockSpec((None, None, keys, x.shape[-1]), lambda *grid: (*place(*grid), 0))

    def run(scalars, table, arrays):
        B, parts, _, width = arrays["q"].shape
        shape = (B, settings.splits, parts, rows, width)
        outs = {"out": shape, "lse": (*shape[:2], 1, rows, 1)}
        inside = {"top": (rows, LANES), "total": (rows, LANES), "sum": shape[2:]}
        if paged:
            # Also where a row has no page at all, something must be fetched.
            table = jnp.clip(table, 0, arrays["k"].shape[1] - 1)
        out, lse = pl.pallas_call(
            partial(decode, settings, (*arrays, *outs, *inside)),
            out_shape=[versions.out_shape(size, jnp.float32, *scalars, table, arrays) for size in outs.values()],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=6,
                grid=(B, settings.splits, steps),
                in_specs=[spec(name, x) for name, x in arrays.items()],
                out_specs=[
                    pl.BlockSpec((None, None, *size[2:]), lambda b, split, *_: (b, split, 0, 0, 0))
                    for size in outs.values()
                ],
                scratch_shapes=[pltpu.VMEM(size, jnp.float32) for size in inside.values()],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
            interpret=interpret,
            name="decode_attention",
        )(*scalars, table, *arrays.values())
        return out, lse[..., 0]

    return run
