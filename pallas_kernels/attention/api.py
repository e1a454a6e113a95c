"""The public function, and the choice of an implementation."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention import cudnn
from jaxpar.pallas_kernels.attention.mask import MaskSpec
from jaxpar.pallas_kernels.attention.xla import attention_xla

IMPLEMENTATIONS = ("xla", "cudnn")
"""What `implementation` may name."""


def attention(
    q_BxTxHxK,
    k_BxSxGxK,
    v_BxSxGxK,
    *,
    mask: MaskSpec,
    scale: float,
    cap: float | None = None,
    q_start=0,
    k_start=0,
    lse_out: bool = False,
    implementation: str | None = None,
):
    """`softmax(mask(cap(scale · q kᵀ))) v` for each head. Letters: B batch, T queries, S keys, H heads, K head size.

    Differentiable in reverse mode; `attention_reference` in forward mode too.

    Args:
      q_BxTxHxK: queries.
      k_BxSxGxK, v_BxSxGxK: keys and values; G divides H, and query heads g·H/G ... (g+1)·H/G - 1 share head g.
      mask: which keys a query sees. A query that sees none gives 0, log-sum-exp -inf, and zero gradients.
      scale: multiplies the logits.
      cap: soft cap `cap·tanh(logits / cap)`, before the mask.
      q_start, k_start: the index of query 0 and of key 0 (int or int32 scalar, may be traced), so that a block of a
        longer sequence is masked as it is there.
      lse_out: also return the log-sum-exp of each query's logits, with which partial results over parts of the keys
        are merged. It is differentiable.
      implementation: "xla" (plain XLA, blocks of queries), "cudnn" (bfloat16 and float16 on NVIDIA
        GPUs), or None: cuDNN where the call is lowered for such a GPU and fits its limits, else "xla".

    Returns:
      out [B, T, H, K] in q's dtype; with `lse_out` also lse [B, H, T], float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or a named one that cannot do this call.
    """
    _check_shapes(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, cap)
    mask.check(q_BxTxHxK.shape[0], q_BxTxHxK.shape[1], k_BxSxGxK.shape[1])
    arguments = dict(mask=mask, scale=scale, cap=cap, q_start=q_start, k_start=k_start)

    def xla(q, k, v):
        out, lse = attention_xla(q, k, v, **arguments)
        return (out, lse) if lse_out else out

    match implementation:
        case "xla":
            return xla(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK)
        case "cudnn":
            if reason := cudnn.misfit(q_BxTxHxK, k_BxSxGxK, lse_out=lse_out, **arguments) or cudnn.absent():
                raise ValueError(f'attention with implementation="cudnn" {reason}; use implementation="xla"')
            return cudnn.attention_cudnn(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask, scale=scale)
        case None:
            if cudnn.misfit(q_BxTxHxK, k_BxSxGxK, lse_out=lse_out, **arguments) or cudnn.absent():
                return xla(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK)
            # A process with a GPU may still lower this call for its CPU: decided there, not here.
            return jax.lax.platform_dependent(
                q_BxTxHxK,
                k_BxSxGxK,
                v_BxSxGxK,
                cuda=lambda q, k, v: cudnn.attention_cudnn(q, k, v, mask=mask, scale=scale),
                default=xla,
            )
        case _:
            raise ValueError(
                f"unknown attention implementation {implementation!r}; choose one of "
                f"{', '.join(repr(name) for name in IMPLEMENTATIONS)}, or None"
            )


def _check_shapes(q, k, v, cap) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"attention needs q [B, T, H, K] and k, v [B, S, G, K] of one shape; got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q {q.shape} and k {k.shape} must agree in batch and head size, and the {q.shape[2]} query "
            f"heads must be a multiple of the {k.shape[2]} key/value heads"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"attention needs q, k, v of one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if cap is not None and not cap > 0:
        raise ValueError(f"attention's soft cap must be positive, got {cap}; use None for no cap")
