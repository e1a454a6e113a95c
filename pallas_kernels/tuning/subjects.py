"""What can be tuned: programs of each op's kernels at a shape, and the block sizes to try."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention import MaskSpec, mosaic_tpu
from jaxpar.pallas_kernels.attention.differentiable import attend
from jaxpar.pallas_kernels.formats.format import get
from jaxpar.pallas_kernels.formats.quantised import quantise
from jaxpar.pallas_kernels.matmul import mosaic_tpu as product_tpu
from jaxpar.pallas_kernels.tiles import look_up
from jaxpar.pallas_kernels.tuning.search import Part, Subject

BLOCKS = (256, 512, 1024, 2048)
"""Queries or keys in a block of the TPU kernels."""
ROWS, COLUMNS, SUMS = (32, 64, 128, 256, 512), (128, 256, 512, 1024), (256, 512, 1024, 2048)
"""Rows of x, columns of w and what is summed, in a block of the TPU kernels of products."""


def attention_tpu(
    kind: str | None,
    *,
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    key_heads: int,
    head_size: int,
    window: int | None = None,
    dtype: str = "bfloat16",
    interpret=False,
) -> Subject:
    """Causal attention on TPUs, forward and backward.

    Args:
      kind: of the device, as JAX names it.

    Raises:
      ValueError: the kernels do not do this shape.
    """
    q_shape, k_shape = (batch, queries, heads, head_size), (batch, keys, key_heads, head_size)
    mask, scale = MaskSpec(window=window), head_size**-0.5
    dtype = jnp.dtype(dtype)
    q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in (q_shape, k_shape))
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"attention: {heads} query heads are no multiple of {key_heads} key/value heads")
    if reason := mosaic_tpu.misfit(q, k, k, mask=mask, scale=scale):
        raise ValueError(f"attention on TPUs {reason}")
    start = keys - queries
    sizes = dict(head_size=head_size, queries=queries, keys=keys)
    table = look_up(mosaic_tpu.TABLE, kind, **sizes).fit(queries, keys)

    def planned(tiles, q, k, v):
        call = dict(mask=mask, scale=scale, q_start=start, interpret=interpret)
        return mosaic_tpu.plan(q, k, v, tiles=tiles.fit(queries, keys), **call)

    def forward(tiles):
        return lambda q, k, v: attend(planned(tiles, q, k, v), q, k, v, mask, (start, 0))

    def backward(tiles):
        def run(q, k, v, lse, drop, d_out):
            return planned(tiles, q, k, v).backward(q, k, v, mask, (start, 0), lse, drop, d_out)

        return run

    def make(key, back=False):
        normal = lambda i, shape, dtype=dtype: jax.random.normal(jax.random.fold_in(key, i), shape, dtype)
        arrays = normal(0, q_shape), normal(1, k_shape), normal(2, k_shape)
        numbers = batch, heads, queries
        # Any log-sum-exp will do for the time; one above the logits makes weights between 0 and 1.
        more = (8 + normal(3, numbers, "float32"), normal(4, numbers, "float32"), normal(5, q_shape))
        return arrays + more if back else arrays

    def candidates(a: str, b: str):
        fitted = [table.__class__(*pair, *pair).fit(queries, keys) for pair in itertools.product(BLOCKS, BLOCKS)]
        return _distinct({a: getattr(one, a), b: getattr(one, b)} for one in fitted)

    parts = (
        Part("forward", candidates("queries", "keys"), forward, make),
        Part("backward", candidates("queries_back", "keys_back"), backward, lambda key: make(key, back=True)),
    )
    return Subject("attention", "mosaic_tpu", dtype.name, sizes, table, parts)


def quant_matmul_tpu(
    kind: str | None,
    *,
    rows: int,
    outputs: int,
    inputs: int,
    weights: str = "int4_g128",
    activations: str | None = None,
    dtype: str = "bfloat16",
    interpret=False,
) -> Subject:
    """Products with quantised weights on TPUs.

    Args:
      kind: of the device, as JAX names it.
      weights, activations: formats; activations None: in `dtype`.

    Raises:
      ValueError: an unknown format, or a product that the kernels do not do.
    """
    formats, dtype = (get(weights), None if activations is None else get(activations)), jnp.dtype(dtype)

    def make(key):
        x = jax.random.normal(jax.random.fold_in(key, 0), (rows, inputs), dtype)
        w = jax.random.normal(jax.random.fold_in(key, 1), (inputs, outputs), jnp.float32)
        return x if formats[1] is None else quantise(x, formats[1], -1), quantise(w, formats[0], -2)

    for fmt in formats:
        if fmt is not None and (reason := fmt.misfit(inputs)):
            raise ValueError(f"a product of {rows} tokens with weights [{inputs}, {outputs}]: {reason}")
    a, b = jax.eval_shape(make, jax.random.key(0))
    if reason := product_tpu.misfit(a, b, (-1, -2), dtype):
        raise ValueError(f"a quantised product on TPUs {reason}")
    sizes = dict(rows=rows, columns=outputs, sums=inputs)
    table = look_up(product_tpu.TABLE, kind, **sizes)
    run = lambda tiles: lambda a, b: product_tpu.product_mosaic_tpu(a, b, dtype, tiles=tiles, interpret=interpret)
    most = lambda options, size: [n for n in options if n < 2 * size] or [options[0]]
    tried = itertools.product(most(ROWS, rows), most(COLUMNS, outputs), most(SUMS, inputs))
    candidates = _distinct({"rows": m, "columns": n, "sums": k} for m, n, k in tried)
    name = product_tpu.operands_name(a, b, dtype)
    return Subject("quant_matmul", "mosaic_tpu", name, sizes, table, (Part("forward", candidates, run, make),))


def _distinct(found) -> tuple[dict[str, int], ...]:
    return tuple({tuple(sizes.items()): sizes for sizes in found}.values())
