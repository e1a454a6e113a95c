"""What a pass is told of the parts of layers that tokens leave out, and what it tells of them: arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Skip:
    """What a pass is told. B rows, T tokens.

    Attributes:
      active: bool [B, T], which tokens may leave anything out: not those of the prompt, nor the first ones behind it. None:
        all may.
      policy: which parts they leave out, a member of `jaxpar.models.routing.skip` (static).
    """

    active: jax.Array | None = None
    policy: Any = struct.field(pytree_node=False, default=None)

    def may(self, cfg, layer, shape: tuple[int, int]):
        """bool [B, T]: which tokens may leave out a part of this layer. The cold regions at both ends never are."""
        inside = (layer >= self.policy.first) & (layer < cfg.layers - self.policy.last)
        return jnp.broadcast_to(inside, shape) if self.active is None else self.active & inside


@struct.dataclass
class Record:
    """What a pass tells, of n layers.

    Attributes:
      remaining: int32 [B, T], how many of the next feed-forward layers a token leaves out unseen.
      skipped: int32 [B, T], how many layers left out their part for this token. Where rows share a pass this is what masking
        simulates: a part runs if any token needs it.
      spared: int32 [], in how many layers no token needed the part, so that it did not run: what is truly saved.
      cosines: float32 [L, B, T], the cosine between the stream before and after the part; NaN where a token left it out.
    """

    remaining: jax.Array
    skipped: jax.Array
    spared: jax.Array
    cosines: jax.Array

    @classmethod
    def start(cls, cfg, rows: int, tokens: int) -> Record:
        zeros = jnp.zeros((rows, tokens), jnp.int32)
        nothing = jnp.full((cfg.layers, rows, tokens), jnp.nan, jnp.float32)
        return cls(zeros, zeros, jnp.zeros((), jnp.int32), nothing)


def cosine(a, b):
    """The cosine of the angle between vectors [..., D] and [..., D], in float32: [...]."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.sum(a * b, axis=-1)
    return product * jax.lax.rsqrt(jnp.sum(a * a, axis=-1) * jnp.sum(b * b, axis=-1) + jnp.finfo(jnp.float32).tiny)
