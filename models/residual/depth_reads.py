"""Softmax reads over sources, each token for itself: of many queries over one stack of sources (what a block of layers sees of
the sources before it), and of one source more, merged into such a part.

The sources are the large thing here (n streams of the model's width), so both passes go over them a fixed number of times,
however many readers there are. The backward pass is written out for that, and adds to the sources' gradient where it lies:
XLA's own would write one for each reader and add them up. That of a merge needs its result, which the norm behind it keeps in
any case, in place of the part that was merged, which then need not be kept or computed again; and four numbers a token.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxpar.models.residual.base import dot, masked, slot
from jaxpar.pallas_kernels.varying import alike, varies_over, varying


def reads(w_RxD, x_nxBxTxD, visible_n, epsilon: float):
    """`softmax_i(w_r · RMSNorm(x_i)) · x_i` over visible sources i for each reader r, to be merged with other parts.

    Args:
      w_RxD: float32, queries times the scales of their norms.
      visible_n: bool [n], those that are not seen last. None: all of them.
      epsilon: of the norms.

    Returns:
      Σ_i e_ri x_i [B, T, R, D] in the sources' dtype, max_i of the logits and Σ_i e_ri, float32 [B, T, R], where e_ri are
      exponentials of logits less their maximum.
    """
    raw_nxBxTxR, inverse_nxBxT = _keys(w_RxD, x_nxBxTxD, epsilon)
    logits_nxBxTxR = masked(visible_n, raw_nxBxTxR * inverse_nxBxT[..., None], -jnp.inf)
    top_BxTxR = logits_nxBxTxR.max(0)
    e_nxBxTxR = jnp.exp(logits_nxBxTxR - top_BxTxR[None])
    weights_nxBxTxR = e_nxBxTxR.astype(x_nxBxTxD.dtype).astype(raw_nxBxTxR.dtype)
    parts = (w[..., None] * x.astype(w.dtype)[:, :, None] for w, x in zip(weights_nxBxTxR, x_nxBxTxD, strict=True))
    out_BxTxRxD = sum(parts).astype(x_nxBxTxD.dtype)
    return out_BxTxRxD, top_BxTxR, e_nxBxTxR.sum(0)


def _keys(w_RxD, x_nxBxTxD, epsilon):
    """Logits before their norm, and the norms' reciprocals."""
    return products(x_nxBxTxD, w_RxD), jax.lax.rsqrt(dot(x_nxBxTxD, x_nxBxTxD) / x_nxBxTxD.shape[-1] + epsilon)


def reads_back(w_RxD, x_nxBxTxD, count, top_BxTxR, g_read, g_nxBxTxD, epsilon: float):
    """The backward pass of `reads`: it goes over the sources that were seen, one after another, and over no others.

    Args:
      w_RxD, x_nxBxTxD, epsilon: as `reads` had them; there may be more sources.
      count: how many of them, from the first on, were seen. May be traced.
      top_BxTxR: the maximum that `reads` gave.
      g_read: the gradients of what it gave. None comes from the maximum: what is merged does not depend on it.
      g_nxBxTxD: the sources' gradient so far.

    Returns:
      The gradient of w, and the sources' with what comes from here added to it.
    """
    w_RxD, x_nxBxTxD, top_BxTxR, g_read, g_nxBxTxD = alike(w_RxD, x_nxBxTxD, top_BxTxR, g_read, g_nxBxTxD)
    g_BxTxRxD, _, g_sum_BxTxR = g_read
    precise = top_BxTxR.dtype
    exact = partial(jnp.einsum, preferred_element_type=precise, precision="highest")
    wide_RxD = w_RxD.astype(precise)

    def of_source(i, carry):
        g_nxBxTxD, d_raw_nxBxTxR = carry
        x_BxTxD = slot(x_nxBxTxD, i)
        raw_BxTxR, inverse_BxT = (one[0] for one in _keys(w_RxD, x_BxTxD[None], epsilon))
        e_BxTxR = jnp.exp(raw_BxTxR * inverse_BxT[..., None] - top_BxTxR)
        d_logits_BxTxR = e_BxTxR * (exact("btrd,btd->btr", g_BxTxRxD, x_BxTxD) + g_sum_BxTxR)
        d_raw_BxTxR = d_logits_BxTxR * inverse_BxT[..., None]
        d_norm_BxT = (d_logits_BxTxR * raw_BxTxR).sum(-1) * inverse_BxT**3 / x_BxTxD.shape[-1]
        weights_BxTxR = e_BxTxR.astype(x_BxTxD.dtype).astype(precise)
        # Not computed again for each of a token's D numbers.
        weights_BxTxR, d_raw_BxTxR, d_norm_BxT = jax.lax.optimization_barrier((weights_BxTxR, d_raw_BxTxR, d_norm_BxT))
        d_x_BxTxD = -d_norm_BxT[..., None] * x_BxTxD.astype(precise)
        for r in range(len(wide_RxD)):
            d_x_BxTxD += weights_BxTxR[..., r, None] * g_BxTxRxD[:, :, r].astype(precise)
            d_x_BxTxD += d_raw_BxTxR[..., r, None] * wide_RxD[r][None, None]
        put = partial(jax.lax.dynamic_update_index_in_dim, index=i, axis=0)
        return put(g_nxBxTxD, slot(g_nxBxTxD, i) + d_x_BxTxD.astype(g_nxBxTxD.dtype)), put(d_raw_nxBxTxR, d_raw_BxTxR)

    none = jnp.zeros((len(x_nxBxTxD), *top_BxTxR.shape), precise)
    begin = g_nxBxTxD, varying(none, varies_over(g_nxBxTxD))
    g_nxBxTxD, d_raw_nxBxTxR = jax.lax.fori_loop(0, count, of_source, begin)
    narrow = d_raw_nxBxTxR.astype(x_nxBxTxD.dtype)
    d_w_RxD = jnp.einsum("nbtr,nbtd->rd", narrow, x_nxBxTxD, preferred_element_type=precise)
    return d_w_RxD.astype(w_RxD.dtype), g_nxBxTxD


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def merge(w_D, whole, rest_BxTxD, there, epsilon: float):
    """A part of a softmax, and one source more: `(e^m · o + e^s · rest) / (e^m · l + e^s)` with `s = w · RMSNorm(rest)`.

    Args:
      w_D: a query times the scale of its norm.
      whole: the part, `(o, m, l)` as `reads` gives them: [B, T, D] and twice [B, T].
      rest_BxTxD: the source.
      there: whether it is visible: bool, may be traced. Where not, what it holds must still be finite.
      epsilon: of the norm.

    Returns:
      [B, T, D] in the source's dtype, summed in float32 or better. No gradient goes to `m`. It has no forward-mode derivative.
    """
    return _merge(w_D, whole, rest_BxTxD, there, epsilon)[0]


def _merge(w_D, whole, rest_BxTxD, there, epsilon):
    o_BxTxD, m_BxT, l_BxT = whole
    precise = jnp.promote_types(rest_BxTxD.dtype, jnp.float32)
    raw_BxT = jnp.einsum(
        "btd,d->bt", rest_BxTxD.astype(precise), w_D.astype(precise), precision=jax.lax.Precision.HIGHEST
    )
    inverse_BxT = jax.lax.rsqrt(dot(rest_BxTxD, rest_BxTxD) / rest_BxTxD.shape[-1] + epsilon)
    s_BxT = jnp.where(there, raw_BxT * inverse_BxT, -jnp.inf)
    top_BxT = jnp.maximum(m_BxT, s_BxT)
    old_BxT, new_BxT = jnp.exp(m_BxT - top_BxT), jnp.exp(s_BxT - top_BxT)
    total_BxT = l_BxT * old_BxT + new_BxT
    old_BxT, new_BxT = old_BxT / total_BxT, new_BxT / total_BxT
    out_BxTxD = o_BxTxD.astype(precise) * old_BxT[..., None] + rest_BxTxD.astype(precise) * new_BxT[..., None]
    return out_BxTxD.astype(rest_BxTxD.dtype), (raw_BxT, inverse_BxT, old_BxT, new_BxT)


def _merge_forward(w_D, whole, rest_BxTxD, there, epsilon):
    out, kept = _merge(w_D, whole, rest_BxTxD, there, epsilon)
    return out, (w_D, rest_BxTxD, out, kept)


def _merge_backward(epsilon, saved, g_BxTxD):
    w_D, rest_BxTxD, out_BxTxD, (raw_BxT, inverse_BxT, old_BxT, new_BxT) = saved
    precise = raw_BxT.dtype
    to_rest_BxT = dot(g_BxTxD, rest_BxTxD)
    to_out_BxT = dot(g_BxTxD, out_BxTxD)
    d_s_BxT = new_BxT * (to_rest_BxT - to_out_BxT)
    d_raw_BxT = d_s_BxT * inverse_BxT
    d_norm_BxT = d_s_BxT * raw_BxT * inverse_BxT**3 / rest_BxTxD.shape[-1]
    d_w_D = jnp.einsum("bt,btd->d", d_raw_BxT, rest_BxTxD.astype(precise), precision=jax.lax.Precision.HIGHEST)
    g, rest, w = (x.astype(precise) for x in (g_BxTxD, rest_BxTxD, w_D))
    d_rest = new_BxT[..., None] * g + d_raw_BxT[..., None] * w[None, None] - d_norm_BxT[..., None] * rest
    d_whole = (old_BxT[..., None] * g).astype(out_BxTxD.dtype), jnp.zeros_like(old_BxT), -old_BxT * to_out_BxT
    return d_w_D.astype(w_D.dtype), d_whole, d_rest.astype(rest_BxTxD.dtype), None


merge.defvjp(_merge_forward, _merge_backward)


def products(x_nxBxTxD, w_RxD):
    """x · w as float32 or better: [n, B, T, R]. Sources in bfloat16 are not widened for it, which would write them anew:
    w goes in as two bfloat16 numbers, whose sum has 16 bits of it."""
    if x_nxBxTxD.dtype != jnp.bfloat16:
        precise = jnp.promote_types(x_nxBxTxD.dtype, jnp.float32)
        return jnp.einsum("nbtd,rd->nbtr", x_nxBxTxD.astype(precise), w_RxD.astype(precise), precision="highest")
    high_RxD = jax.lax.reduce_precision(w_RxD, 8, 7)
    both = jnp.concatenate([high_RxD, w_RxD - high_RxD]).astype(jnp.bfloat16)
    found = jnp.einsum("nbtd,rd->nbtr", x_nxBxTxD, both, preferred_element_type=jnp.float32)
    high, low = jnp.split(found, 2, axis=-1)
    return high + low
