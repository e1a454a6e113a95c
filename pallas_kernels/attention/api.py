"""The public function, and the choice of an implementation."""

from __future__ import annotations

import jax.numpy as jnp

from jaxpar.pallas_kernels.attention import cudnn, mosaic_gpu, mosaic_tpu
from jaxpar.pallas_kernels.attention.differentiable import ByPlatform, attend
from jaxpar.pallas_kernels.attention.mask import MaskSpec
from jaxpar.pallas_kernels.attention.sinks import check_sinks, with_sinks
from jaxpar.pallas_kernels.attention.xla import xla_plan
from jaxpar.pallas_kernels.dispatch import Choice, Implementation, Op

CUDNN = Implementation("cudnn", cudnn.attention_cudnn, cudnn.misfit, platform="cuda")
MOSAIC_TPU = Implementation(
    "mosaic_tpu", mosaic_tpu.plan, mosaic_tpu.misfit, unwise=mosaic_tpu.unwise, platform="tpu", kernel=True
)
MOSAIC_GPU = Implementation(
    "mosaic_gpu", mosaic_gpu.plan, mosaic_gpu.misfit, unwise=mosaic_gpu.unwise, platform="cuda", kernel=True
)
XLA = Implementation("xla", xla_plan)
ATTENTION = Op("attention", (MOSAIC_TPU, CUDNN, MOSAIC_GPU, XLA))
"""The implementations of `attention`, best first. `run` gives the plan of a call; only cuDNN's has a gradient of its own."""
IMPLEMENTATIONS = ATTENTION.names
"""What `implementation` may name."""


def attention(
    q_BxTxHxK,
    k_BxSxGxK,
    v_BxSxGxK,
    *,
    mask: MaskSpec,
    scale: float,
    cap: float | None = None,
    q_start=0,
    k_start=0,
    sinks_H=None,
    lse_out: bool = False,
    implementation: str | None = None,
    interpret=False,
):
    """`softmax(mask(cap(scale · q kᵀ))) v` for each head. Letters: B batch, T queries, S keys, H heads, K head size.

    Differentiable in reverse mode, with "xla" as often as wanted; `attention_reference` in forward mode too.

    Args:
      q_BxTxHxK: queries.
      k_BxSxGxK, v_BxSxGxK: keys and values; G divides H, and query heads g·H/G ... (g+1)·H/G - 1 share head g.
      mask: which keys a query sees. A query that sees none gives 0, log-sum-exp -inf, and zero gradients.
      scale: multiplies the logits.
      cap: soft cap `cap·tanh(logits / cap)`, before the mask.
      q_start, k_start: the index of query 0 and of key 0 (int or int32 scalar, may be traced), so that a block of a
        longer sequence is masked as it is there.
      sinks_H: float, a logit for each head that takes part in its softmax and has no value (see `sinks`). Differentiable.
      lse_out: also return the log-sum-exp of each query's logits, with which partial results over parts of the keys
        are merged. It is differentiable.
      implementation: "xla" (plain XLA, blocks of queries), "cudnn" (bfloat16 and float16 on NVIDIA GPUs), "mosaic_tpu"
        (flash attention on TPUs), "mosaic_gpu" (flash attention on Hopper GPUs, in bfloat16 and float16, for what cuDNN
        cannot do too), or None: for each platform that the call may be lowered for, the first of its own that can do the
        call and is known to be worth it (cuDNN before "mosaic_gpu"), else "xla".
        `explain(ATTENTION, q, k, v, mask=...)` says which and why.
      interpret: run the named kernel in Pallas' interpreter (True, or its parameters), on any platform and very slowly.

    Returns:
      out [B, T, H, K] in q's dtype; with `lse_out` also lse [B, H, T], float32 (float64 for float64 inputs).

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or a named one that cannot do this call.
    """
    _check_shapes(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, cap)
    check_sinks("attention", sinks_H, q_BxTxHxK.shape[2])
    mask.check(q_BxTxHxK.shape[0], q_BxTxHxK.shape[1], k_BxSxGxK.shape[1])
    arrays = q_BxTxHxK, k_BxSxGxK, v_BxSxGxK
    call = dict(mask=mask, scale=scale, cap=cap, q_start=q_start, k_start=k_start)
    with_lse = lse_out or sinks_H is not None
    choice = ATTENTION.choose(implementation, *arrays, interpret=interpret, lse_out=with_lse, **call)

    def planned(choice: Choice):
        def run(q, k, v):
            plans = tuple((one.name, _plan(one, interpret, q, k, v, **call)) for one in choice.all)
            plan = ByPlatform(choice, plans) if choice.special else plans[0][1]
            out, lse = attend(plan, q, k, v, mask, (q_start, k_start))
            return (out, lse) if with_lse else out

        return run

    if sinks_H is not None:
        out, lse = with_sinks(*planned(choice)(*arrays), sinks_H)
        return (out, lse) if lse_out else out
    if CUDNN not in choice.all:
        return planned(choice)(*arrays)
    own = lambda q, k, v: cudnn.attention_cudnn(q, k, v, mask=mask, scale=scale)
    return choice.call(lambda one: own if one is CUDNN else planned(Choice(one)), *arrays)


def attention_gradients(
    q_BxTxHxK,
    k_BxSxGxK,
    v_BxSxGxK,
    d_out_BxTxHxK,
    lse_BxHxT,
    drop_BxHxT,
    *,
    mask: MaskSpec,
    scale: float,
    cap: float | None = None,
    q_start=0,
    k_start=0,
    implementation: str | None = None,
    interpret=False,
):
    """What some keys add to the gradients of attention over more of them, in float32 or better, to be summed over the parts.

    Dao et al. 2022, algorithm 4: the log-sum-exp over all keys gives a part's final weights.

    Args:
      lse_BxHxT: float32, the log-sum-exp of each query over all keys, of this part and all others.
      drop_BxHxT: float32, what the softmax over all keys takes off each row's gradient, see `block.dropped`.
      implementation: what a call of `attention` with these arguments and `lse_out` gets. `cudnn` gives no log-sum-exp.

    Returns:
      dq [B, T, H, K], dk and dv [B, S, G, K].

    Raises:
      ValueError: as `attention`.
    """
    _check_shapes(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, cap)
    mask.check(q_BxTxHxK.shape[0], q_BxTxHxK.shape[1], k_BxSxGxK.shape[1])
    arrays = q_BxTxHxK, k_BxSxGxK, v_BxSxGxK
    call = dict(mask=mask, scale=scale, cap=cap, q_start=q_start, k_start=k_start)
    choice = ATTENTION.choose(implementation, *arrays, interpret=interpret, lse_out=True, **call)
    plan = ByPlatform(choice, tuple((one.name, _plan(one, interpret, *arrays, **call)) for one in choice.all))
    rows = lse_BxHxT, drop_BxHxT, d_out_BxTxHxK
    return tuple(plan.backward(*arrays, mask, (q_start, k_start), *rows, precise=True))


def _plan(one: Implementation, interpret, q, k, v, **call):
    return one.run(q, k, v, interpret=interpret, **call) if one.kernel else one.run(q, k, v, **call)


def _check_shapes(q, k, v, cap) -> None:
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"attention needs q [B, T, H, K] and k, v [B, S, G, K] of one shape; got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"attention: q {q.shape} and k {k.shape} must agree in batch and head size, and the {q.shape[2]} query "
            f"heads must be a multiple of the {k.shape[2]} key/value heads"
        )
    if not jnp.issubdtype(q.dtype, jnp.floating) or q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"attention needs q, k, v of one float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if cap is not None and not cap > 0:
        raise ValueError(f"attention's soft cap must be positive, got {cap}; use None for no cap")
