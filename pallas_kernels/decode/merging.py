"""Attention over some of the keys and over the others, merged to attention over all of them."""

from __future__ import annotations

import jax.numpy as jnp


def merge(outs, lses, axis: int):
    """Partial results over disjoint sets of keys, each with its own softmax, as one softmax over all keys.

    out = Σ exp(lse_i - lse) out_i, lse = log Σ exp(lse_i) (flash-decoding; Dao et al. 2023).

    Args:
      outs, lses: float32; lses has outs' dimensions but for the last one. Parts lie along `axis`, counted from the front.

    Returns:
      out and lse without `axis`. Where no part has seen a key, out is 0 and lse -inf.
    """
    top = jnp.max(lses, axis=axis, keepdims=True)
    # Nothing was seen: top = -inf, and -inf - -inf would be NaN.
    level = jnp.where(top == -jnp.inf, 0, top)
    shares = jnp.exp(lses - level)
    total = jnp.sum(shares, axis=axis, keepdims=True)
    empty = total == 0
    whole = jnp.where(empty, 1, total)
    out = jnp.sum(outs * (shares / whole)[..., None], axis=axis)
    return out, jnp.squeeze(jnp.where(empty, -jnp.inf, jnp.log(whole) + level), axis)
