"""The bodies of the TPU attention kernels: what happens to a block of queries and a block of keys.

Shapes: q block [N, K], k and v block [M, K]. By queries, logits are [N, M] and what belongs to a query is a column; by keys
they are [M, N], transposed, so that products need no transposed operand and what belongs to a query is a row. Columns
are kept [size, 128], all lanes alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxpar.pallas_kernels.attention.labels import Kinds

LANES = 128


@dataclass(frozen=True)
class Settings:
    """What a kernel knows before it is traced.

    Attributes:
      kinds: what the mask compares.
      one_row: all batch rows have the same labels, which are there once.
      precision: of products.
    """

    kinds: Kinds
    scale: float
    cap: float | None
    one_row: bool
    precision: jax.lax.Precision | None

    def row(self, b):
        """The row of the labels for batch row b."""
        return 0 if self.one_row else b

    def product(self, a, b, over: tuple[int, int]):
        """`a` times `b`, summed over one dimension of each, float32."""
        dims = (((over[0],), (over[1],)), ((), ()))
        return jax.lax.dot_general(a, b, dims, precision=self.precision, preferred_element_type=jnp.float32)

    def capped(self, logits):
        """The scaled logits after the cap, and the cap's slope (None without)."""
        logits = logits * self.scale
        if self.cap is None:
            return logits, None
        bent = jnp.tanh(logits / self.cap)
        return self.cap * bent, 1 - bent * bent

    def masked(self, logits, q_labels: dict, k_labels: dict, window):
        seen = self.kinds.seen(q_labels, k_labels, window)
        return logits if seen is None else jnp.where(seen, logits, -jnp.inf)


def column(row_1xN):
    """[N, 128], all lanes alike."""
    return jnp.broadcast_to(row_1xN, (LANES, row_1xN.shape[1])).T


def row(column_Nx1):
    """[1, N]"""
    return jnp.broadcast_to(column_Nx1, (column_Nx1.shape[0], LANES)).T[:1]


def _named(names, refs) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip(names, refs, strict=True)))


def _keep_columns(settings: Settings, x, side: str) -> None:
    """The labels of the side whose block stays, as columns."""
    for n in range(len(settings.kinds.names)):
        getattr(x, f"{side}_labels_columns")[n] = column(getattr(x, f"{side}_labels")[n : n + 1])


def _columns(settings: Settings, x, side: str) -> dict:
    return {name: getattr(x, f"{side}_labels_columns")[n, :, :1] for n, name in enumerate(settings.kinds.names)}


def _rows(settings: Settings, x, side: str) -> dict:
    return {name: getattr(x, f"{side}_labels")[n : n + 1] for n, name in enumerate(settings.kinds.names)}


def _weights(settings: Settings, x, window):
    """By queries: the block's final weights, and the cap's slope."""
    logits, slope = settings.capped(settings.product(x.q[...], x.k[...], (1, 1)))
    logits = settings.masked(logits, _columns(settings, x, "q"), _rows(settings, x, "k"), window[0])
    return jnp.exp(logits - x.lse_column[:, :1]), slope


def forward(settings: Settings, names, first, last, window, *refs):
    """out and lse of a block of queries: softmax as it comes, rescaled where the largest logit grows."""
    x = _named(names, refs)
    at, i, step = settings.row(pl.program_id(0)), pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        x.top[...] = jnp.full_like(x.top, -jnp.inf)
        x.total[...] = jnp.zeros_like(x.total)
        x.sum[...] = jnp.zeros_like(x.sum)
        _keep_columns(settings, x, "q")

    @pl.when(first[at, i] + step <= last[at, i])
    def _():
        logits, _ = settings.capped(settings.product(x.q[...], x.k[...], (1, 1)))
        logits = settings.masked(logits, _columns(settings, x, "q"), _rows(settings, x, "k"), window[0])
        before = x.top[:, :1]
        top = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
        # A row that has seen nothing yet has top = -inf; -inf - -inf would be NaN.
        level = jnp.where(top == -jnp.inf, 0.0, top)
        weights = jnp.exp(logits - level)
        shrink = jnp.exp(before - level)
        x.top[...] = jnp.broadcast_to(top, x.top.shape)
        x.total[...] = x.total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        x.sum[...] = x.sum[...] * shrink + settings.product(weights.astype(x.v.dtype), x.v[...], (1, 0))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        total = x.total[:, :1]
        empty = total == 0.0
        share = jnp.where(empty, 1.0, total)
        x.out[...] = (x.sum[...] / share).astype(x.out.dtype)
        x.lse[...] = row(jnp.where(empty, -jnp.inf, jnp.log(share) + x.top[:, :1]))


def backward_q(settings: Settings, names, first, last, window, *refs):
    """dq of a block of queries."""
    x = _named(names, refs)
    at, i, step = settings.row(pl.program_id(0)), pl.program_id(2), pl.program_id(3)

    @pl.when(step == 0)
    def _():
        x.sum[...] = jnp.zeros_like(x.sum)
        x.lse_column[...] = column(x.lse[...])
        x.drop_column[...] = column(x.drop[...])
        _keep_columns(settings, x, "q")

    @pl.when(first[at, i] + step <= last[at, i])
    def _():
        weights, slope = _weights(settings, x, window)
        d_weights = settings.product(x.d_out[...], x.v[...], (1, 1))
        d_logits = weights * (d_weights - x.drop_column[:, :1])
        if slope is not None:
            d_logits = d_logits * slope
        x.sum[...] += settings.product(d_logits.astype(x.k.dtype), x.k[...], (1, 0))

    @pl.when(step == pl.num_programs(3) - 1)
    def _():
        x.dq[...] = (x.sum[...] * settings.scale).astype(x.dq.dtype)


def backward_k(settings: Settings, names, first, last, window, *refs):
    """dk and dv of a block of keys, over the query heads that share it."""
    x = _named(names, refs)
    at, i, head, step = settings.row(pl.program_id(0)), pl.program_id(2), pl.program_id(3), pl.program_id(4)

    @pl.when((head == 0) & (step == 0))
    def _():
        x.sum_k[...] = jnp.zeros_like(x.sum_k)
        x.sum_v[...] = jnp.zeros_like(x.sum_v)
        _keep_columns(settings, x, "k")

    @pl.when(first[at, i] + step <= last[at, i])
    def _():
        logits, slope = settings.capped(settings.product(x.k[...], x.q[...], (1, 1)))
        logits = settings.masked(logits, _rows(settings, x, "q"), _columns(settings, x, "k"), window[0])
        weights = jnp.exp(logits - x.lse[...])
        d_weights = settings.product(x.v[...], x.d_out[...], (1, 1))
        d_logits = weights * (d_weights - x.drop[...])
        if slope is not None:
            d_logits = d_logits * slope
        x.sum_v[...] += settings.product(weights.astype(x.d_out.dtype), x.d_out[...], (1, 0))
        x.sum_k[...] += settings.product(d_logits.astype(x.q.dtype), x.q[...], (1, 0))

    @pl.when((head == pl.num_programs(3) - 1) & (step == pl.num_programs(4) - 1))
    def _():
        x.dk[...] = (x.sum_k[...] * settings.scale).astype(x.dk.dtype)
        x.dv[...] = x.sum_v[...].astype(x.dv.dtype)
