"""A mask in the form that flash kernels take it in: labels of queries and keys, and which blocks of keys a block needs.

A label is what the mask compares: the index of a token (causal, window) and its document (segments). From each block's
smallest and largest labels follows which blocks cannot see each other whatever stands inside: for causal masks, windows
and packed documents the others lie side by side, so that `first` and `last` of them say all. Computed by XLA before the
kernel, [rows, blocks] numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention.mask import MaskSpec

LARGE = 2**31 - 1


@dataclass(frozen=True)
class Kinds:
    """What a mask compares; static.

    Attributes:
      causal, window, segments: which of its conditions are there. Padding to whole blocks is a document of its own.
    """

    causal: bool
    window: bool
    segments: bool

    @property
    def names(self) -> tuple[str, ...]:
        """The labels of a token, in the order of `Labels.q` and `Labels.k`."""
        return ("index",) * (self.causal or self.window) + ("segment",) * self.segments

    def seen(self, q: dict, k: dict, window) -> jax.Array | None:
        """Which keys which queries see, bool, from labels that broadcast against each other; None: all."""
        parts = []
        if self.causal:
            parts.append(k["index"] <= q["index"])
        if self.window:
            parts.append(q["index"] - k["index"] < window)
        if self.segments:
            parts.append((q["segment"] == k["segment"]) & (q["segment"] != 0))
        if not parts:
            return None
        found = parts[0]
        for part in parts[1:]:
            found = found & part
        return found


class Labels(NamedTuple):
    """The labels of a call. R is the batch, or 1 where all rows have the same.

    Attributes:
      q, k: int32 [R, labels, T] and [R, labels, S], T and S padded to whole blocks; None without labels.
      window: int32 [1], how many tokens a query sees back; 0 without a window.
      keys, queries: see `Span`: of each block of queries, the blocks of keys; of each block of keys, those of queries.
    """

    q: jax.Array | None
    k: jax.Array | None
    window: jax.Array
    keys: Span
    queries: Span


class Span(NamedTuple):
    """int32 [R, blocks]: the first and the last block of the other side that one needs; 0 and -1 where it needs none."""

    first: jax.Array
    last: jax.Array


def kinds(mask: MaskSpec, padded: bool) -> Kinds:
    """What the mask compares. `padded`: queries or keys are padded to whole blocks."""
    return Kinds(mask.causal, mask.window is not None, padded or mask.q_segments is not None)


def labels(mask: MaskSpec, starts, sizes: tuple[int, int], blocks: tuple[int, int]) -> Labels:
    """The labels of a call.

    Args:
      starts: `(q_start, k_start)`.
      sizes: how many queries and keys there are.
      blocks: queries and keys in a block.
    """
    whole = [-(-size // block) * block for size, block in zip(sizes, blocks, strict=True)]
    kind = kinds(mask, padded=list(sizes) != whole)
    window = jnp.reshape(jnp.asarray(0 if mask.window is None else mask.window, jnp.int32), (1,))
    counts = [size // block for size, block in zip(whole, blocks, strict=True)]
    if not kind.names:
        every = [jnp.full((1, n), other - 1, jnp.int32) for n, other in zip(counts, counts[::-1], strict=True)]
        spans = [Span(jnp.zeros_like(last), last) for last in every]
        return Labels(None, None, window, *spans)
    given = ((mask.q_index, mask.q_segments), (mask.k_index, mask.k_segments))
    sides = [
        _side(kind, index, segments, start, size, to)
        for (index, segments), start, size, to in zip(given, starts, sizes, whole, strict=True)
    ]
    rows = max(x.shape[0] for side in sides for x in side.values())
    sides = [{name: jnp.broadcast_to(x, (rows, x.shape[1])) for name, x in side.items()} for side in sides]
    pairs = _may_see(kind, sides, counts, window)
    stacked = [jnp.stack(list(side.values()), axis=1) for side in sides]
    return Labels(*stacked, window, _span(pairs), _span(jnp.swapaxes(pairs, 1, 2)))


def _side(kind: Kinds, index, segments, start, size: int, whole: int) -> dict:
    """The labels of the queries or of the keys by name, each [1 or B, whole]."""
    found = {}
    if "index" in kind.names:
        index = jnp.arange(size, dtype=jnp.int32)[None] + start if index is None else index
        # Padding has the last token's index, so that no block looks wider than it is.
        found["index"] = jnp.pad(index.astype(jnp.int32), ((0, 0), (0, whole - size)), mode="edge")
    if "segment" in kind.names:
        segments = jnp.ones((1, size), jnp.int32) if segments is None else segments
        found["segment"] = jnp.pad(segments.astype(jnp.int32), ((0, 0), (0, whole - size)))
    return found


def _may_see(kind: Kinds, sides, counts, window):
    """bool [R, blocks of queries, blocks of keys]: whether any query of one may see any key of the other."""
    ends = []
    for axis, (side, count) in enumerate(zip(sides, counts, strict=True)):
        cut = {name: x.reshape(x.shape[0], count, -1) for name, x in side.items()}
        # Smallest and largest label of each block; padding (0) is in no document.
        low = {n: jnp.min(jnp.where((x == 0) & (n == "segment"), LARGE, x), axis=-1) for n, x in cut.items()}
        high = {name: jnp.max(x, axis=-1) for name, x in cut.items()}
        ends.append([{n: jnp.expand_dims(x, 2 - axis) for n, x in end.items()} for end in (low, high)])
    (q_low, q_high), (k_low, k_high) = ends
    found = True
    if kind.causal:
        found = found & (k_low["index"] <= q_high["index"])
    if kind.window:
        found = found & (q_low["index"] - k_high["index"] < window[0])
    if kind.segments:
        found = found & (k_low["segment"] <= q_high["segment"]) & (q_low["segment"] <= k_high["segment"])
    return found


def _span(pairs_RxNxM) -> Span:
    some = jnp.any(pairs_RxNxM, axis=-1)
    first = jnp.argmax(pairs_RxNxM, axis=-1)
    last = pairs_RxNxM.shape[-1] - 1 - jnp.argmax(pairs_RxNxM[..., ::-1], axis=-1)
    whole = lambda x, none: jnp.where(some, x, none).astype(jnp.int32)
    return Span(whole(first, 0), whole(last, -1))
