"""cuDNN's flash attention through `jax.nn.dot_product_attention`, and what it cannot do."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention.mask import MaskSpec


def misfit(
    q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, *, mask: MaskSpec, scale, cap=None, q_start=0, k_start=0, lse_out=False
) -> str | None:
    """Why cuDNN cannot do this call, as the end of a sentence; None where it can."""
    size = q_BxTxHxK.shape[3]
    if q_BxTxHxK.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16, got {q_BxTxHxK.dtype}"
    if size % 8 or size > 128:
        return f"takes a head size that is a multiple of 8 up to 128, got {size}"
    if cap is not None:
        return f"has no soft cap, got cap = {cap}"
    if lse_out:
        return "gives no differentiable log-sum-exp, which lse_out and sinks need"
    if mask.q_index is not None or mask.k_index is not None:
        return "counts indices from 0, but the mask has q_index or k_index"
    if not (isinstance(q_start, int) and isinstance(k_start, int) and q_start == k_start) and (
        mask.causal or mask.window is not None
    ):
        return f"counts queries and keys from one index, but q_start = {q_start}, k_start = {k_start}"
    if mask.window is not None and not (isinstance(mask.window, int) and mask.causal):
        return "takes a window known at compile time and with a causal mask only"
    if mask.q_segments is not None and (q_BxTxHxK.shape[1] % 2 or k_BxSxGxK.shape[1] % 2):
        return f"takes even lengths with segments, got {q_BxTxHxK.shape[1]} queries and {k_BxSxGxK.shape[1]} keys"
    return None


def attention_cudnn(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, *, mask: MaskSpec, scale: float):
    """out [B, T, H, K]. Call it where `misfit` gives None.

    Segments become an additive [B, 1, T, S] mask, one for all heads; causality and window are cuDNN's own.
    """
    seen = rows = None
    if mask.q_segments is not None:
        documents = MaskSpec(causal=False, q_segments=mask.q_segments, k_segments=mask.k_segments)
        seen = documents.visible((0, q_BxTxHxK.shape[1]), (0, k_BxSxGxK.shape[1]))
        whole = mask.visible((0, q_BxTxHxK.shape[1]), (0, k_BxSxGxK.shape[1]))
        rows = jnp.any(whole, axis=-1)
        seen = jnp.broadcast_to(seen, (q_BxTxHxK.shape[0], *seen.shape[1:]))
    out = jax.nn.dot_product_attention(
        q_BxTxHxK,
        k_BxSxGxK,
        v_BxSxGxK,
        mask=None if seen is None else seen[:, None],
        scale=scale,
        is_causal=mask.causal,
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation="cudnn",
    )
    # cuDNN averages all values where a query sees no key.
    return out if rows is None else jnp.where(rows[:, :, None, None], out, 0)
