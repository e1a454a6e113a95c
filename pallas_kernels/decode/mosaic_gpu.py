"""Flash-decoding for Hopper GPUs by Pallas' Mosaic GPU backend: how the kernel is called (`gpu_kernel`: what it does).

The grid is key/value heads x splits x rows. Which steps a row needs follows from its length and the window; the others are
neither copied nor computed. A page table is read where a copy's address is made. Each warpgroup's part of a row is written
with its log-sum-exp, and parts are merged by those (`jaxpar.pallas_kernels.attention.merging`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels import gpu, versions
from jaxpar.pallas_kernels.attention.merging import merge
from jaxpar.pallas_kernels.decode import gpu_kernel
from jaxpar.pallas_kernels.decode.gpu_kernel import COMPUTE, Settings
from jaxpar.pallas_kernels.decode.mosaic_tpu import MOST_QUERIES, kept_name, most_blocks, needed
from jaxpar.pallas_kernels.formats.elements import Int
from jaxpar.pallas_kernels.formats.quantised import Quantised
from jaxpar.pallas_kernels.formats.scales import Float32
from jaxpar.pallas_kernels.tiles import Row, chip, look_up

SIZES = (64, 128, 256)
"""Head sizes that tiles have."""
EIGHT = 8
"""Rows of shared memory's pattern: a copy takes whole ones."""
SMALLEST_PAGE, SMALLEST_PAGE_OF_CODES = EIGHT, 32
"""Slots: a whole pattern, and scales of whole 128 bytes."""
MOST_SCALES, LEAST_BYTES = 8, 16
"""Of a head of a token, and of the codes that share one."""
TOGETHER = 8
"""Key/value heads whose scales are copied together."""
LEAST_STEPS = 4
"""Of a split, where a row is divided."""


@dataclass(frozen=True)
class HopperDecodeTiles:
    """How much of the cache a step takes, and how often a row is divided.

    Attributes:
      tokens: of a step, 64 or 128.
      stages: steps that shared memory holds for each of the two warpgroups that compute.
      blocks: that are wanted at once: rows are divided so that whole rounds of so many come out.
    """

    tokens: int = 64
    stages: int = 2
    blocks: int = 132

    def __post_init__(self):
        if self.tokens not in (64, 128):
            raise ValueError(f"HopperDecodeTiles.tokens must be 64 or 128, got {self.tokens}")
        for name in ("stages", "blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"HopperDecodeTiles.{name} must be at least 1, got {getattr(self, name)}")


TABLE = (
    Row(HopperDecodeTiles(stages=5), most=(("bits", 4), ("head_size", 128))),
    Row(HopperDecodeTiles(stages=2), most=(("bits", 4),)),
    Row(HopperDecodeTiles(stages=3), most=(("bits", 8), ("head_size", 128))),
    Row(HopperDecodeTiles(stages=1), most=(("bits", 8),)),
    Row(HopperDecodeTiles(stages=4), most=(("head_size", 64),)),
    Row(HopperDecodeTiles(stages=2), most=(("head_size", 128),)),
    Row(HopperDecodeTiles(stages=1)),
)
"""Tiles by the bits of keys and values, and head size. That they compile for Hopper GPUs and fit their registers is tested;
which are fastest has not been measured."""


def misfit(q, k, v, lens, **more) -> str | None:
    """Why the kernel cannot do this call, as the end of a sentence; None where it can."""
    if reason := misfit_of_both(q, k, v, lens, **more):
        return reason
    if isinstance(k, Quantised) and bits_of(k) == 4 and q.shape[-1] < 128:
        return f"takes int4 from a head size of 128 on, got {q.shape[-1]}"
    return None


def misfit_of_both(q, k, v, lens, *, scale, window=None, cap=None, layer=None, table_BxP=None) -> str | None:
    """As `misfit`, of what `mosaic_gpu_codes` cannot do either."""
    (B, T, H, K), (places, G) = q.shape, k.shape[-3:-1]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes queries in bfloat16 or float16, got {q.dtype}"
    if K not in SIZES:
        return f"takes head sizes of {', '.join(map(str, SIZES[:-1]))} and {SIZES[-1]}, got {K}"
    if not 1 <= T <= MOST_QUERIES or T * (H // G) > gpu.ROWS:
        return f"takes 1 to {MOST_QUERIES} queries a row, and {gpu.ROWS} that share a key/value head, got {T} and {T * (H // G)}"
    if isinstance(k, Quantised):
        if reason := _misfit_codes(q, k, paged=table_BxP is not None):
            return reason
    elif k.dtype != q.dtype:
        return f"takes keys and values in the queries' dtype, {q.dtype}, got {k.dtype}"
    if not B:
        return "needs a row at least, got 0"
    if table_BxP is None and (places < 64 or places % EIGHT):
        return f"takes a cache of at least 64 slots, and of whole eights, got {places}"
    if table_BxP is not None and (places < SMALLEST_PAGE or places & (places - 1) or not table_BxP.shape[1]):
        return f"takes pages of a power of two of slots from {SMALLEST_PAGE} on, got {table_BxP.shape[1]} of {places}"
    kind = versions.device_kind("cuda")
    if kind is not None and chip(kind) != "hopper":
        return f"is written for Hopper GPUs, and here is a {kind}"
    return None


def _misfit_codes(q, k: Quantised, paged: bool) -> str | None:
    element, (places, _, K) = k.format.element, k.shape[-3:]
    if not (isinstance(element, Int) and element.bits in (4, 8) and isinstance(k.format.scale, Float32)):
        return f"takes keys and values in int8 or int4 with float32 scales, got {k.format.name}"
    if k.format.block == "tensor":
        return f"takes one scale a head of a token or a block of it, got {k.format.name}"
    blocks = k.scales.shape[-1]
    if blocks > MOST_SCALES or (blocks > 1 and element.bits * K // blocks < 8 * LEAST_BYTES):
        return f"takes blocks of {LEAST_BYTES} bytes of codes, {MOST_SCALES} a head at most, got {blocks} of {k.format.name}"
    if q.dtype != jnp.bfloat16:
        return f"takes queries in bfloat16 with {k.format.name}, got {q.dtype}"
    if paged and places < SMALLEST_PAGE_OF_CODES:
        return f"takes pages of at least {SMALLEST_PAGE_OF_CODES} slots with {k.format.name}, got {places}"
    return None


def decode_mosaic_gpu(
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
    rows = rows_of(T, H // G)
    if tiles is None:
        op, sizes = ("decode_attention", "mosaic_gpu"), sizes_of(q_BxTxHxK, k, slots)
        tiles = look_up(TABLE, versions.device_kind("cuda"), op=op, dtype=kept_name(k), **sizes)
    tokens = tiles.tokens if paged or places >= tiles.tokens else 64
    settings = Settings(
        scale,
        cap,
        window is not None,
        queries=T,
        shared=H // G,
        rows=rows,
        slots=slots,
        tokens=tokens,
        piece=min(tokens, places) if paged else tokens,
        page=places if paged else None,
        splits=1,
        stages=tiles.stages,
        size=K,
        dtype=q_BxTxHxK.dtype,
        bits=bits_of(k) if isinstance(k, Quantised) else None,
        blocks=k.scales.shape[-1] if isinstance(k, Quantised) else 1,
        heads=G if isinstance(k, Quantised) and together(G, k.scales.shape[-1]) else 0,
        interpret=bool(interpret),
    )
    splits = splits_of(B * G, most_blocks(settings, window), tiles.blocks)
    settings = Settings(**vars(settings) | {"splits": splits})
    arrays = {
        **which(settings, k, lens_B, window, layer, table_BxP),
        "q": _queries(q_BxTxHxK, G, rows, settings.parts),
        **stored("k", k, layer, settings.heads),
        **stored("v", v, layer, settings.heads),
    }
    parts = splits * COMPUTE
    shapes = {"out": (B, G, parts, rows, K), "lse": (B, G, parts, rows)}
    held = gpu_kernel.scratch(settings)
    call = gpu.kernel(
        partial(gpu_kernel.decode, settings, (*arrays, *shapes, *held)),
        [versions.out_shape(shape, jnp.float32, *arrays.values()) for shape in shapes.values()],
        grid={"group": G, "split": splits, "batch": B},
        warpgroups=COMPUTE + 1,
        scratch=held.values(),
        interpret=gpu.interpreter(interpret),
        name="decode_attention",
    )
    out, lse = merge(*call(*arrays.values()), axis=2)
    if settings.parts > 1:
        # The even channels are before the odd ones.
        out = jnp.swapaxes(out.reshape(*out.shape[:-1], 2, -1), -1, -2).reshape(out.shape)
    apart = lambda x: x[:, :, : T * (H // G)].reshape(B, G, T, H // G, *x.shape[3:])
    out = jnp.swapaxes(apart(out), 1, 2).reshape(B, T, H, K).astype(q_BxTxHxK.dtype)
    return out, jnp.swapaxes(apart(lse), 2, 3).reshape(B, H, T)


def which(settings, k, lens_B, window, layer, table_BxP) -> dict:
    """The steps of each row, its length, the first token that a window has and the layer's first row or page, [B, 5]; and the
    page table."""
    first, count = needed(settings, lens_B, window)
    low = jnp.zeros_like(lens_B) if window is None else lens_B - window
    base = jnp.zeros_like(lens_B)
    if layer is not None:
        base = base + jnp.asarray(layer, jnp.int32) * k.shape[-4]
    table = jnp.zeros((1, 1), jnp.int32) if table_BxP is None else jnp.clip(table_BxP, 0, k.shape[-4] - 1)
    return {"rows": jnp.stack([first, count, lens_B, low, base], axis=1), "table": table}


def sizes_of(q, k, slots: int) -> dict[str, int]:
    """What tiles are looked up by."""
    rows = rows_of(q.shape[1], q.shape[2] // k.shape[-2])
    return {"rows": rows, "head_size": q.shape[3], "slots": slots, "bits": bits_of(k)}


def bits_of(k) -> int:
    """Of a number of the cache."""
    return k.format.element.bits if isinstance(k, Quantised) else 8 * k.dtype.itemsize


def rows_of(queries: int, shared: int) -> int:
    """Queries with the heads that share a key/value head, in whole eights."""
    return -(-queries * shared // 8) * 8


def splits_of(pairs: int, steps: int, blocks: int) -> int:
    """In how many parts each row is divided: the fewest that keep nine tenths of the processors busy over whole rounds of
    `blocks`, of those that leave a part `LEAST_STEPS`; or the best there is.

    Args:
      pairs: rows times key/value heads.
      steps: of a row, at most.
    """
    most = max(min(steps // LEAST_STEPS, 2 * blocks), 1)
    busy = lambda n: pairs * n / (-(-pairs * n // blocks) * blocks)
    return next((n for n in range(1, most + 1) if busy(n) >= 0.9), max(range(1, most + 1), key=busy))


def _queries(q_BxTxHxK, G: int, rows: int, parts: int):
    """[parts, B, G, rows, K/parts]: as `grouped`, even and odd channels apart where two of them share a byte of the keys."""
    q = grouped(q_BxTxHxK, G, rows)
    return jnp.moveaxis(q.reshape(*q.shape[:3], -1, parts), -1, 0)


def grouped(q_BxTxHxK, G: int, rows: int):
    """[B, G, rows, K]: queries that share a key/value head together, a query's heads side by side, zeros behind them."""
    B, T, H, K = q_BxTxHxK.shape
    q = jnp.swapaxes(q_BxTxHxK.reshape(B, T, G, H // G, K), 1, 2).reshape(B, G, -1, K)
    return jnp.pad(q, ((0, 0), (0, 0), (0, rows - q.shape[2]), (0, 0)))


def together(groups: int, blocks: int) -> bool:
    """Whether scales are copied as they lie, those of all key/value heads of a token together: a tile of the matrix unit's
    columns of them, which no more of shared memory is there for. Others are turned beforehand, in XLA."""
    return groups == TOGETHER and blocks == 1


def stored(name: str, x, layer, as_they_lie) -> dict:
    """Keys or values by the kernel's names: as they lie in memory, [layers · rows or pages, tokens, G, K]; scales too
    without the last (`as_they_lie`), or one layer's turned to [rows or pages, G, blocks, tokens], so that those of a head's tokens
    are copied as one."""
    joined = lambda part: part.reshape(-1, *part.shape[-3:])
    if not isinstance(x, Quantised):
        return {name: joined(x)}
    codes = joined(jax.lax.bitcast_convert_type(x.codes, jnp.int8))
    if as_they_lie:
        return {name: codes, f"{name}_scales": joined(x.scales)[..., 0]}
    scales = jnp.moveaxis(x.scales if layer is None else x.scales[layer], 1, -1)
    # Rows of whole 16 bytes.
    return {name: codes, f"{name}_scales": jnp.pad(scales, (*((0, 0),) * 3, (0, -scales.shape[-1] % 4)))}
