"""One block of attention in plain XLA, some queries with some keys: its masked logits, and its share of the gradients.

Gradients are written out from the log-sum-exp over *all* keys, of this block and all others: the block's final weights come
without a second softmax and without the block's own output (Dao et al. 2022, algorithm 4). Rings and blocks of
queries sum these shares in float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention.mask import MaskSpec


def masked_logits(
    q_BxTxHxK, k_BxSxGxK, mask: MaskSpec, *, scale, cap, rows=None, cols=None, q_start=0, k_start=0
) -> tuple[jax.Array, jax.Array | None]:
    """Logits [B, G, R, T, S] (R = H / G) in float32 or better, -inf where hidden; the cap's slope, None without.

    Args:
      rows, cols: `(first, count)` of these queries and keys in the mask's arrays. None: the mask is of them alone.
      q_start, k_start: indices of query 0 and key 0 of the mask.
    """
    B, T, H, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    precise = jnp.promote_types(q_BxTxHxK.dtype, jnp.float32)
    # Query heads g·(H/G) .. share key/value head g: R of them, without repeating keys or values.
    q = q_BxTxHxK.reshape(B, T, G, H // G, K)
    logits = scale * jnp.einsum("btgrk,bsgk->bgrts", q, k_BxSxGxK, preferred_element_type=precise)
    slope = None
    if cap is not None:
        bent = jnp.tanh(logits / cap)
        logits, slope = cap * bent, 1 - bent**2
    seen = mask.visible(rows or (0, T), cols or (0, S), q_start=q_start, k_start=k_start)
    if seen is not None:
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    return logits, slope


def dropped(out_BxTxHxK, d_out_BxTxHxK, d_lse_BxHxT) -> jax.Array:
    """[B, H, T], what the softmax takes off each row's gradient: Σ out · d_out over K, less the cotangent of lse."""
    precise = d_lse_BxHxT.dtype
    rows_BxTxH = jnp.sum(d_out_BxTxHxK.astype(precise) * out_BxTxHxK.astype(precise), axis=-1)
    return jnp.swapaxes(rows_BxTxH, 1, 2) - d_lse_BxHxT


def gradients(
    q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, d_out_BxTxHxK, lse_BxHxT, drop_BxHxT, mask: MaskSpec, *, scale, cap, **place
):
    """What this block adds to the gradients of q, k and v.

    Args:
      lse_BxHxT: the log-sum-exp over all keys, of this block and all others.
      drop_BxHxT: see `dropped`.
      place: `rows`, `cols`, `q_start`, `k_start` of `masked_logits`.

    Returns:
      dq [B, T, H, K], dk [B, S, G, K], dv [B, S, G, K], float32 or better.
    """
    B, T, H, K = q_BxTxHxK.shape
    G = k_BxSxGxK.shape[2]
    R = H // G
    logits, slope = masked_logits(q_BxTxHxK, k_BxSxGxK, mask, scale=scale, cap=cap, **place)
    precise = logits.dtype
    q, d_out = (x.reshape(B, T, G, R, K) for x in (q_BxTxHxK, d_out_BxTxHxK))
    lse, drop = (x.reshape(B, G, R, T, 1) for x in (lse_BxHxT, drop_BxHxT))
    # A row that sees nothing has lse = -inf; -inf - -inf would be NaN.
    weights = jnp.exp(logits - jnp.where(lse == -jnp.inf, 0, lse))
    d_weights = jnp.einsum("btgrk,bsgk->bgrts", d_out, v_BxSxGxK, preferred_element_type=precise)
    d_logits = weights * (d_weights - drop)
    if slope is not None:
        d_logits = d_logits * slope
    d_logits = (scale * d_logits).astype(q.dtype)
    dq = jnp.einsum("bgrts,bsgk->btgrk", d_logits, k_BxSxGxK, preferred_element_type=precise)
    # The small operand first: where a backend must copy to transpose, it is not the T x S one.
    over_rows = lambda a, b: jnp.einsum("btgrk,bgrts->bgks", a, b, preferred_element_type=precise)
    dk, dv = over_rows(q, d_logits), over_rows(d_out, weights.astype(v_BxSxGxK.dtype))
    return dq.reshape(B, T, H, K), jnp.transpose(dk, (0, 3, 1, 2)), jnp.transpose(dv, (0, 3, 1, 2))
