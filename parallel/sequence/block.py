"""One block of attention, some queries with some keys: its partial result, and its share of the gradients.

Forward it is `jaxpar.pallas_kernels.attention.attention`. Backward it is written out, because the ring knows the
log-sum-exp over *all* keys: with it a block's final weights come without a second softmax and without the block's own
output (Dao et al. 2022, algorithm 4), and because the results must be float32: parts that are rounded to bfloat16
before they are summed lose more with each device (ring-flash-attention, issue 42).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention import MaskSpec, attention
from jaxpar.parallel.sequence.merge import Partial


def attend(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask: MaskSpec, *, scale, cap, implementation) -> Partial:
    """The partial result of these queries over these keys, in float32."""
    out, lse = attention(
        q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask, scale=scale, cap=cap, lse_out=True, implementation=implementation
    )
    return out.astype(lse.dtype), lse


def masked_logits(q_BxTxHxK, k_BxSxGxK, mask: MaskSpec, *, scale, cap) -> tuple[jax.Array, jax.Array | None]:
    """Logits [B, G, R, T, S] (R = H / G) in float32 or better, -inf where hidden; the cap's slope, None without."""
    B, T, H, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    precise = jnp.promote_types(q_BxTxHxK.dtype, jnp.float32)
    q = q_BxTxHxK.reshape(B, T, G, H // G, K)
    logits = scale * jnp.einsum("btgrk,bsgk->bgrts", q, k_BxSxGxK, preferred_element_type=precise)
    slope = None
    if cap is not None:
        bent = jnp.tanh(logits / cap)
        logits, slope = cap * bent, 1 - bent**2
    seen = mask.visible((0, T), (0, S))
    if seen is not None:
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    return logits, slope


def gradients(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, d_out_BxTxHxK, lse_BxHxT, drop_BxHxT, mask: MaskSpec, *, scale, cap):
    """What this block adds to the gradients of q, k and v.

    Args:
      lse_BxHxT: the log-sum-exp over all keys, of this block and all others.
      drop_BxHxT: what the softmax takes off each row, Σ out · d_out over the head size, less the cotangent of lse.

    Returns:
      dq [B, T, H, K], dk [B, S, G, K], dv [B, S, G, K], float32 or better.
    """
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxSxGxK.shape[2]
    R = H // G
    logits, slope = masked_logits(q_BxTxHxK, k_BxSxGxK, mask, scale=scale, cap=cap)
    precise = logits.dtype
    q, d_out = (x.reshape(B, T, G, R, K) for x in (q_BxTxHxK, d_out_BxTxHxK))
    lse, drop = (x.reshape(B, G, R, T, 1) for x in (lse_BxHxT, drop_BxHxT))
    weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0, lse))
    d_weights = jnp.einsum("btgrk,bsgk->bgrts", d_out, v_BxSxGxK, preferred_element_type=precise)
    d_logits = scale * weights * (d_weights - drop)
    if slope is not None:
        d_logits = d_logits * slope
    d_logits = d_logits.astype(q.dtype)
    dq = jnp.einsum("bgrts,bsgk->btgrk", d_logits, k_BxSxGxK, preferred_element_type=precise)
    dk = jnp.einsum("bgrts,btgrk->bsgk", d_logits, q, preferred_element_type=precise)
    dv = jnp.einsum("bgrts,btgrk->bsgk", weights.astype(v_BxSxGxK.dtype), d_out, preferred_element_type=precise)
    return dq.reshape(B, T, H, K), dk, dv
