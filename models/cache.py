"""The key/value cache: ragged by construction.

Row b holds `lens[b]` tokens in slots 0 ... lens[b]-1. New tokens are scattered to the slots that follow, and a query at
position p sees the slots up to p. Prefill in chunks, decoding, verification of several tokens and rows that stopped
early are one code path; rolling a row back is a smaller `lens`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KVCache:
    """L layers, B rows, S slots, G key/value heads, K head size.

    Attributes:
      k: [L, B, S, G, K] keys, already rotated.
      v: [L, B, S, G, K] values.
      lens: int32 [B], tokens held by each row.
    """

    k: jax.Array
    v: jax.Array
    lens: jax.Array

    @property
    def capacity(self) -> int:
        return self.k.shape[2]


def empty(cfg, rows: int, capacity: int, dtype=None) -> KVCache:
    """A cache for `rows` rows of at most `capacity` tokens."""
    shape = (cfg.layers, rows, capacity, cfg.kv_heads, cfg.head_size)
    dtype = jnp.dtype(cfg.dtype if dtype is None else dtype)
    return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32))


def write(pages_LxBxSxGxK, new_BxTxGxK, layer, slots_BxT):
    """Scatter one layer's new keys (or values) to their slots. Slots beyond the capacity are dropped."""
    rows_Bx1 = jnp.arange(slots_BxT.shape[0])[:, None]
    return pages_LxBxSxGxK.at[layer, rows_Bx1, slots_BxT].set(
        new_BxTxGxK.astype(pages_LxBxSxGxK.dtype), mode="drop", unique_indices=True
    )
