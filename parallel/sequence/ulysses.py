"""Ulysses: an all-to-all turns sequence shards into head shards, each device attends to whole rows, and back.

Jacobs et al. 2023, "DeepSpeed Ulysses", §3. Bytes do not grow with the devices at a fixed T/N, but the number of heads
bounds them. The hybrid (Fang & Zhao 2024, "USP", §3.2) does it over an inner axis, where links are fast, around a ring
over an outer one. Runs inside `jax.shard_map`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention import MaskSpec, attention
from jaxpar.parallel.sequence.choose import copies
from jaxpar.parallel.sequence.layouts import Layout
from jaxpar.parallel.sequence.ring import ring_attention

ARRAYS = ("q_segments", "k_segments", "q_index", "k_index")


def ulysses_attention(
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
    """As `ring.ring_attention`, by exchanging heads. Rows are put in their own order before the attention, so it needs
    no layout other than the contiguous one; the others are there for programs that mix kinds.

    Raises:
      ValueError: query heads that are no multiple of the devices.
    """
    shards = jax.lax.axis_size(axis)
    order = Layout(layout, shards, shards * q_BxTxHxK.shape[1])

    def whole_rows(q, k, v, mask):
        q, k, v = (order.restore(x) for x in (q, k, v))
        mask = mask.replace(**{name: order.restore(x) for name, x in _arrays(mask).items()})
        options = dict(scale=scale, cap=cap, implementation=implementation, interpret=interpret)
        out, lse = attention(q, k, v, mask=mask, lse_out=True, **options)
        return order.arrange(out), order.arrange(lse, axis=2)

    return _around(whole_rows, axis, q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, mask)


def hybrid_attention(
    q_BxTxHxK,
    k_BxTxGxK,
    v_BxTxGxK,
    *,
    mask: MaskSpec,
    scale: float,
    layout: str,
    axis: tuple[str, str],
    cap: float | None = None,
    both_ways: bool = False,
    implementation: str | None = None,
    interpret=False,
):
    """As `ring.ring_attention`, over `axis = (ring axis, Ulysses axis)`, the ring's being the outer one.

    The layout is over the devices of the ring; those of the Ulysses axis hold consecutive parts of a ring shard.
    """
    outer, inner = axis

    def ring(q, k, v, mask):
        options = dict(scale=scale, cap=cap, both_ways=both_ways, implementation=implementation, interpret=interpret)
        return ring_attention(q, k, v, mask=mask, layout=layout, axis=outer, **options)

    return _around(ring, inner, q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, mask)


def _around(inner, axis: str, q, k, v, mask: MaskSpec):
    """`inner` on whole rows of H / N heads; its arguments and results sharded over the sequence outside."""
    repeat = copies(q.shape[2], k.shape[2], jax.lax.axis_size(axis))
    if repeat > 1:
        # The transpose sums the gradients of the copies.
        k, v = (jnp.repeat(x, repeat, axis=2) for x in (k, v))
    to_heads = lambda x: jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=1, tiled=True)
    # Labels only, [B, T] int32: 1/(2·G·K) of what the keys and values would be.
    gather = lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True)
    mask = mask.replace(**{name: gather(x) for name, x in _arrays(mask).items()})
    out, lse = inner(to_heads(q), to_heads(k), to_heads(v), mask)
    back = lambda x, heads, tokens: jax.lax.all_to_all(x, axis, split_axis=tokens, concat_axis=heads, tiled=True)
    return back(out, heads=2, tokens=1), back(lse, heads=1, tokens=2)


def _arrays(mask: MaskSpec) -> dict[str, jax.Array]:
    return {name: x for name in ARRAYS if (x := getattr(mask, name)) is not None}
