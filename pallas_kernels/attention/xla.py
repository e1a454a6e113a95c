"""Attention in plain XLA: blocks of queries, so that causal keys which no query of a block sees are never touched.

Its gradient is written out: from the output and the log-sum-exp it makes each block's weights again without a second
softmax, as flash attention does (Dao et al. 2022, algorithm 4), so that what is kept is linear in T.
"""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpar.pallas_kernels.attention.mask import MaskSpec

BLOCK = 32
"""Queries in a block, at least."""
ATTENTION_OUT, ATTENTION_LSE = "attention_out", "attention_lse"
"""What a rematerialisation policy may keep, so that the backward pass does not begin with the forward pass."""
MOST_BLOCKS = 4
"""Blocks are unrolled; 4 of them do 62 % of the work of the whole square. On two CPU cores, 8 were no faster."""


def attention_xla(
    q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, *, mask: MaskSpec, scale: float, cap: float | None = None, q_start=0, k_start=0
):
    """As `attention_reference`; the causal square is cut into blocks of queries where its place is known.

    Differentiable in reverse mode, as often as wanted; not in forward mode (`attention_reference` is).

    Returns:
      out [B, T, H, K] in q's dtype, lse [B, H, T] float32 (float64 for float64 inputs).
    """
    blocks = _blocks(mask, q_BxTxHxK.shape[1], k_BxSxGxK.shape[1], q_start, k_start)
    return _attention(blocks, scale, cap, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask, (q_start, k_start))


def _blocks(mask: MaskSpec, T: int, S: int, q_start, k_start) -> tuple[tuple[int, int, int, int], ...]:
    """`(first, last, begin, end)`: queries first ... last - 1 see no key outside of begin ... end - 1."""
    count = min(MOST_BLOCKS, T // BLOCK)
    known = isinstance(q_start, int) and isinstance(k_start, int) and mask.q_index is None and mask.k_index is None
    if not (mask.causal and known) or count < 2:
        return ((0, T, 0, S),)
    found = []
    for first, last in itertools.pairwise(T * i // count for i in range(count + 1)):
        # Keys from the first query's window on, up to the last query itself.
        end = min(max(q_start + last - k_start, 1), S)
        begin = 0
        if isinstance(mask.window, int):
            begin = min(max(q_start + first - mask.window + 1 - k_start, 0), end - 1)
        found.append((first, last, begin, end))
    return tuple(found)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _attention(blocks, scale, cap, q, k, v, mask, starts):
    return _forward(blocks, scale, cap, q, k, v, mask, starts)[0]


def _forward(blocks, scale, cap, q_BxTxHxK, k, v, mask, starts):
    B, T, H, K = q_BxTxHxK.shape
    G = k.shape[2]
    precise = jnp.promote_types(q_BxTxHxK.dtype, jnp.float32)
    # Query heads g·(H/G) .. share key/value head g: R of them, without repeating keys or values.
    q = q_BxTxHxK.reshape(B, T, G, H // G, K)
    outs, lses = [], []
    for block in blocks:
        begin, end = block[2:]
        logits, _ = _logits(block, scale, cap, q, k, mask, starts)
        top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
        # A row that sees nothing has top = -inf; -inf - -inf would be NaN.
        top = jnp.where(top == -jnp.inf, 0, top)
        weights = jnp.exp(logits - top)
        total = jnp.sum(weights, axis=-1)
        empty = total == 0
        lse = jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1, total)) + top[..., 0])
        out = jnp.einsum("bgrts,bsgk->btgrk", weights.astype(v.dtype), v[:, begin:end], preferred_element_type=precise)
        # Divided after the product: T x K divisions instead of T x S.
        share = jnp.where(empty, 1, total)
        outs.append(out / jnp.transpose(share, (0, 3, 1, 2))[..., None])
        lses.append(lse)
    out = (outs[0] if len(outs) == 1 else jnp.concatenate(outs, 1)).reshape(B, T, H, K).astype(q.dtype)
    lse = (lses[0] if len(lses) == 1 else jnp.concatenate(lses, -1)).reshape(B, H, T)
    out, lse = checkpoint_name(out, ATTENTION_OUT), checkpoint_name(lse, ATTENTION_LSE)
    return (out, lse), (q_BxTxHxK, k, v, mask, starts, out, lse)


def _logits(block, scale, cap, q, k, mask, starts):
    """Masked logits [B, G, R, queries, keys] of a block in float32 or better, and the cap's slope (None without)."""
    first, last, begin, end = block
    precise = jnp.promote_types(q.dtype, jnp.float32)
    logits = scale * jnp.einsum("btgrk,bsgk->bgrts", q[:, first:last], k[:, begin:end], preferred_element_type=precise)
    slope = None
    if cap is not None:
        bent = jnp.tanh(logits / cap)
        logits, slope = cap * bent, 1 - bent**2
    seen = mask.visible((first, last - first), (begin, end - begin), q_start=starts[0], k_start=starts[1])
    if seen is not None:
        logits = jnp.where(seen[:, None, None], logits, -jnp.inf)
    return logits, slope


def _backward(blocks, scale, cap, kept, cotangents):
    q_BxTxHxK, k, v, mask, starts, out, lse_BxHxT = kept
    d_out, d_lse = cotangents
    B, T, H, K = q_BxTxHxK.shape
    S, G = k.shape[1:3]
    grouped = lambda x: x.reshape(B, T, G, H // G, K)
    q, d_out = grouped(q_BxTxHxK), grouped(d_out)
    precise = lse_BxHxT.dtype
    # What the softmax takes off each row: the sum over keys of weight · gradient of the weight is out · d_out.
    drop = jnp.sum(d_out.astype(precise) * grouped(out).astype(precise), axis=-1)
    drop = jnp.transpose(drop, (0, 2, 3, 1)) - d_lse.reshape(B, G, H // G, T)
    lse = lse_BxHxT.reshape(B, G, H // G, T)
    lse = jnp.where(lse == -jnp.inf, 0, lse)
    dqs, dks, dvs = [], [], []
    for block in blocks:
        first, last, begin, end = block
        d_rows = d_out[:, first:last]
        logits, slope = _logits(block, scale, cap, q, k, mask, starts)
        weights = jnp.exp(logits - lse[..., first:last, None])
        d_weights = jnp.einsum("btgrk,bsgk->bgrts", d_rows, v[:, begin:end], preferred_element_type=precise)
        d_logits = weights * (d_weights - drop[..., first:last, None])
        if slope is not None:
            d_logits = d_logits * slope
        d_logits = (scale * d_logits).astype(q.dtype)
        dqs.append(jnp.einsum("bgrts,bsgk->btgrk", d_logits, k[:, begin:end]))
        # The small operand first: where a backend must copy to transpose, it is not the T x S one.
        over_rows = partial(jnp.einsum, "btgrk,bgrts->bgks", preferred_element_type=precise)
        dks.append(over_rows(q[:, first:last], d_logits))
        dvs.append(over_rows(d_rows, weights.astype(v.dtype)))
    dq = (dqs[0] if len(dqs) == 1 else jnp.concatenate(dqs, 1)).reshape(q_BxTxHxK.shape).astype(q.dtype)
    spans = [block[2:] for block in blocks]
    whole = lambda parts, like: jnp.transpose(_add_up(parts, spans, S), (0, 3, 1, 2)).astype(like.dtype)
    return dq, whole(dks, k), whole(dvs, v), None, None


_attention.defvjp(_forward, _backward)


def _add_up(parts, spans, S: int):
    """The sum of parts [..., end - begin] that lie at `(begin, end)` of S keys.

    Put together piece by piece: padding each part to S keys first would move far more memory.
    """
    if spans == [(0, S)]:
        return parts[0]
    edges = sorted({0, S, *itertools.chain(*spans)})
    pieces = []
    for begin, end in itertools.pairwise(edges):
        covering = [
            x[..., begin - b : end - b] for x, (b, e) in zip(parts, spans, strict=True) if b <= begin and end <= e
        ]
        nothing = jnp.zeros_like(parts[0], shape=(*parts[0].shape[:-1], end - begin))
        pieces.append(sum(covering[1:], covering[0]) if covering else nothing)
    return jnp.concatenate(pieces, axis=-1)
