"""Attention sinks: a logit for each head that takes part in every softmax and has no value (gpt-oss, arXiv 2508.10925).

A query may give a part of its attention to nothing. A kernel need not know: with Z the sum of the exponentials of a query's
logits,

    out' = out · Z / (Z + exp(sink)) = out · sigmoid(lse - sink)        lse' = log(Z + exp(sink))

and the log-sum-exp is there and differentiable. So every implementation that gives it has sinks, partial results get them
after they are merged, and their gradient needs no kernel either.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def with_sinks(out_BxTxHxK, lse_BxHxT, sinks_H):
    """out and lse of attention as they are with sinks, in the same dtypes: out is rounded once more.

    A query that sees nothing has the output 0 still, and its sink as log-sum-exp.

    Args:
      sinks_H: finite.
    """
    sinks_1xHx1 = sinks_H.astype(lse_BxHxT.dtype)[None, :, None]
    share_BxTxH = jnp.swapaxes(jax.nn.sigmoid(lse_BxHxT - sinks_1xHx1), 1, 2)
    out = (out_BxTxHxK * share_BxTxH[..., None]).astype(out_BxTxHxK.dtype)
    return out, jnp.logaddexp(lse_BxHxT, sinks_1xHx1)


def check_sinks(op: str, sinks_H, heads: int) -> None:
    """Raises ValueError where there is not one float a head."""
    if sinks_H is not None and (sinks_H.shape != (heads,) or not jnp.issubdtype(sinks_H.dtype, jnp.floating)):
        raise ValueError(f"{op} needs a float sink for each of the {heads} heads; got {sinks_H.dtype} {sinks_H.shape}")
