"""Earlier tokens of the stream itself, for residual operators with a reach: in a row, in a cache, and where a row's tokens lie
over devices.

Attention brings earlier tokens in by keys and values; an operator with a reach (`DepthMixer.reach`) looks at the stream of
the reach - 1 tokens in front of each token too, at every layer. Whole rows are at hand in training, pipeline stages
included, and a token sees its own document only. In generation the cache keeps what later tokens will ask for, in the
slots that keys and values have: ragged rows, prefill in chunks and rolling back by a smaller length are those of the keys.

Where a row's tokens lie over devices (a sequence axis, or products by hand), a device has them in *runs* of L consecutive
ones: one run where the layout is contiguous, two in zigzag, and each token alone (L = 1) where they are striped. To an
operator a run is a row of its own with n = reach - 1 tokens in front (`by_run`), which come from the ends of the runs
before it: every device gathers the last min(n, L) tokens of all R runs of a row. Of what an operator keeps of a row that is
n / L, little in the first two; all of it where tokens are striped, whose n + 1 tokens each are then held beside each
other too. A gather of few tokens and not a permute to the next device, which is less: a pipeline computes the
embedding, which a `first_reach` looks back in, under a condition, and that must not hold a permute.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.models import cache as kv
from jaxpar.models.context import Cache, Context
from jaxpar.models.residual.base import Behind

Tree = Any


def slots_before(lens_B, n: int):
    """The slots of the n tokens before each row's next one: int32 [B, n]; negative where there is none."""
    return lens_B[:, None] + jnp.arange(-n, 0, dtype=jnp.int32)[None]


def documents(ctx: Context, shape: tuple[int, int], n: int):
    """The documents of the tokens of each run and of the n before them, as `Behind` has them: int32 [B · runs, n + L].

    Args:
      shape: (B, T), what is at hand of rows inside of branches.
    """
    own_BxT = jnp.zeros(shape, jnp.int32) if ctx.segments is None else ctx.segments
    none = jnp.full((shape[0], n), -1, jnp.int32)
    before = none if ctx.cache is None else jnp.where(slots_before(ctx.cache.lens, n) >= 0, 0, -1)
    return extended(ctx, before, ctx.ops.shards.own(own_BxT))


def extended(ctx: Context, before_Bxn, x_BxS):
    """The tokens of each of the stream's runs behind the n before them: [B · runs, n + L, ...].

    Args:
      before_Bxn: the n tokens before the row's first, [B, n, ...].
      x_BxS: the stream's tokens at hand, [B, S, ...].
    """
    (B, S, *rest), n, shards = x_BxS.shape, before_Bxn.shape[1], ctx.ops.shards
    if n == 0 or not (ctx.ops.rows.spread or shards.shards > 1):
        return jnp.concatenate([before_Bxn, x_BxS], axis=1)
    T = S * shards.shards
    L, order = ctx.ops.rows.runs(T, shards.shards)
    x_BxrxL = x_BxS.reshape(B, S // L, L, *rest)
    last = min(n, L)
    ends = ctx.ops.rows.gather(shards.gather(x_BxrxL[:, :, L - last :].reshape(B, -1, *rest)))
    if order is not None:
        ends = ends.reshape(B, -1, last, *rest)[:, order].reshape(ends.shape)
    # Of runs in the row's order, with the row's own `before` in front. The last n of them before run i end at n + i · last,
    # whether a run has n or not: where it has fewer, its end is all of it.
    ends = jnp.concatenate([before_Bxn, ends], axis=1)
    places_T = jnp.arange(T, dtype=jnp.int32) if ctx.places is None else ctx.places
    (places_S,) = shards.own(places_T[None])
    at_rxn = (places_S[::L] // L * last)[:, None] + jnp.arange(n, dtype=jnp.int32)[None]
    return jnp.concatenate([ends[:, at_rxn], x_BxrxL], axis=2).reshape(-1, n + L, *rest)


def by_run(run, found: Behind, tree: Tree):
    """`run(tree, found)`, to which each run of tokens is a row; what it gives, as the tokens lie in the stream.

    Args:
      found: of [B · runs, n + L, ...].
      tree: arrays [B, S, ...], as are those of the result.
    """
    rows, (B, S) = found.documents.shape[0], jax.tree.leaves(tree)[0].shape[:2]
    if rows == B:
        return run(tree, found)
    apart = lambda x: x.reshape(rows, B * S // rows, *x.shape[2:])
    return jax.tree.map(lambda y: y.reshape(B, S, *y.shape[2:]), run(jax.tree.map(apart, tree), found))


def behind(cfg, ctx: Context, tables, pages, kept: Tree, site: str, i) -> tuple[Behind, Any]:
    """What the residual operator sees of earlier tokens at one site of a layer, and the pages with what later tokens will.

    Args:
      kept: what the operator keeps of the tokens at hand, leaves [B, S, ...].
      i: the layer among those that the pages are of.

    Returns:
      `Behind` of each run, for `by_run`, and the pages.
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


def noted(cache: Cache, tokens_BxQ) -> Cache:
    """The cache with these tokens' ids behind what it holds, where the operator's first state looks at earlier embeddings."""
    if cache.tokens is None:
        return cache
    slots_BxQ = cache.lens[:, None] + jnp.arange(tokens_BxQ.shape[1], dtype=jnp.int32)[None]
    return cache.replace(tokens=kv.write(cache.tokens[None], tokens_BxQ, 0, slots_BxQ)[0])
