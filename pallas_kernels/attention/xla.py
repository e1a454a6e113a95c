"""Attention in plain XLA: blocks of queries, so that causal keys which no query of a block sees are never touched.

Its gradient is written out: from the output and the log-sum-exp it makes each block's weights again without a second
softmax, as flash attention does (Dao et al. 2022, algorithm 4), so that what is kept is linear in T.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import jax.numpy as jnp

from jaxpar.pallas_kernels.attention.block import gradients, masked_logits
from jaxpar.pallas_kernels.attention.mask import MaskSpec

BLOCK = 64
"""Queries in a block, at least: shorter ones make more kernels to compile than they save."""
MOST_BLOCKS = 4
"""Blocks are unrolled; 4 of them do 62 % of the work of the whole square. On two CPU cores, 8 were no faster."""


@dataclass(frozen=True)
class XlaPlan:
    """As `attention_reference`; the causal square is cut into blocks of queries where its place is known.

    Differentiable in reverse mode, as often as wanted; not in forward mode (`attention_reference` is).

    Attributes:
      blocks: `(first, last, begin, end)`: queries first ... last - 1 see no key outside of begin ... end - 1.
    """

    blocks: tuple[tuple[int, int, int, int], ...]
    scale: float
    cap: float | None

    def forward(self, q, k, v, mask, starts):
        B, T, H, K = q.shape
        outs, lses = [], []
        for first, last, begin, end in self.blocks:
            place = _place(first, last, begin, end, starts)
            cut_q, cut_k = q[:, first:last], k[:, begin:end]
            logits, _ = masked_logits(cut_q, cut_k, mask, scale=self.scale, cap=self.cap, **place)
            top = jnp.max(logits, axis=-1, keepdims=True, initial=-jnp.inf)
            # A row that sees nothing has top = -inf; -inf - -inf would be NaN.
            top = jnp.where(top == -jnp.inf, 0, top)
            weights = jnp.exp(logits - top)
            total = jnp.sum(weights, axis=-1)
            empty = total == 0
            share = jnp.where(empty, 1, total)
            lses.append(jnp.where(empty, -jnp.inf, jnp.log(share) + top[..., 0]))
            out = jnp.einsum(
                "bgrts,bsgk->btgrk", weights.astype(v.dtype), v[:, begin:end], preferred_element_type=logits.dtype
            )
            # Divided after the product: T x K divisions instead of T x S.
            outs.append(out / jnp.transpose(share, (0, 3, 1, 2))[..., None])
        return _joined(outs, 1).reshape(B, T, H, K).astype(q.dtype), _joined(lses, -1).reshape(B, H, T)

    def backward(self, q, k, v, mask, starts, lse, drop, d_out, precise=False):
        dqs, dks, dvs = [], [], []
        for first, last, begin, end in self.blocks:
            cut_q, cut_k = (lambda x, i=first, j=last: x[:, i:j]), (lambda x, i=begin, j=end: x[:, i:j])
            rows = cut_q(d_out), lse[..., first:last], drop[..., first:last]
            place = _place(first, last, begin, end, starts)
            new = gradients(cut_q(q), cut_k(k), cut_k(v), *rows, mask, scale=self.scale, cap=self.cap, **place)
            for parts, part in zip((dqs, dks, dvs), new, strict=True):
                parts.append(part)
        spans = [block[2:] for block in self.blocks]
        found = _joined(dqs, 1), _add_up(dks, spans, k.shape[1]), _add_up(dvs, spans, k.shape[1])
        if precise:
            return found
        return tuple(x.astype(like.dtype) for x, like in zip(found, (q, k, v), strict=True))


def xla_plan(q, k, v, *, mask: MaskSpec, scale: float, cap: float | None = None, q_start=0, k_start=0) -> XlaPlan:
    """The plan of a call."""
    return XlaPlan(_blocks(mask, q.shape[1], k.shape[1], q_start, k_start), scale, cap)


def _blocks(mask: MaskSpec, T: int, S: int, q_start, k_start) -> tuple[tuple[int, int, int, int], ...]:
    """As `XlaPlan.blocks`."""
    count = min(MOST_BLOCKS, T // BLOCK)
    known = isinstance(q_start, int) and isinstance(k_start, int) and mask.q_index is None and mask.k_index is None
    if not (mask.causal and known) or count < 2:
        return ((0, T, 0, S),)
    found = []
    for first, last in itertools.pairwise(T * i // count for i in range(count + 1)):
        # Keys from the first query's window on, up to the last query itself.
        end = min(max(q_start + last - k_start, 1), S)
        begin = 0
        if isinstance(mask.window, int):
            begin = min(max(q_start + first - mask.window + 1 - k_start, 0), end - 1)
        found.append((first, last, begin, end))
    return tuple(found)


def _place(first: int, last: int, begin: int, end: int, starts) -> dict:
    return dict(rows=(first, last - first), cols=(begin, end - begin), q_start=starts[0], k_start=starts[1])


def _joined(parts: list, axis: int):
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)


def _add_up(parts, spans, S: int):
    """The sum of parts [B, end - begin, ...] that lie at `(begin, end)` of S keys.

    Put together piece by piece: padding each part to S keys first would move far more memory.
    """
    if spans == [(0, S)]:
        return parts[0]
    edges = sorted({0, S, *itertools.chain(*spans)})
    pieces = []
    for begin, end in itertools.pairwise(edges):
        covering = [
            x[:, begin - b : end - b] for x, (b, e) in zip(parts, spans, strict=True) if b <= begin and end <= e
        ]
        nothing = jnp.zeros_like(parts[0], shape=(parts[0].shape[0], end - begin, *parts[0].shape[2:]))
        pieces.append(sum(covering[1:], covering[0]) if covering else nothing)
    return jnp.concatenate(pieces, axis=1)
