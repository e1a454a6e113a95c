"""Merging attention over parts of the keys, each with its own softmax, by their log-sum-exp: splits of a cache, and rings.

    out = Σ_i exp(lse_i - lse) out_i,   lse = log Σ_i exp(lse_i)

(Milakov & Gimelshein 2018; flash-decoding, Dao et al. 2023; Liu et al. 2023, "Ring Attention", §3). Every weight is at most 1
and they sum to 1, so that a merge adds one rounding of a convex combination: the error does not grow with the number of
parts beyond that. No intermediate overflows whatever the size of the logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def weights(lses, axis: int):
    """What each part counts for in the whole.

    Args:
      lses: float32 or better, -inf where a part has seen no key. Parts lie along `axis`.

    Returns:
      the weights, of lses' shape, and the log-sum-exp over all keys, without `axis`. Where no part has seen a key, weights
      are 0 and it is -inf. Differentiable: the gradient is 0 there.
    """
    top = jnp.max(lses, axis=axis, keepdims=True)
    # Nothing was seen: -inf - -inf would be NaN.
    top = jax.lax.stop_gradient(jnp.where(top == -jnp.inf, 0, top))
    each = jnp.exp(lses - top)
    total = jnp.sum(each, axis=axis, keepdims=True)
    nothing = total == 0
    whole = jnp.where(nothing, 1, total)
    return each / whole, jnp.squeeze(jnp.where(nothing, -jnp.inf, top + jnp.log(whole)), axis)


def merge(outs, lses, axis: int):
    """Partial results over disjoint sets of keys as one over all of them.

    Args:
      outs, lses: float32; lses has outs' dimensions but for the last one. Parts lie along `axis`, counted from the front.

    Returns:
      out and lse without `axis`. Where no part has seen a key, out is 0 and lse -inf.
    """
    parts, lse = weights(lses, axis)
    return jnp.sum(outs * parts[..., None], axis=axis), lse
