"""Softmax reads over sources, each token for itself: of many queries over one stack of sources (what a block of layers sees of
the sources before it), and of one source more, merged into such a part.

The sources are the large thing here (n streams of the model's width), so both passes go over them a fixed number of times,
however many readers there are, and the backward pass writes their gradient once. It is written out for that; XLA's own would
write one for each reader and add them. That of a merge goes over its two streams and their gradient twice, for the sums over
the width and for what is made of them, and keeps four numbers a token.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxpar.models.residual.base import dot, masked


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def reads(w_RxD, x_nxBxTxD, visible_n, epsilon: float):
    """`softmax_i(w_r · RMSNorm(x_i)) · x_i` over visible sources i for each reader r, to be merged with other parts.

    Args:
      w_RxD: float32, queries times the scales of their norms.
      visible_n: bool [n]. None: all of them.
      epsilon: of the norms.

    Returns:
      Σ_i e_ri x_i [B, T, R, D] in the sources' dtype, max_i of the logits and Σ_i e_ri, float32 [B, T, R], where e_ri are
      exponentials of logits less their maximum. No gradient comes from the maximum: what is merged does not depend on it.
      It has no forward-mode derivative.
    """
    return _reads(w_RxD, x_nxBxTxD, visible_n, epsilon)[0]


def _reads(w_RxD, x_nxBxTxD, visible_n, epsilon):
    raw_nxBxTxR = products(x_nxBxTxD, w_RxD)
    inverse_nxBxT = jax.lax.rsqrt(dot(x_nxBxTxD, x_nxBxTxD) / x_nxBxTxD.shape[-1] + epsilon)
    logits_nxBxTxR = masked(visible_n, raw_nxBxTxR * inverse_nxBxT[..., None], -jnp.inf)
    top_BxTxR = logits_nxBxTxR.max(0)
    e_nxBxTxR = jnp.exp(logits_nxBxTxR - top_BxTxR[None])
    weights_nxBxTxR = e_nxBxTxR.astype(x_nxBxTxD.dtype).astype(raw_nxBxTxR.dtype)
    parts = (w[..., None] * x.astype(w.dtype)[:, :, None] for w, x in zip(weights_nxBxTxR, x_nxBxTxD, strict=True))
    out_BxTxRxD = sum(parts).astype(x_nxBxTxD.dtype)
    return (out_BxTxRxD, top_BxTxR, e_nxBxTxR.sum(0)), (raw_nxBxTxR, inverse_nxBxT, e_nxBxTxR)


def _forward(w_RxD, x_nxBxTxD, visible_n, epsilon):
    out, kept = _reads(w_RxD, x_nxBxTxD, visible_n, epsilon)
    return out, (w_RxD, x_nxBxTxD, *kept)


def _backward(epsilon, saved, gradients):
    w_RxD, x_nxBxTxD, raw_nxBxTxR, inverse_nxBxT, e_nxBxTxR = saved
    g_BxTxRxD, _, g_sum_BxTxR = gradients
    precise = raw_nxBxTxR.dtype
    d_e = jnp.einsum("btrd,nbtd->nbtr", g_BxTxRxD, x_nxBxTxD, preferred_element_type=precise, precision="highest")
    # Where a source is not seen, e is 0.
    d_logits_nxBxTxR = e_nxBxTxR * (d_e + g_sum_BxTxR[None])
    d_raw_nxBxTxR = d_logits_nxBxTxR * inverse_nxBxT[..., None]
    d_norm_nxBxT = (d_logits_nxBxTxR * raw_nxBxTxR).sum(-1) * inverse_nxBxT**3 / x_nxBxTxD.shape[-1]
    d_w = jnp.einsum("nbtr,nbtd->rd", d_raw_nxBxTxR.astype(x_nxBxTxD.dtype), x_nxBxTxD, preferred_element_type=precise)
    weights_nxBxTxR = e_nxBxTxR.astype(x_nxBxTxD.dtype).astype(precise)

    def of_source(x_BxTxD, weights_BxTxR, d_raw_BxTxR, d_norm_BxT):
        d_x = -d_norm_BxT[..., None] * x_BxTxD.astype(precise)
        for r in range(w_RxD.shape[0]):
            d_x += weights_BxTxR[..., r, None] * g_BxTxRxD[:, :, r].astype(precise)
            d_x += d_raw_BxTxR[..., r, None] * w_RxD[r].astype(precise)[None, None]
        return d_x.astype(x_BxTxD.dtype)

    d_x_nxBxTxD = jnp.stack(list(map(of_source, x_nxBxTxD, weights_nxBxTxR, d_raw_nxBxTxR, d_norm_nxBxT)))
    return d_w.astype(w_RxD.dtype), d_x_nxBxTxD, None


reads.defvjp(_forward, _backward)


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
    return out, (w_D, whole, rest_BxTxD, kept)


def _merge_backward(epsilon, saved, g_BxTxD):
    w_D, (o_BxTxD, m_BxT, _), rest_BxTxD, (raw_BxT, inverse_BxT, old_BxT, new_BxT) = saved
    precise = raw_BxT.dtype
    to_rest_BxT = dot(g_BxTxD, rest_BxTxD)
    to_out_BxT = old_BxT * dot(g_BxTxD, o_BxTxD) + new_BxT * to_rest_BxT
    d_s_BxT = new_BxT * (to_rest_BxT - to_out_BxT)
    d_raw_BxT = d_s_BxT * inverse_BxT
    d_norm_BxT = d_s_BxT * raw_BxT * inverse_BxT**3 / rest_BxTxD.shape[-1]
    d_w_D = jnp.einsum("bt,btd->d", d_raw_BxT, rest_BxTxD.astype(precise), precision=jax.lax.Precision.HIGHEST)
    g, rest, w = (x.astype(precise) for x in (g_BxTxD, rest_BxTxD, w_D))
    d_rest = new_BxT[..., None] * g + d_raw_BxT[..., None] * w[None, None] - d_norm_BxT[..., None] * rest
    d_whole = (old_BxT[..., None] * g).astype(o_BxTxD.dtype), jnp.zeros_like(m_BxT), -old_BxT * to_out_BxT
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
