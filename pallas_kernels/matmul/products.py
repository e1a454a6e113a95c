"""One product of two matrices, each an array or in a number format, with plain XLA.

    both integers, float32 scales      int8 · int8 summed in int32, exactly; scales behind the sum (of each group, for scales
                                       a group)
    both 8-bit floats, a scale a       float8 · float8 summed in float32; scales behind the sum. Where a chip has no such
    tensor or row                      product, XLA widens the operands, which changes nothing
    all else                           values with the scales of their blocks in them (exact in bfloat16 for MX and NV
                                       blocks), summed in float32; scales a tensor or row behind the sum

A sum over a block of 32 with its scale behind it would be the same numbers, and on Hopper slower: the multiplications by
scales outweigh what the narrower product saves.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.formats.elements import Int
from jaxpar.pallas_kernels.formats.packing import unpack
from jaxpar.pallas_kernels.formats.quantised import Quantised, split
from jaxpar.pallas_kernels.formats.scales import Float32
from jaxpar.pallas_kernels.varying import alike

FLOAT8 = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2}


def product(a, b, axes: tuple[int, int], dtype) -> jax.Array:
    """Σ over `axes[0]` of a and `axes[1]` of b: [the other dimension of a, the other one of b].

    Args:
      a, b: 2-dimensional; those in a number format are quantised along their axis here.
      axes: each -1 or -2.
      dtype: of what is multiplied where an operand is in floating point: the compute dtype.

    Returns:
      float32 (float64 for float64 operands).

    Raises:
      ValueError: a sum of integers that int32 cannot hold.
    """
    if integer(a) and integer(b):
        return _integers(a, b, axes)
    if (a8 := _float8(a)) is not None and (b8 := _float8(b)) is not None:
        return _scaled(_dot(a8, b8, axes, jnp.float32), (a.scales, b.scales), axes)
    (a, outside_a), (b, outside_b) = (_inside(x, dtype) for x in (a, b))
    return _scaled(_dot(a, b, axes, jnp.promote_types(dtype, jnp.float32)), (outside_a, outside_b), axes)


def integer(x) -> bool:
    """Whether it is whole numbers with float32 scales."""
    if not isinstance(x, Quantised):
        return False
    element = x.format.element
    return isinstance(element, Int) and element.fraction == 0 and isinstance(x.format.scale, Float32)


def operands_name(a, b, dtype) -> str:
    """How the tuning cache names the dtype of a product: "int8_row x int8_row", "bfloat16 x int4_g128"."""
    return " x ".join(x.format.name if isinstance(x, Quantised) else jnp.dtype(dtype).name for x in (a, b))


def integers(q: Quantised) -> jax.Array:
    """int8 of q's shape."""
    return q.format.element.integers(unpack(q.codes, q.format.stored_bits, q.axis))


def _float8(x):
    """The array as float8, where its scales lie outside of a sum; else None."""
    if not isinstance(x, Quantised) or not isinstance(x.format.scale, Float32) or x.scales.shape[x.axis] != 1:
        return None
    kind = FLOAT8.get(x.format.element.name)
    return None if kind is None else jax.lax.bitcast_convert_type(x.codes, kind)


def _inside(x, dtype):
    return split(x, dtype) if isinstance(x, Quantised) else (x.astype(dtype), None)


def _dot(a, b, axes, kind):
    return jax.lax.dot_general(a, b, (((axes[0] % 2,), (axes[1] % 2,)), ((), ())), preferred_element_type=kind)


def _scaled(y_MxN, scales, axes):
    """y times the scales of a, which are [M, 1], [1, M] or [1, 1], and those of b likewise."""
    a, b = scales
    if a is not None:
        y_MxN = y_MxN * (a if axes[0] == -1 else a.T)
    if b is not None:
        y_MxN = y_MxN * (b if axes[1] == -2 else b.T)
    return y_MxN


def _integers(a: Quantised, b: Quantised, axes) -> jax.Array:
    size = a.shape[axes[0]]
    groups = math.lcm(a.scales.shape[axes[0]], b.scales.shape[axes[1]])
    largest = size // groups * _magnitude(a) * _magnitude(b)
    if largest >= 2**31:
        raise ValueError(
            f"a sum of {size // groups} products of {a.format.name} and {b.format.name} may reach {largest}, beyond int32; "
            f"take groups of at most {2**31 // (_magnitude(a) * _magnitude(b))} values, for instance int8_g128"
        )
    return grouped(integers(a), a.scales, integers(b), b.scales, axes, groups)


def _magnitude(q: Quantised) -> int:
    return 2 ** (q.format.element.bits - 1)


def grouped(a, scales_a, b, scales_b, axes, groups: int) -> jax.Array:
    """Σ over groups of (Σ over a group of a · b, in int32) · scales of the group, in float32: [M, N].

    Args:
      a, b: int8.
      scales_a, scales_b: float32, along the axis one for each group, or for several of them.
    """
    if groups == 1:
        return _scaled(_dot(a, b, axes, jnp.int32).astype(jnp.float32), (scales_a, scales_b), axes)
    # Group by group, so that what is there at a time is one product's size.
    operands = zip((a, b, scales_a, scales_b), (*axes, *axes), strict=True)
    parts = [_cut(x, axis, groups) for x, axis in operands]

    def body(total, group):
        x, y, scale_x, scale_y = group
        return total + _scaled(_dot(x, y, axes, jnp.int32).astype(jnp.float32), (scale_x, scale_y), axes), None

    other = lambda x, axis: x.shape[-1 - (axis + 2)]
    start, *parts = alike(jnp.zeros((other(a, axes[0]), other(b, axes[1])), jnp.float32), *parts)
    return jax.lax.scan(body, start, tuple(parts))[0]


def _cut(x, axis: int, groups: int):
    """[groups, ...]: the axis cut; a scale of several groups is there for each."""
    if x.shape[axis] < groups:
        x = jnp.repeat(x, groups // x.shape[axis], axis)
    at = axis % 2
    parts = x.reshape(*x.shape[:at], groups, x.shape[at] // groups, *x.shape[at + 1 :])
    return jnp.moveaxis(parts, at, 0)
