"""Decoding in plain XLA: the whole cache of a layer, then attention as everywhere else."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention import MaskSpec, attention
from jaxpar.pallas_kernels.formats.quantised import Quantised, dequantise


def decode_xla(q_BxTxHxK, k, v, lens_B, *, scale, window=None, cap=None, layer=None, table_BxP=None):
    """See `api.decode_attention`: out, and lse."""
    T, dtype = q_BxTxHxK.shape[1], q_BxTxHxK.dtype
    k_BxSxGxK, v_BxSxGxK = (gathered(x, layer, table_BxP, dtype) for x in (k, v))
    index_BxS = jnp.broadcast_to(jnp.arange(k_BxSxGxK.shape[1], dtype=jnp.int32)[None], k_BxSxGxK.shape[:2])
    # Hidden keys have the weight 0, and 0 times what nobody has written may be NaN.
    held_BxS = index_BxS < lens_B[:, None]
    v_BxSxGxK = jnp.where(held_BxS[:, :, None, None], v_BxSxGxK, 0)
    q_index = lens_B[:, None] - T + jnp.arange(T, dtype=jnp.int32)[None]
    mask = MaskSpec(window=window, q_index=q_index, k_index=index_BxS)
    return attention(
        q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask, scale=scale, cap=cap, lse_out=True, implementation="xla"
    )


def gathered(x, layer, table_BxP, dtype):
    """[B, S, G, K] in `dtype`: one layer's keys or values, page after page where they lie in pages."""
    if layer is not None:
        x = jax.tree.map(lambda part: part[layer], x)
    if table_BxP is not None:
        x = jax.tree.map(lambda part: _joined(part, table_BxP), x)
    return dequantise(x, dtype) if isinstance(x, Quantised) else x.astype(dtype)


def _joined(pool, table_BxP):
    pages = pool.at[table_BxP].get(mode="clip")
    return pages.reshape(table_BxP.shape[0], -1, *pool.shape[2:])
