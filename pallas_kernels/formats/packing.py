"""Codes of 4 and 6 bits in whole bytes, along one axis.

4 bits    two a byte:        byte  = c0 | c1 << 4
6 bits    four in 3 bytes:   bytes = c0 | c1 << 6,  c1 >> 2 | c2 << 4,  c2 >> 4 | c3 << 2      (the first in the low end)
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _split(x: jax.Array, axis: int, count: int) -> list[jax.Array]:
    """Every count-th along a negative axis, from 0, 1, ...; read off a new dimension, which partitions evenly."""
    at = x.ndim + axis
    grouped = x.reshape(*x.shape[:at], x.shape[at] // count, count, *x.shape[at + 1 :])
    return [jax.lax.index_in_dim(grouped, i, at + 1, keepdims=False) for i in range(count)]


def _join(parts: list[jax.Array], axis: int) -> jax.Array:
    """The inverse of `_split`."""
    at = parts[0].ndim + axis
    joined = jnp.stack(parts, axis=at + 1)
    return joined.reshape(*joined.shape[:at], -1, *joined.shape[at + 2 :])


def pack(codes: jax.Array, bits: int, axis: int) -> jax.Array:
    """uint8 codes, one a value, to bytes; `axis` (negative) becomes bits/8 of its size. Other widths than 4, 6 stay bytes."""
    if bits == 4:
        low, high = _split(codes, axis, 2)
        return low | (high << 4)
    if bits == 6:
        a, b, c, d = _split(codes, axis, 4)
        return _join([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], axis)
    return codes


def unpack(data: jax.Array, bits: int, axis: int) -> jax.Array:
    """The inverse of `pack`."""
    if bits == 4:
        return _join([data & 15, data >> 4], axis)
    if bits == 6:
        x, y, z = _split(data, axis, 3)
        return _join([x & 63, (x >> 6) | ((y & 15) << 2), (y >> 4) | ((z & 3) << 4), z >> 2], axis)
    return data
