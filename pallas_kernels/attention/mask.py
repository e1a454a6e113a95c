"""Which keys a query sees, as data: a dense matrix exists only for the block that is being computed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class MaskSpec:
    """The mask of one attention call. Letters: B batch, T queries, S keys.

    Query i has the index `q_start + i` (or `q_index[:, i]`), key j `k_start + j` (or `k_index[:, j]`). Key j is visible
    to query i if and only if

        (not causal  or  k_index <= q_index)   and   (window is None  or  q_index - k_index < window)
        and   (no segments  or  (q_segment == k_segment  and  both are non-zero))

    A query that sees no key gets the output 0 and the log-sum-exp -inf, and zero gradients.

    Attributes:
      causal: whether a query sees only keys up to its own index. Static.
      window: how many tokens a query sees back, itself included; an int, an int32 scalar that may be traced (one scan
        body for sliding and full layers), or None for no limit.
      q_segments, k_segments: int32 [B, T] and [B, S], the document that a token belongs to; 0 is padding. Both or none.
      q_index, k_index: int32 [B, T] and [B, S], in place of `q_start + i` and `k_start + j` (caches with rows of
        unequal length, gathered tokens).
    """

    causal: bool = struct.field(pytree_node=False, default=True)
    window: int | jax.Array | None = None
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    q_index: jax.Array | None = None
    k_index: jax.Array | None = None

    def check(self, batch: int, queries: int, keys: int) -> None:
        """Raises ValueError where the mask does not fit q [batch, queries, ...] and k [batch, keys, ...]."""
        if (self.q_segments is None) != (self.k_segments is None):
            raise ValueError("MaskSpec needs both q_segments and k_segments, or neither; got one of them")
        if isinstance(self.window, int) and self.window < 1:
            raise ValueError(f"MaskSpec.window must be at least 1 token, got {self.window}; use None for no window")
        for name, length in (
            ("q_segments", queries),
            ("q_index", queries),
            ("k_segments", keys),
            ("k_index", keys),
        ):
            array = getattr(self, name)
            if array is not None and array.shape not in ((batch, length), (1, length)):
                raise ValueError(
                    f"MaskSpec.{name} must have the shape [batch, tokens] = {(batch, length)}, got {array.shape}"
                )

    def visible(self, rows: tuple, cols: tuple, *, q_start=0, k_start=0) -> jax.Array | None:
        """The block of the mask for some queries and keys.

        Args:
          rows: `(first, count)` of the queries; `first` may be traced.
          cols: `(first, count)` of the keys; `first` may be traced.
          q_start, k_start: indices of query 0 and key 0 of the whole call; int or int32 scalar.

        Returns:
          bool [B or 1, count of rows, count of cols], or None where the mask hides nothing whatever the data.
        """
        parts = []
        if self.causal or self.window is not None:
            q = _indices(self.q_index, q_start, rows)[:, :, None]
            k = _indices(self.k_index, k_start, cols)[:, None, :]
            if self.causal:
                parts.append(k <= q)
            if self.window is not None:
                parts.append(q - k < self.window)
        if self.q_segments is not None:
            q = _cut(self.q_segments, rows)[:, :, None]
            k = _cut(self.k_segments, cols)[:, None, :]
            parts.append((q == k) & (q != 0))
        if not parts:
            return None
        seen = parts[0]
        for part in parts[1:]:
            seen = seen & part
        return seen


def _cut(array_BxN: jax.Array, span: tuple) -> jax.Array:
    first, count = span
    if isinstance(first, int):
        return array_BxN[:, first : first + count]
    return jax.lax.dynamic_slice_in_dim(array_BxN, first, count, axis=1)


def _indices(index_BxN, start, span: tuple) -> jax.Array:
    if index_BxN is not None:
        return _cut(index_BxN, span)
    first, count = span
    return (jnp.arange(count, dtype=jnp.int32) + (start + first))[None]
