"""Ring attention with an online softmax: keys and values travel, queries stay.

Liu et al. 2023, "Ring Attention with Blockwise Transformers", algorithm 1. At step j device r attends to the keys of
device r - j and passes them on at the same time: N - 1 hops, none wasted. With `both_ways` half of the keys goes up the
ring and half down, so that each direction of a link carries half; the number of hops stays.

Runs inside `jax.shard_map`.
"""

from __future__ import annotations

import jax.numpy as jnp

from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.parallel.sequence import block
from jaxpar.parallel.sequence.gradient import with_ring_gradient
from jaxpar.parallel.sequence.merge import Partial, empty, merge
from jaxpar.parallel.sequence.walk import Labels, Plan, Walk, prepare, run_if


def ring_attention(
    q_BxTxHxK,
    k_BxTxGxK,
    v_BxTxGxK,
    *,
    mask: MaskSpec,
    scale: float,
    layout: str,
    axis: str,
    cap: float | None = None,
    both_ways: bool = False,
    implementation: str | None = None,
    interpret=False,
):
    """Attention over a sequence that lies along a mesh axis. T are the tokens of this device.

    Args:
      mask: its arrays are this device's shards. Without indices of its own, tokens have those of the layout.
      layout: one of `layouts.LAYOUTS`.
      axis: the mesh axis, manual in the surrounding `shard_map`.
      both_ways: let half of the keys and values travel each way.
      implementation, interpret: as in `attention`, of each block, forward and backward. A kernel asks for a `shard_map` that
        is manual over every axis of the mesh; the interpreter for one without `check_vma`.

    Returns:
      out [B, T, H, K] in q's dtype and lse [B, H, T] in float32, both differentiable.

    Raises:
      ValueError: a shard that the layout, or travelling both ways, cannot split.
    """
    plan, *arrays = prepare(
        q_BxTxHxK,
        k_BxTxGxK,
        v_BxTxGxK,
        mask=mask,
        layout=layout,
        axis=axis,
        scale=scale,
        cap=cap,
        both_ways=both_ways,
        implementation=implementation,
        interpret=interpret,
    )
    return with_ring_gradient(_forward, plan, *arrays)


def _forward(plan: Plan, q, k, v, labels: Labels) -> Partial:
    walk = Walk(plan, q, labels)
    queries = walk.queries(q=q)
    state = walk.start([empty(chunk["q"]) for chunk in queries])
    visit = lambda state, step, held: (_visit(walk, queries, state, step, held), None)
    state, _ = walk.round(walk.keys(k=k, v=v), state, visit)
    outs, lses = zip(*state, strict=True)
    return jnp.concatenate(outs, axis=1).astype(q.dtype), jnp.concatenate(lses, axis=2)


def _visit(walk: Walk, queries: list[Labels], state: list[Partial], step, held) -> list[Partial]:
    """The state after this device's queries have seen the keys that are here at a step."""
    plan, state = walk.plan, list(state)
    for _, kc, key, source, offsets in walk.blocks(held, step):
        for qc, query in enumerate(queries):
            at = (walk.rank, qc), (source, kc)

            def more(old, at=at, query=query, key=key):
                mask = walk.mask(*at, query, key)
                return merge(old, block.attend(query["q"], key["k"], key["v"], mask, **plan.call))

            state[qc] = run_if(walk.seen(*at, query, key, offsets), more, state[qc])
    return state
