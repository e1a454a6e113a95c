"""Products of few rows of x in bfloat16 with weights in 4 or 8 bits on Hopper GPUs, codes widened by each warp for itself: how the
kernel is called (`gpu_codes`: what it does)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels import gpu, versions
from jaxpar.pallas_kernels.formats.quantised import Quantised
from jaxpar.pallas_kernels.matmul import gpu_codes, mosaic_gpu
from jaxpar.pallas_kernels.matmul.gpu_codes import CodeTiles
from jaxpar.pallas_kernels.matmul.products import operands_name
from jaxpar.pallas_kernels.tiles import Row, look_up

NAME = "mosaic_gpu_codes"
TABLE = (Row(CodeTiles(64, 2, 528), most=(("bits", 4), ("rows", 8))), Row(CodeTiles(64, 2, 396)))
"""Tiles by the bits of a code and rows of x: four blocks in a multiprocessor, or three. That they compile and fit is tested;
nothing has been measured."""


def misfit(a, b, axes, dtype) -> str | None:
    """Why the kernel does not multiply these operands, as the end of a sentence; None where it does."""
    if reason := mosaic_gpu.misfit_few_rows(a, b, axes, dtype):
        return reason
    if (M := a.shape[0]) > gpu_codes.MOST:
        return f"takes up to {gpu_codes.MOST} rows of x, got {M}"
    bits, K = b.format.element.bits, b.shape[-2]
    if (least := gpu_codes.depth_of(bits)) > K:
        return f"takes K of at least {least} with {bits} bits, got {K}"
    return None


def product_mosaic_gpu_codes(
    x, w: Quantised, axes, dtype, *, interpret=False, tiles: CodeTiles | None = None
) -> jax.Array:
    """`products.product` of operands without a `misfit`: [M, N] in bfloat16.

    Args:
      interpret: True, or `plgpu.InterpretGPUParams`, to run in an interpreter (from JAX 0.11 on).
      tiles: instead of those of the table.
    """
    assert jnp.dtype(dtype) == jnp.bfloat16
    if tiles is None:
        op, name = ("quant_matmul", NAME), operands_name(x, w, dtype)
        sizes = mosaic_gpu.sizes_of(x, w, axes)
        tiles = look_up(TABLE, versions.device_kind("cuda"), op=op, dtype=name, **sizes)
    more = dict(bits=w.format.element.bits, tiles=tiles, interpret=gpu.interpreter(interpret))
    return gpu_codes.product(x, **mosaic_gpu.stored(w), **more)
