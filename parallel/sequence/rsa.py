"""Ring Self-Attention as published: a ring of keys for the scores of whole rows, a softmax, then a ring of values.

Li et al. 2021, "Sequence Parallelism: Long Sequence Training from System Perspective", §3.2. Each device holds the
scores of its T queries with all N·T keys, [B, H, T, N·T]: memory falls as 1/N, and is quadratic in the length.

Two differences. Scores of blocks that are wholly masked are not computed. The gradient is the one of the other rings
(`gradient`): the published one sums full-length gradients of keys and values with an all-reduce, and its program
divides them by N, which is wrong. Runs inside `jax.shard_map`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.parallel.sequence import block
from jaxpar.parallel.sequence.gradient import with_ring_gradient
from jaxpar.parallel.sequence.merge import Partial, by_row
from jaxpar.parallel.sequence.walk import Labels, Plan, Walk, prepare, run_if


def ring_self_attention(
    q_BxTxHxK,
    k_BxTxGxK,
    v_BxTxGxK,
    *,
    mask: MaskSpec,
    scale: float,
    layout: str,
    axis: str,
    cap: float | None = None,
    implementation: str | None = None,
):
    """As `ring.ring_attention`, in two phases. Scores, softmax and the blocks of the gradient are plain XLA.

    Raises:
      ValueError: an implementation other than "xla" or None, besides what a ring raises.
    """
    if implementation not in (None, "xla"):
        raise ValueError(
            f'Ring Self-Attention holds whole rows of scores and has no implementation {implementation!r}; use "xla"'
        )
    options = dict(scale=scale, cap=cap, implementation="xla")
    plan, *arrays = prepare(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, mask=mask, layout=layout, axis=axis, **options)
    return with_ring_gradient(_forward, plan, *arrays)


def _forward(plan: Plan, q, k, v, labels: Labels) -> Partial:
    B, T, H, K = q.shape
    G = k.shape[2]
    walk = Walk(plan, q, labels)
    queries = walk.queries(q=q)
    precise = jnp.promote_types(q.dtype, jnp.float32)

    def score(state, step, held):
        return state, _scores(walk, queries, step, held)

    def add(out, step, held):
        weights = jax.lax.dynamic_index_in_dim(weights_NxBxGxRxTxS, step, keepdims=False)
        return _add_values(walk, queries, weights, out, step, held), None

    _, logits = walk.round(walk.keys(k=k), (), score)
    top = jnp.max(logits, axis=(0, -1), keepdims=True)
    top = jnp.where(top == -jnp.inf, 0, top)
    weights_NxBxGxRxTxS = jnp.exp(logits - top)
    total = jnp.sum(weights_NxBxGxRxTxS, axis=(0, -1))
    nothing = total == 0
    lse = jnp.where(nothing, -jnp.inf, jnp.log(jnp.where(nothing, 1, total)) + top[0, ..., 0])
    out = [walk.start(jnp.zeros((B, walk.q_chunks.count, G, H // G, K), precise)) for _ in queries]
    out, _ = walk.round(walk.keys(v=v), out, add)
    out = jnp.concatenate(out, axis=1).reshape(B, T, H, K)
    share = jnp.where(nothing, 1, total).reshape(B, H, T)
    return (out / by_row(share)).astype(q.dtype), lse.reshape(B, H, T)


def _scores(walk: Walk, queries: list[Labels], step, held) -> jax.Array:
    """Logits [B, G, R, T, S] of this device's queries with the keys that are here; -inf where hidden."""
    rows = [[] for _ in queries]
    for _, kc, key, source, offsets in walk.blocks(held, step):
        for qc, query in enumerate(queries):
            at = (walk.rank, qc), (source, kc)
            (B, t, H, _), (s, G) = query["q"].shape, key["k"].shape[1:3]
            dtype = jnp.promote_types(query["q"].dtype, jnp.float32)
            hidden = walk.start(jnp.full((B, G, H // G, t, s), -jnp.inf, dtype))

            def some(_, at=at, query=query, key=key):
                return block.masked_logits(query["q"], key["k"], walk.mask(*at, query, key), **walk.plan.numbers)[0]

            rows[qc].append(run_if(walk.seen(*at, query, key, offsets), some, hidden))
    return jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rows], axis=-2)


def _add_values(walk: Walk, queries, weights_BxGxRxTxS, out, step, held) -> list:
    """Adds weights · values of the keys that are here to each chunk's sum [B, t, G, R, K]."""
    out = list(out)
    t, s = walk.q_chunks.count, walk.k_chunks.count
    for _, kc, key, source, offsets in walk.blocks(held, step):
        for qc, query in enumerate(queries):
            part = weights_BxGxRxTxS[..., qc * t : (qc + 1) * t, kc * s : (kc + 1) * s]

            def more(old, part=part, value=key["v"]):
                return old + jnp.einsum(
                    "bgrts,bsgk->btgrk", part.astype(value.dtype), value, preferred_element_type=old.dtype
                )

            seen = walk.seen((walk.rank, qc), (source, kc), query, key, offsets)
            out[qc] = run_if(seen, more, out[qc])
    return out
