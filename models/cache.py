"""The key/value cache: ragged by construction.

Row b holds `lens[b]` tokens in slots 0 ... lens[b]-1. New tokens are scattered to the slots that follow, and a query at
position p sees the slots up to p. Prefill in chunks, decoding, verification of several tokens and rows that stopped
early are one code path; rolling a row back is a smaller `lens`.

`KVCache` keeps each row whole, `jaxpar.models.paged.PagedCache` in pages that a table names. The model knows neither: it
takes `cache.pages()` from layer to layer, writes and reads them by `write` and `read` with `cache.table`, and
`cache.holding(pages)` is the cache after that.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import struct

from jaxpar.pallas_kernels.decode.xla import gathered
from jaxpar.pallas_kernels.formats.format import Format, get
from jaxpar.pallas_kernels.formats.quantised import Quantised, quantise
from jaxpar.pallas_kernels.formats.scales import E4M3


@struct.dataclass
class KVCache:
    """L layers, B rows, S slots, G key/value heads, K head size.

    Attributes:
      k: [L, B, S, G, K] keys, already rotated; or `Quantised` along K.
      v: [L, B, S, G, K] values, likewise.
      lens: int32 [B], tokens held by each row.
      there: bool [L, B, S], whether a token has keys and values at a layer: one that did not run there has none, and must
        be masked (a key of zeros would still get its share of the softmax). None: every token ran in every layer.
      behind: what the residual operator keeps for later tokens, leaves [L, B, S, ...], see `jaxpar.models.reach`. None:
        nothing.
      tokens: int32 [B, S], the tokens' ids, where the operator's first state looks at earlier embeddings.
    """

    k: jax.Array
    v: jax.Array
    lens: jax.Array
    there: jax.Array | None = None
    behind: Any = None
    tokens: jax.Array | None = None
    table: ClassVar[None] = None

    @property
    def capacity(self) -> int:
        return self.k.shape[2]

    def pages(self) -> Pages:
        return Pages(self.k, self.v, self.there, self.behind)

    def holding(self, pages: Pages) -> KVCache:
        """The cache with these instead of its own; `lens` is unchanged."""
        return self.replace(k=pages.k, v=pages.v, there=pages.there, behind=pages.behind)


@struct.dataclass
class Pages:
    """What goes from layer to layer beside the residual state. What a call does not use is None.

    Attributes:
      k, v, there, behind: as in `KVCache`.
      record: what a policy that leaves parts of layers out keeps, see `jaxpar.models.routing.skip`.
      tally: what a feed-forward layer with a router counts, see `jaxpar.models.feedforward.duo`.
    """

    k: jax.Array | None = None
    v: jax.Array | None = None
    there: jax.Array | None = None
    behind: Any = None
    record: Any = None
    tally: Any = None


def empty(
    cfg, rows: int, capacity: int, dtype=None, *, there: bool = False, form: str | Format | None = None
) -> KVCache:
    """A cache for `rows` rows of at most `capacity` tokens; with `there`, for tokens that do not run in every layer.

    Args:
      form: the number format that keys and values are kept in, a scale for each block of a head. None: `dtype`.

    Raises:
      ValueError: a format whose blocks do not divide the head size, or that has a scale for the whole tensor.
    """
    shape = (cfg.layers, rows, capacity, cfg.kv_heads, cfg.head_size)
    dtype = jnp.dtype(cfg.dtype if dtype is None else dtype)
    known = jnp.zeros(shape[:3], bool) if there or cfg.depth.sparse else None
    rest = (known, kept_by(cfg, rows, capacity))
    rest += (jnp.zeros((rows, capacity), jnp.int32) if cfg.residual.first_reach(cfg) > 1 else None,)
    if form is None:
        return KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros(rows, jnp.int32), *rest)
    if reason := (found := get(form)).misfit(cfg.head_size):
        raise ValueError(f"keys and values of heads of {cfg.head_size}: {reason}")
    if found.block == "tensor" or isinstance(found.scale, E4M3):
        raise ValueError(
            f"keys and values in {found.name}: its scale for a whole tensor would change with each token; take int4_g32, "
            "int8_row or mxint4"
        )
    pages = jax.eval_shape(lambda: quantise(jnp.zeros(shape), found))
    zeros = lambda: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), pages)
    return KVCache(zeros(), zeros(), jnp.zeros(rows, jnp.int32), *rest)


def kept_by(cfg, rows: int, capacity: int):
    """Empty pages of what the residual operator keeps for later tokens, in the compute dtype: leaves [L, B, S, ...]. None:
    nothing."""
    one = lambda shape: jnp.zeros((cfg.layers, rows, capacity, *shape), jnp.dtype(cfg.dtype))
    return jax.tree.map(one, cfg.residual.memory(cfg), is_leaf=lambda x: isinstance(x, tuple)) or None


def write(pages_LxBxSxGxK, new_BxTxGxK, layer, slots_BxT, table_BxM=None):
    """Scatter one layer's new keys (or values, or whether there are any) to their slots. Slots beyond the capacity, and those of
    pages that a row does not have, are dropped.

    Args:
      table_BxM: int32, the page of each row's slots m·N ... m·N + N - 1, -1 where it has none; then the first argument is
        [L, P, N, G, K]. None: a row is a page.
    """
    if isinstance(pages_LxBxSxGxK, Quantised):
        new = quantise(new_BxTxGxK, pages_LxBxSxGxK.format)
        return jax.tree.map(lambda pages, part: write(pages, part, layer, slots_BxT, table_BxM), pages_LxBxSxGxK, new)
    rows, slots = jnp.arange(slots_BxT.shape[0])[:, None], slots_BxT
    if table_BxM is not None:
        rows, slots = in_pages(slots_BxT, table_BxM, *pages_LxBxSxGxK.shape[1:3])
    new = new_BxTxGxK.astype(pages_LxBxSxGxK.dtype)
    # Slots without a page all get the number of one that is not there.
    return pages_LxBxSxGxK.at[layer, rows, slots].set(new, mode="drop", unique_indices=table_BxM is None)


def in_pages(slots_BxT, table_BxM, pages: int, page: int):
    """Which page of `pages` holds each slot, and where in it, int32 [B, T] each; the page's number is `pages` where none does."""
    number_BxT, most = slots_BxT // page, table_BxM.shape[1]
    page_BxT = jnp.take_along_axis(table_BxM, jnp.minimum(number_BxT, most - 1), axis=1)
    return jnp.where((number_BxT < most) & (page_BxT >= 0), page_BxT, pages), slots_BxT % page


def read(pages_LxBxSxGxK, layer, dtype, table_BxM=None):
    """One layer's keys (or values), [B, S, G, K]; with `table_BxM`, as of `write`, [B, M·N, G, K] gathered from [L, P, N, G, K],
    where slots of pages that a row does not have hold anything finite."""
    return gathered(pages_LxBxSxGxK, layer, table_BxM, dtype)
