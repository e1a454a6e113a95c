"""Merging attention over parts of the keys by their log-sum-exp, in float32.

    out = Σ_i exp(lse_i - lse) out_i,   lse = log Σ_i exp(lse_i)

Every weight is at most 1 and they sum to 1, so that each merge adds one rounding of a convex combination: the error
does not grow with the number of parts beyond that (Liu et al. 2023, "Ring Attention", §3; Milakov & Gimelshein 2018).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Partial = tuple[jax.Array, jax.Array]
"""`(out [B, T, H, K], lse [B, H, T])`, both float32 (float64 for float64 inputs)."""


def empty(q_BxTxHxK: jax.Array) -> Partial:
    """The partial result over no keys: 0 and -inf."""
    B, T, H, _ = q_BxTxHxK.shape
    precise = jnp.promote_types(q_BxTxHxK.dtype, jnp.float32)
    return jnp.zeros(q_BxTxHxK.shape, precise), jnp.full((B, H, T), -jnp.inf, precise)


def merge(one: Partial, other: Partial) -> Partial:
    """The partial result over both sets of keys. Rows that see no key in a part have lse -inf there.

    No intermediate overflows whatever the size of the logits; the gradient of a row without keys is 0.
    """
    out_a, lse_a = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in one)
    out_b, lse_b = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in other)
    top = jnp.maximum(lse_a, lse_b)
    # A row without keys in either: -inf - -inf would be NaN.
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    weight_a, weight_b = jnp.exp(lse_a - top), jnp.exp(lse_b - top)
    total = weight_a + weight_b
    nothing = total == 0
    total = jnp.where(nothing, 1, total)
    lse = jnp.where(nothing, -jnp.inf, top + jnp.log(total))
    return out_a * by_row(weight_a / total) + out_b * by_row(weight_b / total), lse


def by_row(x_BxHxT: jax.Array) -> jax.Array:
    """[B, H, T] -> [B, T, H, 1], to multiply outputs with."""
    return jnp.swapaxes(x_BxHxT, 1, 2)[..., None]
