"""What a call of the model brings besides parameters and tokens: arrays (`Context`) and functions (`Ops`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from jaxpar.models.cache import KVCache
from jaxpar.models.paged import PagedCache
from jaxpar.models.route import Route
from jaxpar.models.routing.record import Skip
from jaxpar.models.rows import Rows
from jaxpar.models.shards import Whole, cut
from jaxpar.models.steering import Steering
from jaxpar.pallas_kernels.attention import attention
from jaxpar.pallas_kernels.decode import decode_attention
from jaxpar.pallas_kernels.formats.quantised import Quantised
from jaxpar.pallas_kernels.matmul import quant_matmul

Cache = KVCache | PagedCache


def matmul(x, w, contract: int = 1):
    """`x [..., a...] · w [a..., b...] -> [..., b...]`, over the last `contract` dimensions of x and the first of w.

    `w` is cast to x's dtype, and both are flattened to one plain matrix product: the form every backend is best at. One that
    is `Quantised` is [a, b...], what is summed over being one dimension.
    """
    if isinstance(w, Quantised):
        return quant_matmul(x, w, contract=contract)
    inner = math.prod(w.shape[:contract])
    lead, outer = x.shape[: x.ndim - contract], w.shape[contract:]
    y = _product(x.reshape(*lead, inner), w.astype(x.dtype).reshape(inner, math.prod(outer)))
    return y.reshape(*lead, *outer)


@jax.custom_vjp
def _product(x_xxN, w_NxM):
    """`x @ w`, whose gradient by w is written so that the smaller of its two operands is the one to be transposed.

    JAX's own rule always transposes the output's gradient; where a backend must copy to transpose (CPU), that is the
    larger one in every projection that widens.
    """
    return x_xxN @ w_NxM


def _product_fwd(x, w):
    return x @ w, (x, w)


def _product_bwd(kept, g_xxM):
    x_xxN, w_NxM = kept
    rows = tuple(range(x_xxN.ndim - 1))
    over_rows = lambda a, b: jax.lax.dot_general(a, b, ((rows, rows), ((), ())))
    N, M = w_NxM.shape
    return g_xxM @ w_NxM.T, over_rows(x_xxN, g_xxM) if N <= M else over_rows(g_xxM, x_xxN).T


_product.defvjp(_product_fwd, _product_bwd)


def unconstrained(x, axes: tuple[str | None, ...]):
    """The sharding constraint of a model on one device: none."""
    return x


@dataclass(frozen=True)
class Ops:
    """The functions that a block calls: the one way in for sequence parallelism, quantised matmuls and shardings.

    Attributes:
      attention: as `jaxpar.pallas_kernels.attention.attention`.
      decode: as `jaxpar.pallas_kernels.decode.decode_attention`, of few tokens with a cache.
      matmul: `(x, w, contract=1) -> y` of layers, see `matmul` above.
      constrain: `(x, logical axes) -> x`, says how an activation is spread. The model names logical axes only, never a
        mesh.
      shards: what of tokens, kernels and vocabulary is at hand, see `jaxpar.models.shards`.
      rows: where the tokens of a row lie, see `jaxpar.models.rows`.
      cache: the number format that generation keeps keys and values in. None: the compute dtype.
    """

    attention: Callable = attention
    decode: Callable = decode_attention
    matmul: Callable = matmul
    constrain: Callable = unconstrained
    shards: Whole = Whole()
    rows: Rows = Rows()
    cache: str | None = None

    def whole_row(self, sums):
        """Sums over the stream's tokens at hand -> over all tokens of their rows, which may lie on several devices."""
        return self.rows.total(self.shards.total(sums))

    def columns(self, x_BxSxD, kernels: Sequence) -> list:
        """What the stream's tokens are with each of these kernels, which all read the same x: [B, T, ...] each."""
        return self.shards.columns(self.matmul, x_BxSxD, kernels)

    def of_head(self) -> Ops:
        """What the output projection is computed with: it stays in the compute dtype."""
        return replace(self, matmul=matmul)

    def row(self, h, kernel, contract: int = 1):
        """The product at a branch's end, on the stream's tokens: [B, S, D]."""
        return self.shards.row(self.matmul, h, kernel, contract)


@struct.dataclass
class Context:
    """Per call. B rows, T tokens.

    Attributes:
      positions: int32 [B, T], the position of each token in its document. None: 0, 1, 2, ...
      segments: int32 [B, T], which document of the row a token belongs to, from 1; tokens see their own document only.
        0 is padding. None: one document a row.
      cache: keys and values of earlier tokens. With a cache, positions count from `cache.lens` and `segments` must be
        None: a row is one document.
      key: the random key of this step, for dropout. None: evaluation, nothing is dropped.
      sample_ids: int32 [B], the global example index of each row, which dropout folds into the key so that it does not
        depend on how rows are spread. Needed where `key` is given.
      places: int32 [T], the place in its row of each token: a device that holds a part of every row says here which.
        Dropout folds it in too, and `reach` finds the tokens before by it. None: 0, 1, 2, ...
      route: which layers run, see `Route`. None: all, in order.
      skip: which parts of layers each token leaves out, see `jaxpar.models.routing.skip`. None: none.
      modules: int32 [L] or [L, B, T], which module each token takes in each layer, for a feed-forward layer that has several
        (`jaxpar.models.feedforward.duo`). None: as the layer says.
      steering: what is added to the stream behind layers, see `jaxpar.models.steering`. None: nothing.
      present: bool [B, T], which of these tokens get keys and values in the layer at hand. None: all.
      ops: the functions that the blocks call (static).
    """

    positions: jax.Array | None = None
    segments: jax.Array | None = None
    cache: Cache | None = None
    key: jax.Array | None = None
    sample_ids: jax.Array | None = None
    places: jax.Array | None = None
    route: Route | None = None
    skip: Skip | None = None
    modules: jax.Array | None = None
    steering: Steering | None = None
    present: jax.Array | None = None
    ops: Ops = struct.field(pytree_node=False, default=Ops())

    def cut(self) -> list[Context]:
        """A context for each of the parts that the rows go through the layers in, see `Whole.parts`."""
        if (parts := self.ops.shards.parts) == 1:
            return [self]
        ops = replace(self.ops, shards=replace(self.ops.shards, parts=1))
        rows = cut((self.positions, self.segments, self.sample_ids), parts)
        return [self.replace(positions=p, segments=s, sample_ids=i, ops=ops) for p, s, i in rows]

    def positions_of(self, shape: tuple[int, int]):
        """int32 [B, T]: the given positions, or those that follow from the cache, or 0, 1, 2, ..."""
        if self.positions is not None:
            return self.positions
        steps_T = jnp.arange(shape[1], dtype=jnp.int32)
        start_B = jnp.zeros(shape[0], jnp.int32) if self.cache is None else self.cache.lens
        return start_B[:, None] + steps_T[None, :]


def dropout(cfg, ctx: Context, x_BxSxD, layer, site: int):
    """Zero each element with probability `cfg.dropout` and scale the rest, in training.

    The key folds in the layer, the site (0 embedding, 1 attention, 2 feed-forward), the sample and the token's place in
    its row: the noise of a token is the same on every mesh, however rows and their tokens are spread, for every
    microbatch size, and when a pipeline stage runs alone.
    """
    if cfg.dropout == 0 or ctx.key is None:
        return x_BxSxD
    S, D = x_BxSxD.shape[1:]
    keep = 1.0 - cfg.dropout
    kept = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, keep, (D,))))(token_keys(ctx, S, layer, site))
    return jnp.where(kept, x_BxSxD / keep, 0).astype(x_BxSxD.dtype)


def token_keys(ctx: Context, size: int, layer, site: int):
    """A key for each of the stream's tokens at this layer and site: [B, size]."""
    shards = ctx.ops.shards
    places_T = jnp.arange(size * shards.shards, dtype=jnp.int32) if ctx.places is None else ctx.places
    (places_S,) = shards.own(places_T[None])
    key = jax.random.fold_in(jax.random.fold_in(ctx.key, layer), site)
    row = lambda sample: jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, sample)))(places_S)
    return jax.vmap(row)(ctx.sample_ids)
