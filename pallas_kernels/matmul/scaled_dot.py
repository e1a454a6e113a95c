"""`jax.lax.scaled_dot`: XLA's own product of blocks with scales, which some chips have as an instruction (MXFP8 and NVFP4 on
Blackwell). Elsewhere XLA multiplies values and scales in bfloat16 first, exactly, as our own product does."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.formats.packing import unpack
from jaxpar.pallas_kernels.formats.quantised import Quantised
from jaxpar.pallas_kernels.formats.scales import E4M3, E8M0
from jaxpar.pallas_kernels.matmul.products import FLOAT8

BLOCK = {E8M0: 32, E4M3: 16}


def misfit(a, b) -> str | None:
    """Why it cannot multiply these operands (formats, or None for an array). None: it can."""
    if not hasattr(jax.lax, "scaled_dot"):
        return f"needs jax.lax.scaled_dot, which this JAX ({jax.__version__}) does not have"
    for side, fmt in (("inputs", a), ("weights", b)):
        if fmt is None:
            return f"multiplies two operands in blocks, but {side} are in no number format"
        if fmt.element.name not in (*FLOAT8, "e2m1") or BLOCK.get(type(fmt.scale)) != fmt.block:
            return f"has mxfp8_e4m3, mxfp8_e5m2, mxfp4 and nvfp4, but {side} are {fmt.name}"
    return None


def product_scaled_dot(a: Quantised, b: Quantised, axes: tuple[int, int]) -> jax.Array:
    """As `products.product`: float32."""
    (x, scales_x), (y, scales_y) = _operand(a), _operand(b)
    contract = (((axes[0] % 2,), (axes[1] % 2,)), ((), ()))
    out = jax.lax.scaled_dot(
        x, y, lhs_scale=scales_x, rhs_scale=scales_y, dimension_numbers=contract, preferred_element_type=jnp.float32
    )
    for q in (a, b):
        out = out if q.tensor is None else out * q.tensor
    return out


def _operand(q: Quantised):
    codes = unpack(q.codes, q.format.stored_bits, q.axis)
    if q.format.element.name in FLOAT8:
        values = jax.lax.bitcast_convert_type(codes, FLOAT8[q.format.element.name])
    else:
        values = jax.lax.bitcast_convert_type(codes.astype(jnp.uint4), jnp.float4_e2m1fn)
    kind = jnp.float8_e8m0fnu if isinstance(q.format.scale, E8M0) else jnp.float8_e4m3fn
    return values, jax.lax.bitcast_convert_type(q.scales, kind)
