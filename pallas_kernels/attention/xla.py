"""Attention in plain XLA: blocks of queries, so that causal keys which no query of a block sees are never touched."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention.mask import MaskSpec
from jaxpar.pallas_kernels.attention.reference import attention_reference

BLOCK = 32
"""Queries in a block, at least."""
MOST_BLOCKS = 4
"""Blocks are unrolled; 4 of them do 62 % of the work of the whole square. On two CPU cores, 8 were no faster."""


def attention_xla(
    q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, *, mask: MaskSpec, scale: float, cap: float | None = None, q_start=0, k_start=0
):
    """As `attention_reference`; the causal square is cut into blocks of queries where its place is known.

    Each block's weights are made again in the backward pass (`jax.checkpoint`): what is kept is linear in T.

    Returns:
      out [B, T, H, K] in q's dtype, lse [B, H, T] float32 (float64 for float64 inputs).
    """
    T, S = q_BxTxHxK.shape[1], k_BxSxGxK.shape[1]
    count = min(MOST_BLOCKS, T // BLOCK)
    known = isinstance(q_start, int) and isinstance(k_start, int) and mask.q_index is None and mask.k_index is None
    if not (mask.causal and known) or count < 2:
        return attention_reference(
            q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask, scale=scale, cap=cap, q_start=q_start, k_start=k_start
        )
    edges = [T * i // count for i in range(count + 1)]
    parts = []
    for first, last in itertools.pairwise(edges):
        # Keys from the first query's window on, up to the last query itself.
        end = min(max(q_start + last - k_start, 1), S)
        begin = 0
        if isinstance(mask.window, int):
            begin = min(max(q_start + first - mask.window + 1 - k_start, 0), end - 1)
        parts.append(
            _block(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask, scale, cap, q_start, k_start, first, last, begin, end)
        )
    outs, lses = zip(*parts, strict=True)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2)


def _block(q, k, v, mask: MaskSpec, scale, cap, q_start, k_start, first, last, begin, end):
    """Queries first ... last - 1 against keys begin ... end - 1."""
    cut_q = lambda x: None if x is None else x[:, first:last]
    cut_k = lambda x: None if x is None else x[:, begin:end]
    part = mask.replace(q_segments=cut_q(mask.q_segments), k_segments=cut_k(mask.k_segments))

    @jax.checkpoint
    def run(q, k, v):
        return attention_reference(
            q, k, v, mask=part, scale=scale, cap=cap, q_start=q_start + first, k_start=k_start + begin
        )

    return run(cut_q(q), cut_k(k), cut_k(v))
