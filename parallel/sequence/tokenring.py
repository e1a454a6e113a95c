"""TokenRing: keys stay, queries travel one way, and partial results travel back to their queries at the same time.

Wang et al. 2024, "TokenRing", §3 and algorithm 1. At step j device r holds the queries of device r - j; their partial
result over r's keys goes straight back, j hops, while the queries go on. Both directions of a link carry data. That
needs links between all pairs (on a torus the way back takes j hops), and it does not pay with grouped queries: a query
and an output are H / G times as large as a key (`choose.bytes_per_link`).

The published program has no gradient in the zigzag layout and a ring's in the contiguous one. Here each layout has the
ring's (`gradient`). Runs inside `jax.shard_map`.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.parallel.sequence import block
from jaxpar.parallel.sequence.gradient import with_ring_gradient
from jaxpar.parallel.sequence.merge import Partial, empty, merge
from jaxpar.parallel.sequence.walk import Labels, Plan, Walk, cut, prepare, run_if, send


def tokenring_attention(
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
    interpret=False,
):
    """As `ring.ring_attention`, by moving queries. Partial outputs travel in q's dtype, their log-sum-exps in float32.

    Each step's way back is a permutation of its own, so the steps are N copies in the program.
    """
    options = dict(scale=scale, cap=cap, implementation=implementation, interpret=interpret)
    plan, *arrays = prepare(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, mask=mask, layout=layout, axis=axis, **options)
    return with_ring_gradient(_forward, plan, *arrays)


def _forward(plan: Plan, q, k, v, labels: Labels) -> Partial:
    walk = Walk(plan, q, labels)
    keys = [key for _, _, key, _, _ in walk.blocks(walk.keys(k=k, v=v), 0)]
    guests = {"q": q, "segments": labels["q_segments"], "index": labels["q_index"]}
    state = _visit(walk, guests, keys, 0)
    for step in range(1, walk.shards):
        guests = send(guests, plan.axis, 1)
        out, lse = _visit(walk, guests, keys, step)
        # Nothing in the next turn waits for the way back.
        state = merge(state, send((out.astype(q.dtype), lse), plan.axis, -step))
    return state[0].astype(q.dtype), state[1]


def _visit(walk: Walk, guests: Labels, keys: list[Labels], step: int) -> Partial:
    """What the queries that are here at a step find in this device's keys."""
    plan, count, parts = walk.plan, walk.q_chunks.count, []
    owner = (walk.rank - step) % walk.shards
    for qc in range(walk.q_chunks.starts.shape[1]):
        query = cut(guests, qc * count, count)
        part = walk.start(empty(query["q"]))
        for kc, key in enumerate(keys):
            at = (owner, qc), (walk.rank, kc)

            def more(old, at=at, query=query, key=key):
                mask = walk.mask(*at, query, key)
                return merge(old, block.attend(query["q"], key["k"], key["v"], mask, **plan.call))

            part = run_if(walk.seen(*at, query, key, [step]), more, part)
        parts.append(part)
    outs, lses = zip(*parts, strict=True)
    return jnp.concatenate(outs, axis=1), jnp.concatenate(lses, axis=2)
