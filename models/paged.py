"""A key/value cache in pages: rows of any length share one pool, and a row that ends gives its pages back.

A dense cache (`cache.KVCache`) keeps the longest row's room for every row. Here a row's tokens lie in pages of N slots, in
any order in the pool, and a table names them (Kwon et al. 2023, PagedAttention). `decode_attention` reads it by that table,
and the model takes it as it takes a dense one (`Context.cache`).
All is pure and may be compiled; which pages a row gets is the same on every run: the lowest that are free, in order of rows.

    cache, granted_B = reserve(cache, counts_B)              # room for so many more tokens of each row
    cache = write(cache, k_BxTxGxK, v_BxTxGxK, layer)        # each layer's, into that room
    decode_attention(q, cache.k, cache.v, cache.lens + counts_B, layer=layer, table_BxP=cache.table, ...)
    cache = cache.replace(lens=cache.lens + counts_B)        # behind the last layer
"""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from jaxpar.models import cache as kv
from jaxpar.pallas_kernels.formats.format import Format


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
    tokens: ClassVar[None] = None

    @property
    def page(self) -> int:
        """N"""
        return self.k.shape[2]

    def pages(self) -> kv.Pages:
        return kv.Pages(self.k, self.v)

    def holding(self, pages: kv.Pages) -> PagedCache:
        """The cache with these instead of its own; `lens` and what rows have are unchanged."""
        return self.replace(k=pages.k, v=pages.v)


def check(cfg) -> None:
    """Raises ValueError where tokens leave more behind in a model's layers than keys and values, or not even those."""
    if cfg.depth.sparse:
        raise ValueError(
            f"model.depth = {type(cfg.depth).__name__} leaves tokens without keys and values in some layers, and pages do not "
            "say which; use the dense cache (generate without --pages)"
        )
    if cfg.residual.memory(cfg) or cfg.residual.first_reach(cfg) > 1:
        raise ValueError(
            f"model.residual = {type(cfg.residual).__name__} looks at earlier tokens' streams, and pages hold keys and values "
            "alone; use the dense cache (generate without --pages)"
        )


def empty(
    cfg, rows: int, most: int, pages: int, page: int, dtype=None, *, form: str | Format | None = None
) -> PagedCache:
    """A cache for `rows` rows of at most `most` tokens (up to whole pages), and `pages` pages of `page` tokens for all of them.

    Args:
      form: as of `cache.empty`.

    Raises:
      ValueError: a size below 1; a model that `check` and a format that `cache.empty` refuses.
    """
    check(cfg)
    for name, size in (("rows", rows), ("most", most), ("pages", pages), ("page", page)):
        if size < 1:
            raise ValueError(f"a paged cache needs {name} of at least 1, got {size}")
    # The pool is a dense cache whose rows are pages.
    pool = kv.empty(cfg, pages, page, dtype, form=form)
    table = jnp.full((rows, -(-most // page)), -1, jnp.int32)
    return PagedCache(pool.k, pool.v, table, jnp.zeros(rows, jnp.int32), jnp.ones(pages, bool))


def reserve(cache: PagedCache, counts_B, order_B=None) -> tuple[PagedCache, jax.Array]:
    """Pages for `counts_B` more tokens of each row, and bool [B], whether a row has room for them now.

    A row that lacks a page gets none at all, and no row behind it that needs one does: rows wait in their order. One that would
    be longer than its table never gets any.

    Args:
      order_B: the rows, those first that shall be served first. None: as they stand.
    """
    if order_B is not None:
        sorted_rows = cache.replace(table=cache.table[order_B], lens=cache.lens[order_B])
        found, granted_B = reserve(sorted_rows, counts_B[order_B])
        back_B = jnp.argsort(order_B)
        return cache.replace(table=found.table[back_B], free=found.free), granted_B[back_B]
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
    where = layer, slots_BxT, cache.table
    return cache.replace(k=kv.write(cache.k, k_BxTxGxK, *where), v=kv.write(cache.v, v_BxTxGxK, *where))


def release(cache: PagedCache, gone_B) -> PagedCache:
    """The cache without the tokens of these rows, whose pages are free again."""
    pages = cache.free.shape[0]
    back = jnp.where(gone_B[:, None] & (cache.table >= 0), cache.table, pages)
    return cache.replace(
        table=jnp.where(gone_B[:, None], -1, cache.table),
        lens=jnp.where(gone_B, 0, cache.lens),
        free=cache.free.at[back].set(True, mode="drop"),
    )
