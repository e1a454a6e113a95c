"""The body of the TPU decoding kernel: what happens to one row's queries and one block of its cache.

All heads of a block are computed at once. A block of tokens is [N, K] with N = tokens · G, a row of it being one head's key
of one token, as they stand in the cache; queries are [M, K] with M = T · H. Their product [M, N] has every query head with
every key head, and those that do not belong together are masked. That costs G times the products that count, and next to
nothing: the rows of a matrix unit that few queries leave empty do them, while the block's bytes are what takes time.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


@dataclass(frozen=True)
class Settings:
    """What the kernel knows before it is traced.

    Attributes:
      splits: parts that a row's blocks are divided into, one after another.
      queries, groups, slots: T, G, and how many slots a row can have.
      tokens: of a block.
      bits: of a code; None: keys and values are floats.
      precision: of products.
    """

    scale: float
    cap: float | None
    windowed: bool
    splits: int
    queries: int
    groups: int
    slots: int
    tokens: int
    bits: int | None
    precision: jax.lax.Precision | None

    def block(self, split, step, first, count):
        """Which of a row's blocks a step of a split is about, and whether there is one. Where there is none, the last of the
        split stays: nothing more is fetched."""
        share = jax.lax.div(count + (self.splits - 1), self.splits)
        behind = jnp.minimum((split + 1) * share, count)
        at = split * share + step
        return first + jnp.clip(at, 0, jnp.maximum(behind - 1, 0)), at < behind

    def product(self, a, b, over: tuple[int, int]):
        """`a` times `b`, summed over one dimension of each, float32."""
        dims = (((over[0],), (over[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=self.precision, preferred_element_type=jnp.float32)

    def parts(self, codes, scales, dtype) -> list:
        """A block's keys or values in `dtype`, [N, K], or the even and the odd channels of 4-bit ones, [N, K/2] each."""
        if self.bits is None:
            return [codes[...].astype(dtype)]
        whole = codes[...].astype(jnp.int32)
        spread = _spread(scales[...].T, codes.shape[1])
        # The code to the top, and back with copies of its sign.
        shifts = (24,) if self.bits == 8 else (28, 24)
        return [(((whole << up) >> (32 - self.bits)).astype(jnp.float32) * spread).astype(dtype) for up in shifts]

    def logits(self, x, place, length, window):
        """[M, N], -inf where hidden. `place`: the first token of the block."""
        keys = self.parts(x.k, x.k_scales, x.q.dtype)
        found = sum(self.product(x.q[n], key, (1, 1)) for n, key in enumerate(keys)) * self.scale
        if self.cap is not None:
            found = self.cap * jnp.tanh(found / self.cap)
        column = jax.lax.broadcasted_iota(jnp.int32, found.shape, 1)
        # Column n is token place + n // G, and n // G < a where n < a · G.
        index_Mx1 = length - self.queries + x.q_labels[:, 1:]
        ahead = jnp.minimum(index_Mx1 + 1, self.slots) - place
        seen = (x.q_labels[:, :1] == x.k_labels[...]) & (column < ahead * self.groups)
        if self.windowed:
            # No less than 0, or windows of 2³⁰ would overflow.
            seen = seen & (column >= jnp.maximum(index_Mx1 - window + 1 - place, 0) * self.groups)
        return jnp.where(seen, found, -jnp.inf)


def _spread(scales_NxJ, lanes: int):
    """[N, lanes] (or [N, 1]): each channel's scale, J of them a row."""
    blocks = scales_NxJ.shape[1]
    found = scales_NxJ[:, :1]
    if blocks > 1:
        lane = jax.lax.broadcasted_iota(jnp.int32, (scales_NxJ.shape[0], lanes), 1)
        for j in range(1, blocks):
            found = jnp.where(lane >= j * (lanes // blocks), scales_NxJ[:, j : j + 1], found)
    return found


def decode(settings: Settings, names, first, count, lens, window, layer, table, *refs):
    """out and lse of a row's queries over one split of its cache: softmax as it comes, rescaled where the largest logit
    grows."""
    x = SimpleNamespace(**({"k_scales": None, "v_scales": None} | dict(zip(names, refs, strict=True))))
    b, split, step = pl.program_id(0), pl.program_id(1), pl.program_id(2)

    @pl.when(step == 0)
    def start():
        x.top[...] = jnp.full_like(x.top, -jnp.inf)
        x.total[...] = jnp.zeros_like(x.total)
        x.sum[...] = jnp.zeros_like(x.sum)

    block, needed = settings.block(split, step, first[b], count[b])

    @pl.when(needed)
    def add():
        place = block * settings.tokens
        logits = settings.logits(x, place, lens[b], window[0])
        before = x.top[:, :1]
        top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        # A query that has seen nothing yet has top = -inf; -inf - -inf would be NaN.
        level = jnp.where(top == -jnp.inf, 0.0, top)
        weights = jnp.exp(logits - level)
        shrink = jnp.exp(before - level)
        x.top[...] = jnp.broadcast_to(top, x.top.shape)
        x.total[...] = x.total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        held = (jnp.minimum(lens[b], settings.slots) - place) * settings.groups
        for n, values in enumerate(settings.parts(x.v, x.v_scales, x.q.dtype)):
            # Slots that the row does not hold weigh 0, and 0 times what nobody has written may be NaN.
            row = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
            values = jnp.where(row < held, values, jnp.zeros_like(values))
            x.sum[n] = x.sum[n] * shrink + settings.product(weights.astype(values.dtype), values, (1, 0))

    @pl.when(step == pl.num_programs(2) - 1)
    def end():
        total = x.total[:, :1]
        empty = total == 0.0
        share = jnp.where(empty, 1.0, total)
        for n in range(x.out.shape[0]):
            x.out[n] = x.sum[n] / share
        x.lse[0] = jnp.where(empty, -jnp.inf, jnp.log(share) + x.top[:, :1])
