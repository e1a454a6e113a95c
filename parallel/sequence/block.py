"""One block of attention, some queries with some keys: its partial result, and its share of the gradients.

Forward it is `jaxpar.pallas_kernels.attention.attention`. Backward it is `attention_gradients` by the same
implementation, because the ring knows the log-sum-exp over *all* keys, and because the results must be float32: parts that
are rounded to bfloat16 before they are summed lose more with each device (ring-flash-attention, issue 42).
"""

from __future__ import annotations

from jaxpar.pallas_kernels.attention import MaskSpec, attention
from jaxpar.pallas_kernels.attention import attention_gradients as gradients
from jaxpar.pallas_kernels.attention.block import dropped, masked_logits
from jaxpar.parallel.sequence.merge import Partial

__all__ = ["attend", "dropped", "gradients", "masked_logits"]


def attend(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask: MaskSpec, **call) -> Partial:
    """The partial result of these queries over these keys, in float32. `call`: as `attention` takes it."""
    out, lse = attention(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask, lse_out=True, **call)
    return out.astype(lse.dtype), lse
