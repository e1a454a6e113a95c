"""The backward pass of every ring: a second ring, in which keys travel with the gradients that they collect.

Liu et al. 2023, appendix A: device r keeps its queries, its output and its log-sum-exp, and nothing of other devices.
Each block's share is of the implementation that its forward pass has. Gradients collect in float32. What the device's own
keys collect at home is added when the rest comes back, so that keys and values make N - 1 hops, and so do their gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from jaxpar.parallel.sequence import block
from jaxpar.parallel.sequence.merge import Partial
from jaxpar.parallel.sequence.walk import Labels, Plan, Walk, run_if


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_ring_gradient(forward: Callable, plan: Plan, q, k, v, labels: Labels) -> Partial:
    """`forward(plan, q, k, v, labels)` = (out, lse), differentiated by a ring of its own."""
    return forward(plan, q, k, v, labels)


def _forward(forward, plan, q, k, v, labels):
    out, lse = forward(plan, q, k, v, labels)
    return (out, lse), (q, k, v, labels, out, lse)


def _backward(forward, plan: Plan, kept, cotangents):
    q, k, v, labels, out, lse = kept
    d_out, d_lse = cotangents
    # Else the compiler sees that the first hop is that of the forward pass, and keeps a neighbour's keys until now. (On
    # CPU, where XLA drops barriers, it does.)
    k, v, d_out = jax.lax.optimization_barrier((k, v, d_out))
    walk = Walk(plan, q, labels)
    drop = block.dropped(out, d_out, d_lse)
    queries = walk.queries(q=q, d_out=d_out, lse=jnp.swapaxes(lse, 1, 2), drop=jnp.swapaxes(drop, 1, 2))
    for query in queries:
        query["lse"], query["drop"] = (jnp.swapaxes(query[name], 1, 2) for name in ("lse", "drop"))
    held = walk.keys(k=k, v=v)
    zeros = lambda x: walk.start(jnp.zeros(x.shape, lse.dtype))
    nothing = lambda: [{"k": zeros(x["k"]), "v": zeros(x["v"])} for x in held]
    dq = [zeros(query["q"]) for query in queries]
    visit = lambda dq, step, held: _visit(walk, queries, dq, nothing(), step, held)
    add = partial(jax.tree.map, jnp.add)
    last = walk.shards - 1

    coming = walk.shift(held) if last else held
    dq, own = visit(dq, 0, held)
    if last:
        held, coming = coming, (walk.shift(coming) if last > 1 else coming)
        dq, collected = visit(dq, 1, held)
        if last > 2:
            # The gradients' hop is independent of this step's block too: added after both.
            def turn(carry, step):
                dq, held, collected = carry
                coming, arrived = walk.shift(held), walk.shift(collected)
                dq, here = visit(dq, step, held)
                return (dq, coming, add(arrived, here)), None

            (dq, coming, collected), _ = jax.lax.scan(turn, (dq, coming, collected), jnp.arange(2, last))
        if last > 1:
            arrived = walk.shift(collected)
            dq, here = visit(dq, last, coming)
            collected = add(arrived, here)
        own = add(own, walk.shift(collected))
    whole = lambda parts, like: jnp.concatenate(parts, axis=1).astype(like.dtype)
    return whole(dq, q), whole([x["k"] for x in own], k), whole([x["v"] for x in own], v), None


def _visit(walk: Walk, queries: list[Labels], dq: list, collected: list[Labels], step, held):
    """Adds what the blocks of a step give to the gradients of the queries, and to those of the keys that are here."""
    pieces = [[] for _ in held]
    dq = list(dq)
    count = walk.k_chunks.count
    for group, kc, key, source, offsets in walk.blocks(held, step):
        first = len(pieces[group]) * count
        d_key = tuple(collected[group][name][:, first : first + count] for name in ("k", "v"))
        for qc, query in enumerate(queries):
            at = (walk.rank, qc), (source, kc)

            def more(old, at=at, query=query, key=key):
                mask = walk.mask(*at, query, key)
                rows = (query[name] for name in ("d_out", "lse", "drop"))
                new = block.gradients(query["q"], key["k"], key["v"], *rows, mask=mask, **walk.plan.call)
                return tuple(a + b for a, b in zip(old, new, strict=True))

            seen = walk.seen(*at, query, key, offsets)
            dq[qc], *d_key = run_if(seen, more, (dq[qc], *d_key))
        pieces[group].append(d_key)
    joined = [
        {name: jnp.concatenate([piece[i] for piece in group], axis=1) for i, name in enumerate(("k", "v"))}
        for group in pieces
    ]
    return dq, joined


with_ring_gradient.defvjp(_forward, _backward)
