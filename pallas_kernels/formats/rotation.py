"""Hadamard rotation: spreads outliers over a block before it is quantised, and leaves products as they are.

R = diag(signs) H / sqrt(n), with Sylvester's H of ±1: R Rᵀ = 1, so (x R)(wᵀ R)ᵀ = x w. INT v.s. FP (arXiv 2510.25602) rotates
both operands of a product along what it sums over.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp


def signs(key, size: int) -> jax.Array:
    """float32 [size] of ±1."""
    return jax.random.rademacher(key, (size,), jnp.float32)


def rotate(x, block: int | None = None, axis: int = -1, *, signs: jax.Array | None = None, inverse: bool = False):
    """Each `block` neighbours along `axis` times the orthonormal Hadamard matrix; computed in float32, given in x's dtype.

    By additions of pairs, log2(block) times: for n a power of 4 the factor 1/sqrt(n) is exact.

    Args:
      x: float array.
      block: a power of two that divides the axis; None takes all of it.
      signs: [size of the axis] of ±1, multiplied before the matrix; None for none.
      inverse: undo a rotation with the same block and signs.

    Raises:
      ValueError: a block that is no power of two, or does not divide the axis.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"rotate needs floats, got {x.dtype}")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"rotate: axis = {axis}, but the array has the shape {x.shape}")
    at = axis % x.ndim
    size = x.shape[at]
    block = size if block is None else block
    if block < 1 or block & (block - 1) or size % block:
        divisor = size & -size
        raise ValueError(
            f"rotate {size} values in blocks of {block}: a block is a power of two that divides {size}, so "
            + (f"at most {divisor}" if size else "the axis needs values")
        )
    if signs is not None and signs.shape != (size,):
        raise ValueError(f"rotate: signs of the shape {signs.shape} for an axis of {size}")
    return _rotate(x, signs, at, block, inverse)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _rotate(x, signs, at: int, block: int, inverse: bool):
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    line = None if signs is None else jnp.expand_dims(signs.astype(y.dtype), [i for i in range(x.ndim) if i != at])
    if line is not None and not inverse:
        y = y * line
    before, behind, half = x.shape[:at], x.shape[at + 1 :], 1
    while half < block:
        pairs = y.reshape(*before, x.shape[at] // (2 * half), 2, half, *behind)
        a, b = (jax.lax.index_in_dim(pairs, i, at + 1, keepdims=False) for i in (0, 1))
        y = jnp.stack([a + b, a - b], axis=at + 1).reshape(x.shape)
        half *= 2
    y = y * (1 / math.sqrt(block))
    if line is not None and inverse:
        y = y * line
    return y.astype(x.dtype)
