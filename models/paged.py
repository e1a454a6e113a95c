"""A key/value cache in pages: rows of any length share one pool, and a row that ends gives its pages back.

A dense cache (`cache.KVCache`) keeps the longest row's room for every row. Here a row's tokens lie in pages of N slots, in
any order in the pool, and a table names them (Kwon et al. 2023, PagedAttention). `decode_attention` reads it by that table.
All is pure and may be compiled; which pages a row gets is the same on every run: the lowest that are free, in order of rows.

    cache, granted_B = reserve(cache, counts_B)              # room for so many more tokens of each row
    cache = write(cache, k_BxTxGxK, v_BxTxGxK, layer)        # each layer's, into that room
    decode_attention(q, cache.k, cache.v, cache.lens + counts_B, layer=layer, table_BxP=cache.table, ...)
    cache = cache.replace(lens=cache.lens + counts_B)        # behind the last layer
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from jaxpar.models import cache as kv
from jaxpar.pallas_kernels.formats.format import Format
from jaxpar.pallas_kernels.formats.quantised import Quantised, quantise


@struct.dataclass
class PagedCache:
    """L layers, P pages of N slots, G key/value heads, K head size, B rows of at most M pages.

    Attributes:
      k, v: [L, P, N, G, K], arrays or `Quantised` along K. A page is of all layers.
      table: int32 [B, M], the page of a row's slots m·N ... m·N + N - 1; -1 where it has none.
      lens: int32 [B], tokens held by each row.
      free: bool [P], pages that no row has.
    """

    k: jax.Array
    v: jax.Array
    table: jax.Array
    lens: jax.Array
    free: jax.Array

    @property
    def page(self) -> int:
        """N"""
        return self.k.shape[2]


def empty(
    cfg, rows: int, most: int, pages: int, page: int, dtype=None, *, form: str | Format | None = None
) -> PagedCache:
    """A cache for `rows` rows of at most `most` tokens (up to whole pages), and `pages` pages of `page` tokens for all of them.

    Args:
      form: as of `cache.empty`.

    Raises:
      ValueError: a size below 1; a format that `cache.empty` refuses.
    """
    for name, size in (("rows", rows), ("most", most), ("pages", pages), ("page", page)):
        if size < 1:
            raise ValueError(f"a paged cache needs {name} of at least 1, got {size}")
    # The pool is a dense cache whose rows are pages.
    pool = kv.empty(cfg, pages, page, dtype, form=form)
    table = jnp.full((rows, -(-most // page)), -1, jnp.int32)
    return PagedCache(pool.k, pool.v, table, jnp.zeros(rows, jnp.int32), jnp.ones(pages, bool))


def reserve(cache: PagedCache, counts_B) -> tuple[PagedCache, jax.Array]:
    """Pages for `counts_B` more tokens of each row, and bool [B], whether a row has room for them now.

    A row that lacks a page gets none at all, and no row behind it that needs one does: rows wait in their order. One that would
    be longer than its table never gets any.
    """
    pages = cache.free.shape[0]
    needed_Bx1 = -(-(cache.lens + counts_B) // cache.page)[:, None]
    new_BxM = (jnp.arange(cache.table.shape[1])[None] < needed_Bx1) & (cache.table < 0)
    fits_B = needed_Bx1[:, 0] <= cache.table.shape[1]
    many_B = jnp.where(fits_B, jnp.sum(new_BxM, axis=1), 0)
    granted_B = fits_B & ((many_B == 0) | (jnp.cumsum(many_B) <= jnp.sum(cache.free)))
    new_BxM = new_BxM & granted_B[:, None]
    # The n-th new place gets the n-th free page.
    nth_BxM = (jnp.cumsum(new_BxM.reshape(-1)) - 1).reshape(new_BxM.shape)
    by_number_P = jnp.argsort(~cache.free, stable=True).astype(jnp.int32)
    table = jnp.where(new_BxM, by_number_P[jnp.clip(nth_BxM, 0, pages - 1)], cache.table)
    taken = jnp.where(new_BxM, table, pages)
    return cache.replace(table=table, free=cache.free.at[taken].set(False, mode="drop")), granted_B


def write(cache: PagedCache, k_BxTxGxK, v_BxTxGxK, layer) -> PagedCache:
    """One layer's new keys and values, into the slots behind those that rows hold. Where no page is, they are dropped."""
    slots_BxT = cache.lens[:, None] + jnp.arange(k_BxTxGxK.shape[1], dtype=jnp.int32)[None]
    number_BxT, most = slots_BxT // cache.page, cache.table.shape[1]
    page_BxT = jnp.take_along_axis(cache.table, jnp.minimum(number_BxT, most - 1), axis=1)
    pages = cache.free.shape[0]
    page_BxT = jnp.where((number_BxT < most) & (page_BxT >= 0), page_BxT, pages)

    def scatter(pool, new):
        return pool.at[layer, page_BxT, slots_BxT % cache.page].set(new.astype(pool.dtype), mode="drop")

    def written(pool, new):
        if isinstance(pool, Quantised):
            return jax.tree.map(scatter, pool, quantise(new, pool.format))
        return scatter(pool, new)

    return cache.replace(k=written(cache.k, k_BxTxGxK), v=written(cache.v, v_BxTxGxK))


def release(cache: PagedCache, gone_B) -> PagedCache:
    """The cache without the tokens of these rows, whose pages are free again."""
    pages = cache.free.shape[0]
    back = jnp.where(gone_B[:, None] & (cache.table >= 0), cache.table, pages)
    return cache.replace(
        table=jnp.where(gone_B[:, None], -1, cache.table),
        lens=jnp.where(gone_B, 0, cache.lens),
        free=cache.free.at[back].set(True, mode="drop"),
    )
