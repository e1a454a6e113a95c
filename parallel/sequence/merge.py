"""Partial results of a ring, merged two at a time as they come (`jaxpar.pallas_kernels.attention.merging`), in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention.merging import weights

Partial = tuple[jax.Array, jax.Array]
"""`(out [B, T, H, K], lse [B, H, T])`, both float32 (float64 for float64 inputs)."""


def empty(q_BxTxHxK: jax.Array) -> Partial:
    """The partial result over no keys: 0 and -inf."""
    B, T, H, _ = q_BxTxHxK.shape
    precise = jnp.promote_types(q_BxTxHxK.dtype, jnp.float32)
    return jnp.zeros(q_BxTxHxK.shape, precise), jnp.full((B, H, T), -jnp.inf, precise)


def merge(one: Partial, other: Partial) -> Partial:
    """The partial result over both sets of keys. Rows that see no key in a part have lse -inf there."""
    precise = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    (out_a, lse_a), (out_b, lse_b) = (map(precise, part) for part in (one, other))
    (weight_a, weight_b), lse = weights(jnp.stack([lse_a, lse_b]), 0)
    # The outputs stay two: stacked they would be copied.
    return out_a * by_row(weight_a) + out_b * by_row(weight_b), lse


def by_row(x_BxHxT: jax.Array) -> jax.Array:
    """[B, H, T] -> [B, T, H, 1], to multiply outputs with."""
    return jnp.swapaxes(x_BxHxT, 1, 2)[..., None]
