"""Attention as the formula says it: the yardstick of every implementation, differentiated by JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention.mask import MaskSpec


def attention_reference(
    q_BxTxHxK,
    k_BxSxGxK,
    v_BxSxGxK,
    *,
    mask: MaskSpec,
    scale: float,
    cap: float | None = None,
    q_start=0,
    k_start=0,
    sinks_H=None,
):
    """`softmax(mask(cap(scale · q kᵀ))) v` and its log-sum-exp, holding the full [B, H, T, S] weights.

    Logits and softmax run in float32, or float64 where the inputs are; weights are multiplied with `v` in v's dtype.

    Returns:
      out [B, T, H, K] in q's dtype, lse [B, H, T] float32 (float64 for float64 inputs).
    """
    B, T, H, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    precise = jnp.promote_types(q_BxTxHxK.dtype, jnp.float32)
    # Query heads g·(H/G) .. share key/value head g: R of them, without repeating keys or values.
    q = q_BxTxHxK.reshape(B, T, G, H // G, K)
    logits = jnp.einsum("btgrk,bsgk->bgrts", q, k_BxSxGxK, preferred_element_type=precise) * scale
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    seen = mask.visible((0, T), (0, S), q_start=q_start, k_start=k_start)
    if seen is not None:
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
    if sinks_H is not None:
        sinks = sinks_H.astype(precise).reshape(1, G, H // G, 1, 1)
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    # A row that sees nothing has top = -inf; -inf - -inf would be NaN, forward and backward.
    weights = jnp.exp(logits - jnp.where(top == -jnp.inf, 0, top))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks_H is not None:
        total = total + jnp.exp(sinks - top)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, jnp.log(total) + top)
    out = jnp.einsum("bgrts,bsgk->btgrk", (weights / total).astype(v_BxSxGxK.dtype), v_BxSxGxK)
    return out.reshape(B, T, H, K).astype(q_BxTxHxK.dtype), lse.reshape(B, H, T)
