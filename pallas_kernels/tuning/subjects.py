"""What can be tuned: programs of each op's kernels at a shape, and the block sizes to try."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.pallas_kernels.attention import mosaic_gpu as attention_gpu
from jaxpar.pallas_kernels.attention import mosaic_tpu as attention_tpu
from jaxpar.pallas_kernels.attention.differentiable import attend
from jaxpar.pallas_kernels.decode import mosaic_gpu as decode_gpu
from jaxpar.pallas_kernels.decode import mosaic_gpu_codes as decode_codes
from jaxpar.pallas_kernels.decode import mosaic_tpu as decode_tpu
from jaxpar.pallas_kernels.formats.format import get
from jaxpar.pallas_kernels.formats.quantised import Quantised, quantise
from jaxpar.pallas_kernels.matmul import mosaic_gpu as product_gpu
from jaxpar.pallas_kernels.matmul import mosaic_gpu_codes as product_codes
from jaxpar.pallas_kernels.matmul import mosaic_tpu as product_tpu
from jaxpar.pallas_kernels.matmul.products import operands_name
from jaxpar.pallas_kernels.tiles import look_up
from jaxpar.pallas_kernels.tuning.search import Part, Subject

PLATFORMS = {"mosaic_tpu": "TPUs", "mosaic_gpu": "Hopper GPUs", decode_codes.NAME: "Hopper GPUs"}
TPU_BLOCKS = (256, 512, 1024, 2048)
"""Queries or keys in a block."""
GPU_STEPS, GPU_STAGES = (64, 128), (1, 2, 3, 4)
"""Tokens, rows or columns in a tile, and steps that shared memory holds."""
GPU_TILES, GPU_BANDS = ((64, 128), (128, 128), (64, 256)), (4, 8, 16)
"""Of two operands in 8 bits: rows and columns of a warpgroup's tile, and tiles of clusters in a band."""
GPU_WARPGROUPS = (1, 2, 4)
"""Of a block, each with steps of its own, of few rows."""
TPU_ROWS, TPU_COLUMNS, TPU_SUMS = (32, 64, 128, 256, 512), (128, 256, 512, 1024), (256, 512, 1024, 2048)
"""Rows of x, columns of w and what is summed, in a block."""
GPU_BLOCKS = (132, 264)
"""Into how many K, or a cache, is cut: an H200 has 132 processors."""
GPU_CODE_STEPS, GPU_CODE_BLOCKS = (32, 64, 128), (132, 264, 396, 528)
"""Tokens of a step, and blocks, of which a processor has several, of codes that are widened in registers."""
TPU_HELD, TPU_SPLITS = (256, 512, 1024, 2048, 4096, 8192), (1, 2)
"""Tokens times heads in a block of a cache, and into how many parts a row is divided."""


def attention(
    kind: str | None,
    implementation: str,
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
    """Causal attention, forward and backward; the queries are the last of the keys' tokens.

    Args:
      kind: of the device, as JAX names it.
      implementation: "mosaic_tpu" or "mosaic_gpu".

    Raises:
      ValueError: the kernels do not do this shape.
    """
    module = attention_gpu if implementation == "mosaic_gpu" else attention_tpu
    q_shape, k_shape = (batch, queries, heads, head_size), (batch, keys, key_heads, head_size)
    mask, scale, start = MaskSpec(window=window), head_size**-0.5, keys - queries
    dtype = jnp.dtype(dtype)
    q, k = (jax.ShapeDtypeStruct(shape, dtype) for shape in (q_shape, k_shape))
    _check_heads("attention", heads, key_heads)
    if reason := module.misfit(q, k, k, mask=mask, scale=scale):
        raise ValueError(f"attention on {PLATFORMS[implementation]} {reason}")
    sizes = dict(head_size=head_size, queries=queries, keys=keys)
    fit = (lambda tiles: tiles) if module is attention_gpu else (lambda tiles: tiles.fit(queries, keys))
    table = fit(look_up(module.TABLE, kind, **sizes))

    def planned(tiles, q, k, v):
        call = dict(mask=mask, scale=scale, q_start=start, interpret=interpret)
        return module.plan(q, k, v, tiles=fit(tiles), **call)

    def forward(tiles):
        return lambda q, k, v: attend(planned(tiles, q, k, v), q, k, v, mask, (start, 0))

    def backward(some: slice, **fixed):
        """dq, dk and dv, or some of them: the kernels of the others are dropped by the compiler."""

        def run(tiles):
            tiles = dataclasses.replace(tiles, **fixed)

            def gradients(q, k, v, lse, drop, d_out):
                return planned(tiles, q, k, v).backward(q, k, v, mask, (start, 0), lse, drop, d_out)[some]

            return gradients

        return run

    def make(key):
        return tuple(_normal(key, i, shape, dtype) for i, shape in enumerate((q_shape, k_shape, k_shape)))

    def make_back(key):
        # Any log-sum-exp will do for the time; one above the logits makes weights between 0 and 1.
        lse, drop = (_normal(key, i, (batch, heads, queries), "float32") for i in (3, 4))
        return *make(key), 8 + lse, drop, _normal(key, 5, q_shape, dtype)

    if module is attention_tpu:
        pairs = itertools.product(TPU_BLOCKS, TPU_BLOCKS)
        fitted = [vars(fit(attention_tpu.AttentionTiles(*pair, *pair))) for pair in pairs]
        some = lambda *names: _distinct({name: one[name] for name in names} for one in fitted)
        parts = (
            Part("forward", some("queries", "keys"), forward, make),
            Part("backward", some("queries_back", "keys_back"), backward(slice(None)), make_back),
        )
    else:
        apart = partial(backward, kernels_back=2)
        parts = (
            Part("forward", _product(keys=GPU_STEPS, stages=GPU_STAGES), forward, make),
            Part("dq", _product(keys_back=GPU_STEPS, stages_q=GPU_STAGES), apart(slice(1)), make_back),
            Part("dk, dv", _product(queries_back=GPU_STEPS, stages_k=GPU_STAGES), apart(slice(1, 3)), make_back),
            Part("backward", _product(kernels_back=(1, 2)), backward(slice(None)), make_back),
        )
    return Subject("attention", implementation, dtype.name, sizes, table, parts)


def quant_matmul(
    kind: str | None,
    implementation: str,
    *,
    rows: int,
    outputs: int,
    inputs: int,
    weights: str = "int4_g128",
    activations: str | None = None,
    dtype: str = "bfloat16",
    interpret=False,
) -> Subject:
    """Products with quantised weights.

    Args:
      kind: of the device, as JAX names it.
      implementation: "mosaic_tpu" or "mosaic_gpu"; of few rows with weights in 4 or 8 bits the latter is "mosaic_gpu_few_rows",
        which does those; or "mosaic_gpu_codes".
      weights, activations: formats; activations None: in `dtype`.

    Raises:
      ValueError: an unknown format, or a product that the kernels do not do.
    """
    module = {"mosaic_gpu": product_gpu, product_codes.NAME: product_codes}.get(implementation, product_tpu)
    formats, dtype = (get(weights), None if activations is None else get(activations)), jnp.dtype(dtype)

    def make(key):
        x, w = _normal(key, 0, (rows, inputs), dtype), _normal(key, 1, (inputs, outputs), "float32")
        return x if formats[1] is None else quantise(x, formats[1], -1), quantise(w, formats[0], -2)

    for fmt in formats:
        if fmt is not None and (reason := fmt.misfit(inputs)):
            raise ValueError(f"a product of {rows} tokens with weights [{inputs}, {outputs}]: {reason}")
    a, b = jax.eval_shape(make, jax.random.key(0))
    if reason := module.misfit(a, b, (-1, -2), dtype):
        raise ValueError(f"a quantised product on {PLATFORMS[implementation]} {reason}")
    if module is product_tpu:
        most = lambda options, size: tuple(n for n in options if n < 2 * size) or options[:1]
        candidates = _product(
            rows=most(TPU_ROWS, rows), columns=most(TPU_COLUMNS, outputs), sums=most(TPU_SUMS, inputs)
        )
        sizes = dict(rows=rows, columns=outputs, sums=inputs)
        table = look_up(product_tpu.TABLE, kind, **sizes)
        run = lambda tiles: lambda a, b: product_tpu.product_mosaic_tpu(a, b, dtype, tiles=tiles, interpret=interpret)
    elif module is product_codes:
        candidates = _product(columns=GPU_STEPS, stages=GPU_STAGES[1:], blocks=GPU_CODE_BLOCKS)
        sizes = product_gpu.sizes_of(a, b, (-1, -2))
        table = look_up(product_codes.TABLE, kind, **sizes)
        call = dict(axes=(-1, -2), dtype=dtype, interpret=interpret)
        run = lambda tiles: lambda a, b: product_codes.product_mosaic_gpu_codes(a, b, tiles=tiles, **call)
    else:
        if isinstance(a, Quantised):
            shared = _product(stages=GPU_STAGES[-1:], cluster_rows=(1, 2), cluster_columns=(1, 2), band=GPU_BANDS)
            candidates = tuple(
                dict(zip(("rows", "columns"), tile, strict=True)) | one for tile in GPU_TILES for one in shared
            )
        else:
            candidates = _product(rows=GPU_STEPS, columns=GPU_STEPS, stages=GPU_STAGES[1:])
        sizes = product_gpu.sizes_of(a, b, (-1, -2))
        table = look_up(product_gpu.table_of(a), kind, **sizes)
        call, product = dict(axes=(-1, -2), dtype=dtype, interpret=interpret), product_gpu.product_mosaic_gpu
        if product_gpu.misfit_few_rows(a, b, (-1, -2), dtype) is None:
            implementation, product = "mosaic_gpu_few_rows", product_gpu.product_few_rows
            table = look_up(product_gpu.FEW_ROWS, kind, **sizes)
            candidates = _product(warpgroups=GPU_WARPGROUPS, stages=GPU_STAGES[1:], blocks=GPU_BLOCKS)
        run = lambda tiles: lambda a, b: product(a, b, tiles=tiles, **call)
    name = operands_name(a, b, dtype)
    return Subject("quant_matmul", implementation, name, sizes, table, (Part("forward", candidates, run, make),))


def decode_attention(
    kind: str | None,
    implementation: str,
    *,
    batch: int,
    slots: int,
    queries: int,
    heads: int,
    key_heads: int,
    head_size: int,
    cache: str | None = None,
    dtype: str = "bfloat16",
    interpret=False,
) -> Subject:
    """A few queries a row against full caches.

    Args:
      kind: of the device, as JAX names it.
      implementation: "mosaic_tpu", "mosaic_gpu" or "mosaic_gpu_codes".
      cache: a format; None: in `dtype`.

    Raises:
      ValueError: an unknown format, or a shape that the kernel does not do.
    """
    module = {"mosaic_gpu": decode_gpu, decode_codes.NAME: decode_codes}.get(implementation, decode_tpu)
    _check_heads("decode_attention", heads, key_heads)
    fmt, dtype, scale = None if cache is None else get(cache), jnp.dtype(dtype), head_size**-0.5
    if fmt is not None and (reason := fmt.misfit(head_size)):
        raise ValueError(f"a cache of heads of {head_size}: {reason}")

    def make(key):
        kept = batch, slots, key_heads, head_size
        k, v = (_normal(key, i, kept, dtype) for i in (1, 2))
        if fmt is not None:
            k, v = (quantise(x, fmt, -1) for x in (k, v))
        return _normal(key, 0, (batch, queries, heads, head_size), dtype), k, v, jnp.full((batch,), slots, jnp.int32)

    arrays = jax.eval_shape(make, jax.random.key(0))
    if reason := module.misfit(*arrays, scale=scale):
        raise ValueError(f"decode_attention on {PLATFORMS[implementation]} {reason}")
    call = dict(scale=scale, interpret=interpret)
    if module is decode_tpu:
        sizes = dict(rows=decode_tpu.rows_of(queries, heads), head_size=head_size, slots=slots)
        function, candidates = decode_tpu.decode_mosaic_tpu, _product(keys=TPU_HELD, splits=TPU_SPLITS)
    elif module is decode_codes:
        sizes = decode_codes.sizes_of(*arrays[:2], slots)
        function = decode_codes.decode_mosaic_gpu_codes
        candidates = _product(tokens=GPU_CODE_STEPS, stages=GPU_STAGES[1:], blocks=GPU_CODE_BLOCKS)
    else:
        sizes = decode_gpu.sizes_of(*arrays[:2], slots)
        function = decode_gpu.decode_mosaic_gpu
        candidates = _product(tokens=GPU_STEPS, stages=(*GPU_STAGES, 6), blocks=GPU_BLOCKS)
    table = look_up(module.TABLE, kind, **sizes)
    run = lambda tiles: lambda *arrays: function(*arrays, tiles=tiles, **call)
    parts = (Part("forward", candidates, run, make),)
    return Subject("decode_attention", implementation, decode_tpu.kept_name(arrays[1]), sizes, table, parts)


def _check_heads(op: str, heads: int, key_heads: int) -> None:
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"{op}: {heads} query heads are no multiple of {key_heads} key/value heads")


def _normal(key, i: int, shape, dtype):
    return jax.random.normal(jax.random.fold_in(key, i), shape, dtype)


def _product(**options: tuple[int, ...]) -> tuple[dict[str, int], ...]:
    """Every combination of the options of each field."""
    return tuple(dict(zip(options, values, strict=True)) for values in itertools.product(*options.values()))


def _distinct(found) -> tuple[dict[str, int], ...]:
    return tuple({tuple(sizes.items()): sizes for sizes in found}.values())
