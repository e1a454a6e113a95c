"""The body of the Hopper decoding kernel: what the warpgroups of a block do.

A block has one key/value head of one row and one split of the row's steps. One warpgroup feeds: it copies the keys and
values of each step into shared memory as places get free. Two compute, every other step each, with a softmax of their own as
it comes; their sums are merged with the other splits' (`attention.merging`). A step's keys and values are used once, so that bytes
bound this: the few queries that share a head are padded to the matrix unit's 64 rows, which costs no bytes, and the unit's
time for them is below that of the copies. What the rows behind the queries hold is not defined, and no matter: a row of a
product is one of the queries alone.

Codes in 8 and 4 bits are widened from shared memory to shared memory, for each warpgroup on its own, and multiplied as they
are, which is exact, where a head of a token has one scale: it is behind the product with the keys and on the weight of the
values. Where it has several, codes are multiplied by them before and rounded. A byte has two neighbouring channels in 4
bits: even and odd channels are multiplied apart.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.gpu import ACROSS, ALONG, LOG2
from jaxpar.pallas_kernels.matmul.gpu_kernels import values

COMPUTE = 2
"""Warpgroups that compute; the next one feeds them."""
ROWS = gpu.ROWS
CHUNK = 64
"""Channels of the result that leave together."""
REGISTERS, FEEDER_REGISTERS = 240, 24
"""Of a thread that computes, and of one that feeds: 64512 in a block, and a multiprocessor has 65536."""
WIDE = plgpu.Layout.WGMMA_UPCAST_4X
WIDENED = 64
"""Bytes of a token's codes that are widened at once; half of them, where they are multiplied by scales."""


@dataclass(frozen=True)
class Settings:
    """What the kernel knows before it is traced.

    Attributes:
      queries: of a row, T.
      shared: query heads that share a key/value head.
      rows: of the queries that share a head, T · shared in whole eights.
      slots: how many a row can have.
      tokens: of a step.
      piece: tokens that a copy takes: a step's, or a page's.
      page: slots of a page; None: the cache is dense.
      splits: parts that a row's steps are divided into, one after another.
      stages: steps that the feeder may be ahead of each warpgroup that computes.
      size: head size.
      dtype: of queries, and of keys and values where they are no codes.
      bits: of a code, 4 or 8; None: keys and values are floats.
      blocks: scales of a head of a token.
      heads: key/value heads whose scales are copied together as they lie in memory, [tokens, heads], of which the block's own
        is picked out; 0: scales of a head's tokens lie side by side.
    """

    scale: float
    cap: float | None
    windowed: bool
    queries: int
    shared: int
    rows: int
    slots: int
    tokens: int
    piece: int
    page: int | None
    splits: int
    stages: int
    size: int
    dtype: Any
    bits: int | None = None
    blocks: int = 1
    heads: int = 0
    interpret: bool = False

    @property
    def places(self) -> int:
        """Steps that shared memory holds. Each belongs to one of the warpgroups that compute, or a warpgroup would miss turns
        of the barriers that it waits for."""
        return COMPUTE * self.stages

    @property
    def parts(self) -> int:
        """In how many the channels are multiplied."""
        return 2 if self.bits == 4 else 1

    @property
    def width(self) -> int:
        """Channels of a part: what a token's keys have in memory, codes or floats."""
        return self.size // self.parts


def scratch(settings: Settings) -> dict:
    """Shared memory and barriers by name."""
    places, tokens, width = settings.places, settings.tokens, settings.width
    tile = plgpu.SMEM((places, tokens, width), jnp.int8 if settings.bits else settings.dtype)
    each = (tokens, settings.heads) if settings.heads else (settings.blocks, tokens)
    numbers = plgpu.SMEM((places, *each), jnp.float32)
    copies = tokens // settings.piece * (1 + settings.blocks if settings.bits else 1)
    ready = plgpu.Barrier(num_arrivals=copies, num_barriers=places)
    used = plgpu.Barrier(num_arrivals=1, num_barriers=places)
    codes = {
        "k_numbers": numbers,
        "v_numbers": numbers,
        **{f"wide_{n}": plgpu.SMEM((COMPUTE, tokens, width), settings.dtype) for n in range(settings.parts)},
    }
    if settings.heads:
        codes["picked"] = plgpu.SMEM((COMPUTE, tokens), jnp.float32)
    return {
        # Each part has a name: a matrix instruction's operand that is found by a number known in advance does not lower.
        **{f"q_tile_{n}": plgpu.SMEM((ROWS, width), settings.dtype) for n in range(settings.parts)},
        "k_tile": tile,
        "v_tile": tile,
        "out_tile": plgpu.SMEM((COMPUTE, ROWS, CHUNK), jnp.float32),
        "lse_rows": plgpu.SMEM((COMPUTE, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_arrivals=settings.parts),
        "k_ready": ready,
        "v_ready": ready,
        "k_used": used,
        "v_used": used,
        **(codes if settings.bits else {}),
    }


def place(settings, names, refs) -> SimpleNamespace:
    """References by name; where this warpgroup is; which steps its block has."""
    x = SimpleNamespace(**dict(zip(names, refs, strict=True)))
    x.batch, x.group, x.split, x.warpgroup = (lax.axis_index(n) for n in ("batch", "group", "split", "warpgroup"))
    first, count, x.length, x.low, x.base = (x.rows[x.batch, n] for n in range(5))
    share = lax.div(count + (settings.splits - 1), settings.splits)
    x.first = first + x.split * share
    x.steps = lax.max(lax.min(count - x.split * share, share), 0)
    x.held = lax.min(x.length, settings.slots)
    return x


def sources(settings, x, at) -> list:
    """Where tokens from `at` on are, a step's, in pieces: their first place in the step, their row or page, and the first there."""
    if settings.page is None:
        # Zeros come from behind a row's last slot.
        return [(0, x.batch, at)]
    found = []
    for first in range(0, settings.tokens, settings.piece):
        # Behind the last page that a row holds it comes again: each step has as many copies.
        token = lax.min(at + first, lax.max(x.held - 1, 0))
        page = x.table[x.batch, lax.div(token, settings.page)]
        inside = lax.div(lax.rem(token, settings.page), settings.piece) * settings.piece
        found.append((first, page, inside))
    return found


def masked(settings: Settings, x, logits, start):
    """Logits with -inf where nothing is seen; untouched where all of a step is seen by all queries."""
    older = settings.queries - 1

    def hide(logits):
        column = start + lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        # Behind the last token that a query sees: its own index and one.
        behind = x.length - older
        if older:
            behind = behind + lax.div(lax.broadcasted_iota(jnp.int32, logits.shape, 0), settings.shared)
        seen = (column < behind) & (column < settings.slots)
        if settings.windowed:
            low = x.low - older
            if older:
                low = low + (behind - (x.length - older))
            seen = seen & (column >= low)
        return jnp.where(seen, logits, -jnp.inf)

    clear = start + settings.tokens <= lax.min(x.length - older, settings.slots)
    if settings.windowed:
        clear = clear & (start >= x.low)
    return lax.cond(clear, lambda logits: logits, hide, logits)


def clean(settings: Settings, x, tile, start) -> None:
    """Zeros for values in slots that the row does not hold: their weight is 0, and 0 times what nobody has written may be
    NaN."""

    @pl.when(start + settings.tokens > x.held)
    def _():
        for channel in range(0, settings.size, CHUNK):
            part = tile.at[:, pl.ds(channel, CHUNK)]
            found = gpu.load(part, plgpu.Layout.WGMMA)
            token = start + lax.broadcasted_iota(jnp.int32, found.shape, 0)
            part[...] = jnp.where(token < x.held, found, jnp.zeros_like(found))
        # Written as neither the matrix unit nor a copy writes: both come after it by a fence only.
        plgpu.commit_smem()


def widened(settings: Settings, x, name: str, slot, start):
    """A step's keys or values as the matrix unit takes them, for each part of the channels; and a float32 scale a token,
    [rows, tokens], or None. Codes' place is given back."""
    tile = getattr(x, f"{name}_tile")
    if settings.bits is None:
        return [tile.at[slot]], None
    numbers = getattr(x, f"{name}_numbers")
    # Every warp has had its product with what stood there.
    plgpu.commit_smem()
    step = WIDENED if settings.blocks == 1 else WIDENED // 2
    for token in range(0, settings.tokens, ROWS):
        for channel in range(0, settings.width, step):
            here = pl.ds(token, ROWS), pl.ds(channel, step)
            found = values(settings, [gpu.load(tile.at[slot, *here], WIDE)])
            if settings.blocks > 1:
                scales = spread(settings, numbers, slot, token, channel, step)
                found = [part.astype(jnp.float32) * scales for part in found]
            if settings.blocks > 1 and name == "v":
                # As in `clean`, of scales.
                row = start + token + lax.broadcasted_iota(jnp.int32, (ROWS, step), 0)
                found = [jnp.where(row < x.held, part, 0.0) for part in found]
            for n, part in enumerate(found):
                getattr(x, f"wide_{n}").at[x.warpgroup, *here][...] = part.astype(settings.dtype)
    scales = None
    if settings.heads:
        pick(settings, x, numbers, slot)
    elif settings.blocks == 1:
        scales = gpu.load(numbers.at[slot, 0], ACROSS)
    # Read and written as neither copies nor the matrix unit do; both come next.
    plgpu.commit_smem()
    if settings.heads:
        scales = gpu.load(x.picked.at[x.warpgroup], ACROSS)
    if scales is not None:
        scales = lax.broadcast_in_dim(scales, (ROWS, settings.tokens), [1])
    plgpu.barrier_arrive(getattr(x, f"{name}_used").at[slot])
    return [getattr(x, f"wide_{n}").at[x.warpgroup] for n in range(settings.parts)], scales


def pick(settings: Settings, x, numbers, slot) -> None:
    """Put the scales of this block's head side by side."""
    for token in range(0, settings.tokens, ROWS):
        every = gpu.load(numbers.at[slot, pl.ds(token, ROWS)], plgpu.Layout.WGMMA)
        mine = lax.broadcasted_iota(jnp.int32, every.shape, 1) == x.group
        x.picked.at[x.warpgroup, pl.ds(token, ROWS)][...] = jnp.sum(jnp.where(mine, every, 0.0), axis=1)


def spread(settings: Settings, numbers, slot, token: int, channel: int, step: int):
    """The scales of `step` bytes of `ROWS` tokens, one for each byte."""
    bytes_of_block = settings.width // settings.blocks
    found = None
    for block in range(channel // bytes_of_block, -(-(channel + step) // bytes_of_block)):
        along = gpu.load(numbers.at[slot, block, pl.ds(token, ROWS)], WIDE.reduce(1))
        scales = lax.broadcast_in_dim(along, (ROWS, step), [0])
        if found is not None:
            column = channel + lax.broadcasted_iota(jnp.int32, (ROWS, step), 1)
            scales = jnp.where(column >= block * bytes_of_block, scales, found)
        found = scales
    return found


def decode(settings: Settings, names, *refs) -> None:
    """out and lse of one head's queries over each half of a split: softmax as it comes, rescaled where the largest logit
    grows."""
    x = place(settings, names, refs)
    wide = lambda numbers, size: lax.broadcast_in_dim(numbers, (ROWS, size), [0])

    def mma(total, a, b, **more):
        return gpu.mma(total, a, b, interpret=settings.interpret, **more)

    def step(n, carry):
        sums, top, total = carry
        n = n * COMPUTE + x.warpgroup
        slot = lax.rem(n, settings.places)
        start = (x.first + n) * settings.tokens
        plgpu.barrier_wait(x.k_ready.at[slot])
        keys, scales = widened(settings, x, "k", slot, start)
        logits = (ROWS, settings.tokens)
        for part, key in enumerate(keys):
            logits = mma(logits, getattr(x, f"q_tile_{part}"), key, transposed=True)
        if settings.bits is None:
            plgpu.barrier_arrive(x.k_used.at[slot])
        if scales is not None:
            logits = logits * scales
        logits = masked(settings, x, gpu.scaled(logits, settings.scale, settings.cap), start)
        before, top = top, jnp.maximum(top, jnp.max(logits, axis=1))
        # A row that has seen nothing yet has top = -inf; -inf - -inf would be NaN.
        level = jnp.where(top == -jnp.inf, 0.0, top)
        weights = jnp.exp2(logits - wide(level, settings.tokens))
        shrink = jnp.exp2(before - level)
        total = total * shrink + jnp.sum(weights, axis=1)
        sums = [part * wide(shrink, settings.width) for part in sums]
        plgpu.barrier_wait(x.v_ready.at[slot])
        taken, scales = widened(settings, x, "v", slot, start)
        if settings.bits is None:
            clean(settings, x, taken[0], start)
        if scales is not None:
            # The scale of what nobody has written may be NaN.
            weights = jnp.where(weights > 0.0, weights * scales, 0.0)
        weights = weights.astype(settings.dtype)
        sums = [mma(part, weights, value) for part, value in zip(sums, taken, strict=True)]
        if settings.bits is None:
            plgpu.barrier_arrive(x.v_used.at[slot])
        return sums, top, total

    def compute():
        plgpu.barrier_wait(x.q_ready)
        nothing = [gpu.zeros((ROWS, settings.width)) for _ in range(settings.parts)]
        begin = nothing, gpu.zeros((ROWS,), ALONG) - jnp.inf, gpu.zeros((ROWS,), ALONG)
        mine = lax.div(x.steps - x.warpgroup + (COMPUTE - 1), COMPUTE)
        sums, top, total = lax.fori_loop(0, mine, step, begin)
        empty = total == 0.0
        share = jnp.where(empty, 1.0, total)
        part = x.split * COMPUTE + x.warpgroup
        lse = x.lse_rows.at[x.warpgroup]
        lse[...] = jnp.where(empty, -jnp.inf, jnp.log(share) + top * LOG2)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse.at[pl.ds(0, settings.rows)], x.lse.at[x.batch, x.group, part])
        tile = x.out_tile.at[x.warpgroup]
        for n, channel in itertools.product(range(settings.parts), range(0, settings.width, CHUNK)):
            if n or channel:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            tile[...] = sums[n][:, channel : channel + CHUNK] / wide(share, CHUNK)
            plgpu.commit_smem()
            to = x.out.at[x.batch, x.group, part, :, pl.ds(n * settings.width + channel, CHUNK)]
            plgpu.copy_smem_to_gmem(tile.at[pl.ds(0, settings.rows)], to)
        plgpu.wait_smem_to_gmem(0)

    def copy(name, slot, pieces):
        tile, ready = getattr(x, f"{name}_tile").at[slot], getattr(x, f"{name}_ready").at[slot]
        part = lambda to, first: to if len(pieces) == 1 else to.at[pl.ds(first, settings.piece)]
        for first, row, token in pieces:
            here = pl.ds(token, settings.piece)
            plgpu.copy_gmem_to_smem(getattr(x, name).at[x.base + row, here, x.group], part(tile, first), ready)
            if not settings.bits:
                continue
            scales, numbers = getattr(x, f"{name}_scales"), getattr(x, f"{name}_numbers")
            if settings.heads:
                plgpu.copy_gmem_to_smem(scales.at[x.base + row, here], part(numbers.at[slot], first), ready)
                continue
            for block in range(settings.blocks):
                to = part(numbers.at[slot, block], first)
                plgpu.copy_gmem_to_smem(scales.at[row, x.group, block, here], to, ready)

    def feed():
        for part in range(settings.parts):
            to = getattr(x, f"q_tile_{part}")
            to = to if settings.rows == ROWS else to.at[pl.ds(0, settings.rows)]
            plgpu.copy_gmem_to_smem(x.q.at[part, x.batch, x.group], to, x.q_ready)

        @pl.loop(0, x.steps)
        def _(n):
            slot = lax.rem(n, settings.places)
            pieces = sources(settings, x, (x.first + n) * settings.tokens)
            for name in ("k", "v"):

                @pl.when(n >= settings.places)
                def _(name=name):
                    plgpu.barrier_wait(getattr(x, f"{name}_used").at[slot])

                copy(name, slot, pieces)

    gpu.roles(x.warpgroup, COMPUTE, compute, feed, (REGISTERS, FEEDER_REGISTERS))
