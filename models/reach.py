"""Earlier tokens of the stream itself, for residual operators with a reach: in a row, in a cache, and where a row's tokens lie
over devices.

Attention brings earlier tokens in by keys and values; an operator with a reach (`DepthMixer.reach`) looks at the stream of
the reach - 1 tokens in front of each token too, at every layer. Whole rows are at hand in training, pipeline stages
included, and a token sees its own document only. In generation the cache keeps what later tokens will ask for, in the
slots that keys and values have: ragged rows, prefill in chunks and rolling back by a smaller length are those of the keys.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.models import cache as kv
from jaxpar.models.context import Context
from jaxpar.models.residual.base import Behind

Tree = Any


def slots_before(lens_B, n: int):
    """The slots of the n tokens before each row's next one: int32 [B, n]; negative where there is none."""
    return lens_B[:, None] + jnp.arange(-n, 0, dtype=jnp.int32)[None]


def documents(ctx: Context, shape: tuple[int, int], n: int):
    """The documents of the stream's S tokens and of the n before them, as `Behind` has them: int32 [B, n + S].

    Args:
      shape: (B, T), whole rows.
    """
    own_BxT = jnp.zeros(shape, jnp.int32) if ctx.segments is None else ctx.segments
    none = jnp.full((shape[0], n), -1, jnp.int32)
    before = none if ctx.cache is None else jnp.where(slots_before(ctx.cache.lens, n) >= 0, 0, -1)
    if ctx.ops.shards.shards > 1:
        # A device's first n tokens of this are those before its own: S is at least n.
        before = ctx.ops.shards.own(jnp.concatenate([before, own_BxT], axis=1)[:, : shape[1]])[:, :n]
    return jnp.concatenate([before, ctx.ops.shards.own(own_BxT)], axis=1)


def extended(ctx: Context, before_Bxn, x_BxS):
    """The stream's tokens [B, S, ...] behind the n before them, [B, n + S, ...].

    Args:
      before_Bxn: the n tokens before the row's first, [B, n, ...]. Where a row's tokens lie over devices, each sends
        its last n to the next.
    """
    n, shards = before_Bxn.shape[1], ctx.ops.shards
    if shards.shards > 1 and n:
        ends = shards.gather(x_BxS[:, -n:])
        before_Bxn = shards.own(jnp.concatenate([before_Bxn, ends[:, :-n]], axis=1))
    return jnp.concatenate([before_Bxn, x_BxS], axis=1)


def behind(cfg, ctx: Context, tables, pages, kept: Tree, site: str, i) -> tuple[Behind, Any]:
    """What the residual operator sees of earlier tokens at one site of a layer, and the pages with what later tokens will.

    Args:
      kept: what the operator keeps of the tokens at hand, leaves [B, S, ...].
      i: the layer among those that the pages are of.
    """
    n = cfg.residual.reach(cfg) - 1
    if ctx.cache is None:
        before = jax.tree.map(lambda x: jnp.zeros((x.shape[0], n, *x.shape[2:]), x.dtype), kept)
    else:
        at_Bxn = slots_before(tables.slots[:, 0], n)
        rows_Bx1 = jnp.arange(at_Bxn.shape[0])[:, None]

        def read(page, x):
            there = (at_Bxn >= 0).reshape(*at_Bxn.shape, *(1,) * (x.ndim - 2))
            return jnp.where(there, page[i, rows_Bx1, jnp.maximum(at_Bxn, 0)], 0).astype(x.dtype)

        before = jax.tree.map(read, pages.behind[site], kept)
        written = jax.tree.map(lambda page, x: kv.write(page, x, i, tables.slots), pages.behind[site], kept)
        pages = pages.replace(behind={**pages.behind, site: written})
    values = jax.tree.map(lambda before, x: extended(ctx, before, x), before, kept)
    return Behind(values, tables.documents), pages


def noted(cache: kv.KVCache, tokens_BxQ) -> kv.KVCache:
    """The cache with these tokens' ids behind what it holds, where the operator's first state looks at earlier embeddings."""
    if cache.tokens is None:
        return cache
    slots_BxQ = cache.lens[:, None] + jnp.arange(tokens_BxQ.shape[1], dtype=jnp.int32)[None]
    return cache.replace(tokens=kv.write(cache.tokens[None], tokens_BxQ, 0, slots_BxQ)[0])
