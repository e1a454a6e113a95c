"""Rows in int8 for Hopper GPUs by Pallas' Mosaic GPU backend, in one pass: XLA reads x once for its scales and again for its
codes.

A block is a warpgroup with a row in its registers: the largest magnitude, the scale, the quotients. All of it is the float32
arithmetic that XLA's program has, with its division, so that codes and scales are the same bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu, versions
from jaxpar.pallas_kernels.formats.elements import Int
from jaxpar.pallas_kernels.formats.format import Format
from jaxpar.pallas_kernels.formats.scales import TINY, Float32
from jaxpar.pallas_kernels.tiles import chip

THREADS = 128
MOST = 16384
"""Values of a row: 128 a thread. More do not fit its registers."""
FEWEST, FEWEST_ROWS = 640, 64
"""Values of a row, and rows, from which on None chooses it: the fewest of those measured on an H200, 2.0 to 2.7 times as fast as
XLA, by the calls that `experiments/bench/kernels.py` has under "quantising" since."""


def misfit(x, fmt: Format, axis: int, key, stacked: int) -> str | None:
    """Why the kernel cannot quantise this, as the end of a sentence; None where it can."""
    kind = versions.device_kind("cuda")
    if kind is not None and chip(kind) != "hopper":
        return f"is written for Hopper GPUs, and here is a {kind}"
    element = fmt.element
    if not (
        isinstance(fmt.scale, Float32)
        and fmt.block == "row"
        and isinstance(element, Int)
        and (element.bits, element.symmetric, element.fraction) == (8, True, 0)
    ):
        return f"gives symmetric int8 with a float32 scale a row, got {fmt.name}"
    if axis != -1:
        return f"quantises along the last dimension, got axis {axis}"
    if key is not None:
        return "rounds to the nearest, got a key"
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"takes bfloat16, float16 or float32, got {x.dtype}"
    if x.shape[-1] % THREADS or not 0 < x.shape[-1] <= MOST:
        return f"takes rows of multiples of {THREADS} values, up to {MOST}, got {x.shape[-1]}"
    if not x.size:
        return f"takes a row at least, got the shape {x.shape}"
    return None


def unwise(x, fmt: Format, axis: int, key, stacked: int) -> str | None:
    """Why None leaves this to XLA."""
    rows = x.size // x.shape[-1]
    if x.shape[-1] >= FEWEST and rows >= FEWEST_ROWS:
        return None
    return (
        f"has been seen to be faster than XLA for {FEWEST_ROWS} rows of {FEWEST} values or more, so that only its name "
        "chooses it elsewhere"
    )


def rows_in_int8(vector: int, x, codes, scales) -> None:
    """A row of `x` [M, K]: int8 `codes` [M, K] and float32 `scales` [M].

    Args:
      vector: neighbours that a thread reads at once.
    """
    row = lax.axis_index("row")
    values = gpu.load(x.at[row], plgpu.Layout.WG_STRIDED((x.shape[1],), vec_size=vector)).astype(jnp.float32)
    # Subnormals count as zero.
    values = jnp.where(jnp.abs(values) < TINY, jnp.float32(0), values)
    amax = jnp.max(jnp.abs(values))
    scale = jnp.maximum(amax * (np.float32(1) / np.float32(127)), TINY)
    # Not for NaN either: of a row with NaN or infinity in it nothing is known.
    scale = jnp.where(amax < jnp.inf, scale, jnp.float32(jnp.nan))
    quotients = values / lax.broadcast_in_dim(scale, values.shape, [])
    quotients = jnp.where(quotients == quotients, quotients, jnp.float32(0))
    codes[row] = jnp.round(quotients, 0).astype(jnp.int32).astype(jnp.int8)
    scales[row] = scale


def quantise_mosaic_gpu(x, *, interpret=False) -> tuple[jax.Array, jax.Array]:
    """uint8 codes of x's shape and float32 scales [..., 1], for an x without a `misfit`."""
    rows, K = x.size // x.shape[-1], x.shape[-1]
    a_thread = K // THREADS
    call = gpu.kernel(
        lambda *refs: rows_in_int8(next(n for n in (8, 4, 2, 1) if a_thread % n == 0), *refs),
        [versions.out_shape((rows, K), jnp.int8, x), versions.out_shape((rows,), jnp.float32, x)],
        grid={"row": rows},
        warpgroups=1,
        approximate=False,
        interpret=interpret,
        name="quantise_rows",
    )
    codes, scales = call(x.reshape(rows, K))
    return lax.bitcast_convert_type(codes, jnp.uint8).reshape(x.shape), scales.reshape(*x.shape[:-1], 1)
