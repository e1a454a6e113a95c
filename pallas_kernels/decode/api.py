"""The public function, and the choice of an implementation."""

from __future__ import annotations

import jax.numpy as jnp

from jaxpar.pallas_kernels.attention.sinks import check_sinks, with_sinks
from jaxpar.pallas_kernels.decode import mosaic_gpu, mosaic_gpu_codes, mosaic_tpu
from jaxpar.pallas_kernels.decode.xla import decode_xla
from jaxpar.pallas_kernels.dispatch import Implementation, Op, unmeasured
from jaxpar.pallas_kernels.formats.quantised import Quantised

MOSAIC_TPU = Implementation("mosaic_tpu", mosaic_tpu.decode_mosaic_tpu, mosaic_tpu.misfit, platform="tpu", kernel=True)
MOSAIC_GPU = Implementation("mosaic_gpu", mosaic_gpu.decode_mosaic_gpu, mosaic_gpu.misfit, platform="cuda", kernel=True)
MOSAIC_GPU_CODES = Implementation(
    mosaic_gpu_codes.NAME,
    mosaic_gpu_codes.decode_mosaic_gpu_codes,
    mosaic_gpu_codes.misfit,
    unwise=unmeasured,
    platform="cuda",
    kernel=True,
)
XLA = Implementation("xla", decode_xla)
DECODE_ATTENTION = Op("decode_attention", (MOSAIC_TPU, MOSAIC_GPU_CODES, MOSAIC_GPU, XLA))
"""The implementations of `decode_attention`, best first."""
MOST_QUERIES = mosaic_tpu.MOST_QUERIES
"""Queries a row, up to which kernels are there."""


def decode_attention(
    q_BxTxHxK,
    k,
    v,
    lens_B,
    *,
    scale: float,
    window=None,
    cap: float | None = None,
    layer=None,
    table_BxP=None,
    sinks_H=None,
    lse_out: bool = False,
    implementation: str | None = None,
    interpret=False,
):
    """The newest queries of each row with the keys and values that the row's cache holds. It has no gradient.

    Letters: B rows, T queries a row, H heads, G key/value heads, S slots, K head size, L layers, P pages a row, N slots a
    page. Row b holds `lens_B[b]` tokens in slots 0 ... lens_B[b] - 1, its T queries are the last of them: query t has the
    index i = lens_B[b] - T + t, and sees the slots up to i, of a window those from i - window + 1 on. What stands in
    slots that a row does not hold does not matter, be it NaN.

    Args:
      q_BxTxHxK: queries; few, 1 to 16 where a kernel is to be used.
      k, v: [B, S, G, K], arrays or both `Quantised` along K (KV8, KV4). G divides H; heads share as in `attention`.
      lens_B: int32, these tokens included. More than S: those behind the S-th were never written.
      scale, cap: as of `attention`.
      window: how many tokens a query sees back, itself included; int, int32 scalar (may be traced), or None.
      layer: k and v are [L, B, S, G, K], and this is the layer that is meant (may be traced). A kernel reads it out of
        the whole, which need not be copied.
      table_BxP: int32, which page of k and v [pages, N, G, K] (with `layer` [L, pages, N, G, K]) holds a row's slots
        p·N ... p·N + N - 1. Entries of pages that a row does not hold do not matter.
      sinks_H: as of `attention`.
      lse_out: also return the log-sum-exp of each query's logits.
      implementation: "xla" (dequantises and reads a layer's whole cache), "mosaic_tpu" (flash-decoding on TPUs: reads and
        dequantises only the blocks that a row's queries see; compiled for TPUs, not yet timed on one), "mosaic_gpu" (the
        same for Hopper GPUs, of caches in bfloat16, float16, and int8 and int4 with a scale a head of a token or a block of
        it; on an H200 at the copy bandwidth from bfloat16, at 0.4 and 0.2 of it from codes), "mosaic_gpu_codes" (another one
        for int8 and int4, which has not run on a chip and is taken by its name alone), or None: for each platform that the
        call may be lowered for, its own where it can do the call, else "xla". `explain(DECODE_ATTENTION, q, k, v, lens, scale=...)` says which and why.
      interpret: as of `attention`.

    Returns:
      out [B, T, H, K] in q's dtype; with `lse_out` also lse [B, H, T], float32. A query that sees nothing gives 0 and -inf.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or a named one that cannot do this call.
    """
    _check(q_BxTxHxK, k, v, lens_B, window, cap, layer, table_BxP)
    check_sinks("decode_attention", sinks_H, q_BxTxHxK.shape[2])
    arrays = q_BxTxHxK, k, v, lens_B
    call = dict(scale=scale, window=window, cap=cap, layer=layer, table_BxP=table_BxP)
    choice = DECODE_ATTENTION.choose(implementation, *arrays, interpret=interpret, **call)

    def run(one: Implementation):
        more = {"interpret": interpret} if one.kernel else {}
        return lambda *arrays: one.run(*arrays, **call, **more)

    out, lse = choice.call(run, *arrays)
    if sinks_H is not None:
        out, lse = with_sinks(out, lse, sinks_H)
    return (out, lse) if lse_out else out


def _check(q, k, v, lens, window, cap, layer, table) -> None:
    many = 4 if layer is None else 5
    if q.ndim != 4 or k.ndim != many or k.shape != v.shape:
        raise ValueError(
            f"decode_attention needs q [B, T, H, K] and k, v of {many} dimensions and one shape; got {q.shape}, {k.shape}, "
            f"{v.shape}"
        )
    (B, _, H, K), (rows, _, G, held) = q.shape, k.shape[-4:]
    if held != K or H % G or (table is None and rows != B):
        raise ValueError(
            f"decode_attention: q {q.shape} and k {k.shape} must agree in {'rows and ' if table is None else ''}head size, "
            f"and the {H} query heads must be a multiple of the {G} key/value heads"
        )
    if lens.shape != (B,) or (table is not None and (table.ndim != 2 or table.shape[0] != B)):
        raise ValueError(
            f"decode_attention of {B} rows needs lens [{B}]{'' if table is None else f' and a page table [{B}, pages]'}; got "
            f"{lens.shape}{'' if table is None else f' and {table.shape}'}"
        )
    kinds = [x.format.name if isinstance(x, Quantised) else str(x.dtype) for x in (k, v)]
    if kinds[0] != kinds[1] or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"decode_attention needs float queries, and keys and values of one kind; got {q.dtype}, {kinds[0]} and {kinds[1]}"
        )
    if isinstance(k, Quantised) and (k.axis, v.axis) != (-1, -1):
        raise ValueError(
            f"decode_attention takes keys and values quantised along K, axis -1; got {k.axis} and {v.axis}"
        )
    if cap is not None and not cap > 0:
        raise ValueError(f"decode_attention's soft cap must be positive, got {cap}; use None for no cap")
    if isinstance(window, int) and window < 1:
        raise ValueError(f"decode_attention's window must be at least 1 token, got {window}; use None for no window")
