"""What the rings share: which shard visits which, the mask of each block, and blocks that are not computed at all.

Everything here runs inside `jax.shard_map`, on the shard of one device. Letters: N devices of the sequence axis, r this
device, T tokens of a *shard*, C progressions of tokens in a shard (`layouts.Chunks`).

A block that nobody sees is passed over by `lax.cond`. Its branches hold no collective: a permute under a condition that
differs between devices is silently wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.pallas_kernels.varying import alike, varies_over, varying
from jaxpar.parallel.sequence.layouts import Layout, needed

Labels = dict[str, Any]
"""The arrays of a mask: window (a traced one), q_segments, k_segments, q_index, k_index; each may be None."""


@dataclass(frozen=True)
class Plan:
    """The static part of a call.

    Attributes:
      layout: of the tokens over the axis.
      axis: name of the mesh axis.
      scale, cap, implementation, interpret: as in `attention`.
      causal, window: of the mask; the window where it is a plain int.
      both_ways: half of each device's keys and values travels up the ring, the other half down.
    """

    layout: Layout
    axis: str
    scale: float
    cap: float | None = None
    causal: bool = True
    window: int | None = None
    both_ways: bool = False
    implementation: str | None = None
    interpret: Any = False

    @property
    def numbers(self) -> dict:
        """Arguments of logits."""
        return dict(scale=self.scale, cap=self.cap)

    @property
    def call(self) -> dict:
        """Arguments of a block's attention and of its gradients."""
        return self.numbers | dict(implementation=self.implementation, interpret=self.interpret)


def prepare(
    q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, *, mask: MaskSpec, layout: str, axis: str, **options
) -> tuple[Plan, jax.Array, jax.Array, jax.Array, Labels]:
    """Checks a call on one device's shard and splits it into what is static and what is traced.

    Raises:
      ValueError: keys that are not sharded as the queries, or a length that the layout cannot take.
    """
    T = q_BxTxHxK.shape[1]
    if k_BxTxGxK.shape[1] != T:
        raise ValueError(
            f"sequence attention needs as many keys as queries on each device; got {k_BxTxGxK.shape[1]} keys and "
            f"{T} queries over axis {axis!r}"
        )
    mask.check(q_BxTxHxK.shape[0], T, T)
    shards = jax.lax.axis_size(axis)
    fixed = mask.window if isinstance(mask.window, int) else None
    plan = Plan(Layout(layout, shards, shards * T), axis, causal=mask.causal, window=fixed, **options)
    labels = {name: getattr(mask, name) for name in ("q_segments", "k_segments", "q_index", "k_index")}
    labels["window"] = mask.window if fixed is None else None
    if (labels["q_index"] is None) != (labels["k_index"] is None):
        raise ValueError("sequence attention needs both q_index and k_index in the mask, or neither; got one of them")
    # One set of varying axes: a key that is the same on some axis gets its gradient summed over it here.
    q, k, v = alike(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK)
    return plan, q, k, v, labels


def send(tree, axis: str, hops: int):
    """Every array from device r to device r + hops, round the ring."""
    shards = jax.lax.axis_size(axis)
    route = [(r, (r + hops) % shards) for r in range(shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, axis, route), tree)


class Walk:
    """One call's geometry on this device."""

    def __init__(self, plan: Plan, q_BxTxHxK: jax.Array, labels: Labels):
        self.plan, self.labels = plan, labels
        self.shards = plan.layout.shards
        self.rank = jax.lax.axis_index(plan.axis)
        self.q_chunks = plan.layout.chunks
        self.k_chunks = self.q_chunks
        if plan.both_ways and self.q_chunks.starts.shape[1] == 1:
            self.k_chunks = self.q_chunks.halved()
        every = tuple(range(self.k_chunks.starts.shape[1]))
        self.groups = ((1, every[:1]), (-1, every[1:])) if plan.both_ways else ((1, every),)
        """(direction, key chunks that travel that way)"""
        self.window = plan.window if plan.window is not None else labels["window"]
        shape = (self.shards, self.shards, self.q_chunks.starts.shape[1], len(every))
        if labels["q_index"] is None:
            self.table = needed(self.q_chunks, self.k_chunks, causal=plan.causal, window=self.window)
        else:  # the caller's own indices: nothing is known before the data
            self.table = np.ones(shape, bool)
        self.axes = varies_over(q_BxTxHxK) | varies_over(self.rank)

    def start(self, tree):
        """Accumulators with the type that they will have."""
        return jax.tree.map(lambda x: varying(x, self.axes), tree)

    def queries(self, **arrays) -> list[Labels]:
        """Arrays [B, T, ...] of this device's queries, cut into chunks, and their labels."""
        arrays |= {"segments": self.labels["q_segments"], "index": self.labels["q_index"]}
        count = self.q_chunks.count
        return [cut(arrays, i * count, count) for i in range(self.q_chunks.starts.shape[1])]

    def keys(self, **arrays) -> list[Labels]:
        """Arrays [B, T, ...] of this device's keys and their labels: one set for each direction of travel."""
        arrays |= {"segments": self.labels["k_segments"], "index": self.labels["k_index"]}
        count = self.k_chunks.count
        return [cut(arrays, chunks[0] * count, len(chunks) * count) for _, chunks in self.groups]

    def shift(self, held: list) -> list:
        """Each set of keys one hop on."""
        return [send(x, self.plan.axis, hops) for (hops, _), x in zip(self.groups, held, strict=True)]

    def blocks(self, held: list[Labels], step) -> Iterable[tuple[int, int, Labels, Any, Any]]:
        """`(key set, key chunk, its arrays, the device they are from, offsets)` at a step; a traced step is not 0."""
        count = self.k_chunks.count
        for group, ((hops, chunks), arrays) in enumerate(zip(self.groups, held, strict=True)):
            offsets = [-hops * step] if isinstance(step, int) else list(range(1, self.shards))
            source = (self.rank - hops * step) % self.shards
            for place, chunk in enumerate(chunks):
                yield group, chunk, cut(arrays, place * count, count), source, offsets

    def round(self, held: list[Labels], state, visit: Callable):
        """Every device's keys pass by once: `state, y = visit(state, step, held)` for step 0 ... N - 1.

        A loop, not N copies, so that memory and compile time do not depend on N. A step's hop and its visit are
        independent of each other, so the two can overlap. N - 1 hops.

        Returns:
          the last state, and the ys stacked along a new first dimension (None where y is None).
        """
        last = self.shards - 1
        add_step = lambda y: jax.tree.map(lambda x: x[None], y)
        coming = self.shift(held) if last else held
        state, y = visit(state, 0, held)
        ys = [add_step(y)]
        if last > 1:

            def turn(carry, step):
                state, held = carry
                coming = self.shift(held)
                state, y = visit(state, step, held)
                return (state, coming), y

            (state, coming), between = jax.lax.scan(turn, (state, coming), jnp.arange(1, last))
            ys.append(between)
        if last:
            state, y = visit(state, last, coming)
            ys.append(add_step(y))
        return state, jax.tree.map(lambda *parts: jnp.concatenate(parts), *ys)

    def seen(self, q_at: tuple, k_at: tuple, q: Labels, k: Labels, offsets: list[int]) -> Any:
        """Whether a block has anything to compute: True, False, or a traced bool.

        Args:
          q_at, k_at: (device, chunk) of the queries and of the keys; devices may be traced.
          offsets: what key device - query device may be.
        """
        table = self.table[:, :, q_at[1], k_at[1]]
        if isinstance(table, np.ndarray):
            rows = np.arange(self.shards)
            possible = np.stack([table[rows, (rows + offset) % self.shards] for offset in offsets])
            if not possible.any():
                return False
            found = True if possible.all() else jnp.asarray(table)[q_at[0], k_at[0]]
        else:
            found = table[q_at[0], k_at[0]]
        if q["segments"] is not None:
            # Packed documents: a block whose ranges of documents do not meet has no visible pair.
            a, b = q["segments"], k["segments"]
            found &= jnp.any((a.min(1) <= b.max(1)) & (b.min(1) <= a.max(1)))
        return found

    def mask(self, q_at: tuple, k_at: tuple, q: Labels, k: Labels) -> MaskSpec:
        """The mask of a block, with each token's place in the whole sequence."""
        q_index, k_index = q["index"], k["index"]
        if q_index is None and (self.plan.causal or self.window is not None):
            q_index, k_index = _places(self.q_chunks, *q_at), _places(self.k_chunks, *k_at)
        return MaskSpec(self.plan.causal, self.window, q["segments"], k["segments"], q_index, k_index)


def run_if(seen, function: Callable, state):
    """`function(state)` where the block is seen, else `state`."""
    if isinstance(seen, bool):
        return function(state) if seen else state
    return jax.lax.cond(seen, function, lambda state: state, state)


def _places(chunks, device, chunk: int) -> jax.Array:
    """int32 [1, count]: the tokens' places in the whole sequence."""
    start = jnp.asarray(chunks.starts[:, chunk], jnp.int32)[device]
    return (start + chunks.stride * jnp.arange(chunks.count, dtype=jnp.int32))[None]


def cut(arrays: Labels, first: int, count: int) -> Labels:
    """`count` tokens of every array [B, T, ...]."""
    return {name: None if x is None else x[:, first : first + count] for name, x in arrays.items()}
