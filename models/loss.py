"""Cross-entropy that never holds the logits of all tokens: chunk by chunk along the sequence, gradient in one pass.

Logits of `chunk` tokens of each row exist at a time (all rows, so that a batch spread over devices stays spread). Where
the loss is differentiated, the gradient of each chunk is taken while its logits are there: the backward pass then only
scales what is kept, dx [B, T, D] and dW [V, D], and no logit is computed twice.

Where tokens and vocabulary lie over devices by hand (`Ops.shards`), a device has T of a row's tokens and V of its ids. It
gathers a chunk's tokens, gets their logits for its own ids, and shares maximum, sum and the right logit with the others
(Shoeybi et al. 2019, §3; Korthikanti et al. 2022 for the tokens). No device has logits of the whole vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxpar.models.context import Ops, matmul
from jaxpar.pallas_kernels.varying import alike


def cross_entropy(x_BxTxD, unembed_VxD, targets_BxT, weights_BxT, *, chunk: int, cap=None, ops: Ops = Ops()):
    """The weighted sum of token losses, in nats, and the sum of the weights.

        loss_sum = Σ_bt weights[b, t] · (logsumexp(logits[b, t]) - logits[b, t, targets[b, t]])

    Args:
      x_BxTxD: what the output projection sees; its dtype is the dtype of the projection's operands.
      unembed_VxD: the output projection, cast to x's dtype. Products are accumulated in float32 (float64 for float64).
      targets_BxT: int32 in [0, V). A target outside has no logit: give it weight 0.
      weights_BxT: float [B, T]. Differentiable: the gradient is the token's loss.
      chunk: tokens of each row whose logits exist at once, at most (of each device's own tokens, where it has a share).
      cap: soft cap `cap·tanh(logits / cap)` of the logits.
      ops: `matmul` projects (a function of its own, not the default, is differentiated by JAX), `constrain` says how
        logits are spread, `shards` what is here of tokens and vocabulary.

    Returns:
      loss_sum and weight_sum: scalars, float32 (float64 for float64 inputs); sums of the tokens at hand.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    return _cross_entropy(chunk, cap, ops, x_BxTxD, unembed_VxD, targets_BxT, weights_BxT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _cross_entropy(chunk, cap, ops, x, unembed, targets, weights):
    losses, _, _ = _run(chunk, cap, ops, x, unembed, targets, weights, gradients=False)
    return jnp.sum(losses * weights.astype(losses.dtype)), jnp.sum(weights.astype(losses.dtype))


def _forward(chunk, cap, ops, x, unembed, targets, weights):
    losses, dx, dw = _run(chunk, cap, ops, x, unembed, targets, weights, gradients=True)
    weights = weights.astype(losses.dtype)
    sums = jnp.sum(losses * weights), jnp.sum(weights)
    return sums, (dx, dw, losses, jnp.zeros((0,), x.dtype), jnp.zeros((0,), unembed.dtype))


def _backward(chunk, cap, ops, kept, cotangents):
    dx, dw, losses, like_x, like_w = kept
    d_loss, d_weights = cotangents
    return (
        (dx.astype(losses.dtype) * d_loss).astype(like_x.dtype),
        (dw * d_loss).astype(like_w.dtype),
        None,
        losses * d_loss + d_weights,
    )


_cross_entropy.defvjp(_forward, _backward)


def _run(chunk, cap, ops, x, unembed, targets, weights, *, gradients: bool):
    """Token losses [B, T], and where asked the gradients of their weighted sum: dx [B, T, D], dW [V, D] (else None)."""
    T = x.shape[1]
    precise = jnp.promote_types(x.dtype, jnp.float32)
    one = partial(_chunk, cap, ops, unembed, precise, gradients)
    n = -(-T // chunk)
    if n <= 1:
        return one(x, targets, weights.astype(precise))
    size = -(-T // n)
    if short := n * size - T:  # Weight 0 makes the padding harmless; equal chunks compile once.
        pad = lambda a: jnp.pad(a, ((0, 0), (0, short), *[(0, 0)] * (a.ndim - 2)))
        x, targets, weights = pad(x), pad(targets), pad(weights)

    def body(i, carry):
        losses, dx, dw = carry
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, i * size, size, axis=1)
        put = lambda a, part: jax.lax.dynamic_update_slice_in_dim(a, part, i * size, axis=1)
        part, dx_part, dw_part = one(cut(x), cut(targets), cut(weights).astype(precise))
        if gradients:
            dx, dw = put(dx, dx_part), dw + dw_part
        return put(losses, part), dx, dw

    dx = jnp.zeros_like(x) if gradients else None
    dw = jnp.zeros(unembed.shape, precise) if gradients else None
    start, *_ = alike((jnp.zeros(targets.shape, precise), dx, dw), x, unembed, targets, weights)
    losses, dx, dw = jax.lax.fori_loop(0, n, body, start)
    return losses[:, :T], dx[:, :T] if gradients else None, dw


def _chunk(cap, ops, unembed, precise, gradients, x, targets, weights):
    """One chunk, N tokens of each row: losses [B, N], dx [B, N, D] in x's dtype, dW [V, D] in `precise`."""
    shards = ops.shards
    x, targets, weights = shards.gather((x, targets, weights))
    if ops.matmul is matmul:
        w = unembed.astype(x.dtype)
        logits = jnp.einsum("btd,vd->btv", x, w, preferred_element_type=precise)

        def pull(d_logits):
            d = d_logits.astype(x.dtype)
            if x.dtype == precise:
                # x first: a backend that must copy to transpose copies the smaller of the two.
                dw = jnp.einsum("btd,btv->dv", x, d).T
            else:  # XLA on CPU cannot write a product of bfloat16 in float32 the other way around
                dw = jnp.einsum("btv,btd->vd", d, x, preferred_element_type=precise)
            return jnp.einsum("btv,vd->btd", d, w), dw
    else:
        project = lambda x, w: ops.matmul(x, w.T).astype(precise)
        logits, pullback = jax.vjp(project, x, unembed) if gradients else (project(x, unembed), None)
        pull = lambda d_logits: (lambda dx, dw: (dx, dw.astype(precise)))(*pullback(d_logits))
    logits = ops.constrain(logits, ("batch", "length", "vocabulary"))
    if cap is not None:
        raw, logits = logits, cap * jnp.tanh(logits / cap)
    top = shards.largest(jnp.max(logits, axis=-1, keepdims=True))
    weights_V = jnp.exp(logits - top)
    total = shards.total(jnp.sum(weights_V, axis=-1, keepdims=True))
    # A comparison instead of a gather: it needs no exchange where the vocabulary is spread over devices.
    ids = targets - shards.first_id(logits.shape[-1])
    hit = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == ids[:, :, None]
    right = shards.total(jnp.sum(jnp.where(hit, logits, 0), axis=-1))
    losses = shards.own(jnp.log(total[..., 0]) + top[..., 0] - right)
    if not gradients:
        return losses, None, None
    d = (weights_V / total - hit) * weights[:, :, None]
    if cap is not None:
        d = d * (1 - jnp.square(jnp.tanh(raw / cap)))
    d = ops.constrain(d, ("batch", "length", "vocabulary"))
    dx, dw = pull(d)
    return losses, shards.scatter(dx), dw
