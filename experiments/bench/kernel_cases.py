"""What `bench/kernels.py` measures: ops at shapes of real models, with every implementation and rival of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.experiments.bench import kernel_rivals as rivals

OURS = ("mosaic_gpu", "mosaic_gpu_codes", "mosaic_gpu_few_rows", "mosaic_tpu")
"""Implementations that are kernels of this project; all others are alternatives to them."""


@dataclass(frozen=True)
class Case:
    """An op at a shape.

    Attributes:
      kind: the dtype whose matmul ceiling bounds it.
      make: `(key) -> arrays`, the arguments of every contender.
      flops, bytes: that the op needs at least: each operand read and each result written once.
      contenders: functions of the arrays, rivals with a clock of their own, or why there is none.
      exact: `(arrays, float dtype) -> outputs`, of a part of the op that is small enough.
      cut: the same part of a contender's outputs.
      place: `(arrays) -> arrays`, how they lie in memory for all contenders.
    """

    op: str
    name: str
    model: str
    kind: str
    make: Callable[[jax.Array], tuple]
    flops: float
    bytes: float
    contenders: dict[str, Callable | rivals.Torch | str]
    exact: Callable[[tuple, Any], Any]
    cut: Callable[[Any], Any] = field(default=lambda outputs: outputs)
    place: Callable[[tuple], tuple] = field(default=lambda arrays: arrays)


def size_of(tree) -> int:
    """Bytes of arrays or shapes."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def cases(scale: str) -> Iterator[Case]:
    """All of a scale: "chip", "cpu" or "quick"."""
    dtype = "bfloat16" if scale == "chip" else "float32"
    for model, name, shape in attention_shapes(scale):
        for back in (False, True):
            yield attention(model, name, dtype, back, rival=scale != "quick", **shape)
    for model, rows, inputs, outputs in product_shapes(scale):
        for weights, activations in (("int8_row", "int8_row"), ("int4_g128", None), ("mxfp8", "mxfp8")):
            yield product(model, rows, inputs, outputs, weights, activations, dtype)
    for model, rows, inputs in dict.fromkeys(shape[:3] for shape in product_shapes(scale)):
        yield quantising(model, rows, inputs, dtype)
    for model, shape in decode_shapes(scale):
        for held in (None, "int8_row", "int4_row"):
            yield decode(model, held, dtype, **shape)
    for model, tokens, width, hidden, heads, size, vocabulary in layer_shapes(scale):
        yield norm(model, tokens, width, dtype)
        yield rotary(model, tokens, heads, size, dtype)
        yield gate(model, tokens, hidden, dtype)
        yield loss(model, tokens, width, vocabulary, dtype)


def attention_shapes(scale: str):
    """(model, name, sizes) of each."""
    sizes = lambda B, T, H, G, K, window=None, causal=True: dict(
        batch=B, tokens=T, heads=H, groups=G, size=K, window=window, causal=causal
    )
    if scale == "quick":
        yield "tiny", "causal", sizes(1, 128, 2, 1, 32)
        return
    if scale == "cpu":
        yield "Gemma 3 270M", "causal", sizes(1, 512, 4, 1, 256)
        yield "Llama 3 8B, 8 heads", "causal", sizes(1, 512, 8, 2, 128)
        return
    yield "Llama 3 8B", "causal", sizes(1, 8192, 32, 8, 128)
    yield "Gemma 3 270M", "causal", sizes(4, 4096, 4, 1, 256)
    yield "Gemma 3 270M", "window 512", sizes(4, 4096, 4, 1, 256, window=512)
    for size in (64, 128, 256):
        for tokens in (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (True, False):
                heads = 2048 // size
                shape = sizes(16384 // tokens, tokens, heads, heads, size, causal=causal)
                yield "FlashAttention-3's", "causal" if causal else "full", shape


def product_shapes(scale: str):
    """(model, rows, inputs, outputs)"""
    if scale == "quick":
        return [("tiny", 16, 256, 128)]
    if scale == "cpu":
        return [("Gemma 3 270M", rows, 640, 2048) for rows in (16, 512)]
    widths = (("Llama 3 8B, up", 4096, 14336), ("Llama 3 8B, down", 14336, 4096), ("Gemma 3 270M, up", 640, 2048))
    return [(model, rows, *width) for model, *width in widths for rows in (1, 16, 4096)]


def decode_shapes(scale: str):
    if scale == "quick":
        return [("tiny", dict(batch=2, slots=256, heads=4, groups=2, size=32))]
    if scale == "cpu":
        return [("Gemma 3 270M", dict(batch=4, slots=2048, heads=4, groups=1, size=256))]
    return [
        ("Llama 3 8B", dict(batch=8, slots=32768, heads=32, groups=8, size=128)),
        ("Llama 3 8B", dict(batch=64, slots=4096, heads=32, groups=8, size=128)),
        ("Gemma 3 270M", dict(batch=64, slots=8192, heads=4, groups=1, size=256)),
    ]


def layer_shapes(scale: str):
    """(model, tokens, width, hidden, heads, head size, vocabulary)"""
    if scale == "quick":
        return [("tiny", 256, 128, 256, 4, 32, 512)]
    if scale == "cpu":
        return [("Gemma 3 270M, vocabulary 16k", 1024, 640, 2048, 4, 256, 16384)]
    return [
        ("Llama 3 8B", 8192, 4096, 14336, 32, 128, 128256),
        ("Gemma 3 270M", 16384, 640, 2048, 4, 256, 262144),
    ]


def normals(key, *shapes, dtype) -> tuple:
    return tuple(jax.random.normal(jax.random.fold_in(key, i), shape, dtype) for i, shape in enumerate(shapes))


def attention(
    model, name, dtype, back, *, batch, tokens, heads, groups, size, window, causal, rival=True, named=None
) -> Case:
    """q, k, v and for the backward pass d_out; out, and dq, dk, dv."""
    from jaxpar.pallas_kernels.attention import IMPLEMENTATIONS, MaskSpec
    from jaxpar.pallas_kernels.attention import attention as attend

    q, k = (batch, tokens, heads, size), (batch, tokens, groups, size)
    scale, share = size**-0.5, heads // groups
    mask = MaskSpec(causal=causal, window=window)
    ours = lambda name: lambda q, k, v: attend(q, k, v, mask=mask, scale=scale, implementation=name)
    made = {name: ours(name) for name in named or IMPLEMENTATIONS}
    if rival:
        made |= rivals.attention(heads=heads, tokens=tokens, scale=scale, causal=causal, window=window)

    def both(call):
        def run(q, k, v, d_out):
            out, pull = jax.vjp(call, q, k, v)
            return out, *pull(d_out)

        return run

    contenders = {}
    for one, call in made.items():
        contenders[one] = both(call) if back and callable(call) else call
    if rival:
        contenders["torch SDPA"] = rivals.torch_attention(dtype, scale=scale, causal=causal, window=window, back=back)

    def part(outputs):
        """The first row's first key/value head, and the query heads that share it."""
        if not back:
            return outputs[:1, :, :share]
        return tuple(x[:1, :, :n] for x, n in zip(outputs, (share, share, 1, 1), strict=True))

    def exact(arrays, precise):
        cut = [x[:1, :, : min(x.shape[2], share)] if i in (0, 3) else x[:1, :, :1] for i, x in enumerate(arrays)]
        run = both(ours("xla")) if back else ours("xla")
        return jax.jit(run)(*(jnp.asarray(np.asarray(x, np.float64), precise) for x in cut))

    pairs = tokens * tokens / (2 if causal else 1)
    if window is not None:
        pairs = min(pairs, tokens * window)
    forward = 4 * batch * heads * size * pairs
    width = jnp.dtype(dtype).itemsize
    moved = width * batch * tokens * size * (2 * heads + 2 * groups) * (2 if back else 1)
    shape = f"{batch} x {tokens}, {heads}/{groups} heads of {size}"
    return Case(
        "attention, forward and backward" if back else "attention",
        f"{name}, {shape}",
        model,
        dtype,
        lambda key: normals(key, *((q, k, k, q) if back else (q, k, k)), dtype=dtype),
        # The backward pass makes the logits again: five products beside two (FlashAttention-3, section 4).
        forward * (3.5 if back else 1),
        moved,
        contenders,
        exact,
        part,
    )


def product(model, rows, inputs, outputs, weights, activations, dtype) -> Case:
    """x, w in a format, and w's values in `dtype` for the plain product. x is quantised within the call where it is at all.
    Weights in 8 bits that meet such an x lie along K in memory, as serving would lay them once."""
    from jaxpar.pallas_kernels.formats.format import get
    from jaxpar.pallas_kernels.formats.quantised import dequantise, laid_along, quantise
    from jaxpar.pallas_kernels.matmul import IMPLEMENTATIONS, Operands, mosaic_gpu, quant_matmul

    how = Operands(inputs=get(activations) if activations else None)

    def make(key):
        x, w = normals(key, (rows, inputs), (inputs, outputs), dtype="float32")
        q = quantise(w, weights, 0)
        return x.astype(dtype), q, dequantise(q, jnp.dtype(dtype))

    ours = lambda name: lambda x, w, plain: quant_matmul(x, w, how, implementation=name)
    contenders = {name: ours(name) for name in IMPLEMENTATIONS}
    contenders[f"{dtype} dot"] = lambda x, w, plain: jnp.dot(x, plain)
    few = min(rows, 64)

    def exact(arrays, precise):
        x, w, _ = arrays
        x = quantise(x[:few], how.inputs, -1) if activations else x[:few]
        x, w = (np.asarray(dequantise(a) if hasattr(a, "codes") else a, np.float64) for a in (x, w))
        return jnp.dot(jnp.asarray(x, precise), jnp.asarray(w, precise))

    x, w, _ = jax.eval_shape(make, jax.random.key(0))
    if how.inputs is None and mosaic_gpu.misfit_few_rows(x, w, (-1, -2), x.dtype) is None:
        contenders["mosaic_gpu"] = 'is the same as "mosaic_gpu_few_rows" here'
    return Case(
        "quantised product",
        f"{weights} x {activations or dtype}, {rows} x {inputs} x {outputs}",
        model,
        "int8" if activations == "int8_row" else dtype,
        make,
        2.0 * rows * inputs * outputs,
        size_of((x, w)) + rows * outputs * x.dtype.itemsize,
        contenders,
        exact,
        lambda y: y[:few],
        (lambda arrays: (arrays[0], laid_along(arrays[1]), arrays[2]))
        if activations == "int8_row"
        else lambda arrays: arrays,
    )


def quantising(model, rows, inputs, dtype) -> Case:
    """x to int8 with a scale a row, as a product with such weights does before. The error is that of rounding."""
    from jaxpar.pallas_kernels.formats import QUANTISE, dequantise, quantise

    few = min(rows, 64)
    return Case(
        "quantising",
        f"int8_row, {rows} x {inputs}",
        model,
        dtype,
        lambda key: normals(key, (rows, inputs), dtype=dtype),
        # Magnitude, quotient and rounding of each.
        3.0 * rows * inputs,
        rows * (inputs * (jnp.dtype(dtype).itemsize + 1) + 4),
        {name: lambda x, name=name: quantise(x, "int8_row", implementation=name) for name in QUANTISE.names},
        lambda arrays, precise: jnp.asarray(np.asarray(arrays[0][:few], np.float64), precise),
        lambda q: dequantise(jax.tree.map(lambda part: part[:few], q)),
    )


def decode(model, held, dtype, *, batch, slots, heads, groups, size) -> Case:
    """One query a row against a full cache, as it is or quantised along K."""
    from jaxpar.pallas_kernels.decode import DECODE_ATTENTION, decode_attention
    from jaxpar.pallas_kernels.formats.quantised import quantise

    def make(key):
        kept = batch, slots, groups, size
        q, k, v = normals(key, (batch, 1, heads, size), kept, kept, dtype=dtype)
        if held:
            k, v = (quantise(x, held, -1) for x in (k, v))
        return q, k, v, jnp.full((batch,), slots, jnp.int32)

    ours = lambda name: lambda q, k, v, lens: decode_attention(q, k, v, lens, scale=size**-0.5, implementation=name)

    def exact(arrays, precise):
        q, k, v, lens = jax.tree.map(lambda x: x[:1], arrays)
        return jax.jit(ours("xla"))(jnp.asarray(np.asarray(q, np.float64), precise), k, v, lens)

    shapes = jax.eval_shape(make, jax.random.key(0))
    others = {} if held else rivals.decode(dtype, scale=size**-0.5)
    return Case(
        "decode attention",
        f"{held or dtype} cache, {batch} x {slots}, {heads}/{groups} heads of {size}",
        model,
        dtype,
        make,
        4.0 * batch * slots * heads * size,
        size_of(shapes),
        {name: ours(name) for name in DECODE_ATTENTION.names} | others,
        exact,
        lambda out: out[:1],
    )


def _lifted(function: Callable) -> Callable[[tuple, Any], Any]:
    """The function of the same values in a wider dtype."""

    def exact(arrays, precise):
        lift = lambda x: jnp.asarray(np.asarray(x, np.float64), precise) if jnp.issubdtype(x.dtype, jnp.floating) else x
        return jax.jit(function)(*(lift(jnp.asarray(np.asarray(x))) for x in arrays))

    return exact


def norm(model, tokens, width, dtype) -> Case:
    from jaxpar.models.norms import RMSNorm

    run = lambda x, scale: RMSNorm()({"scale": scale}, x)
    make = lambda key: normals(key, (tokens, width), (width,), dtype=dtype)
    x, scale = jax.eval_shape(make, jax.random.key(0))
    moved = 2 * size_of(x) + size_of(scale)

    def exact(arrays, precise):
        x, scale = (np.asarray(one, np.float64) for one in arrays)
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + RMSNorm().epsilon) * scale

    return Case("RMSNorm", f"{tokens} x {width}", model, dtype, make, 4.0 * tokens * width, moved, {"xla": run}, exact)


def rotary(model, tokens, heads, size, dtype) -> Case:
    """Cosines and sines are made once for all layers, and read here."""
    from jaxpar.models.positions import rotate, turns

    def make(key):
        angles = jnp.arange(tokens, dtype=jnp.float32)[:, None] * 1e4 ** (-jnp.arange(0, size, 2) / size)[None]
        return *normals(key, (1, tokens, heads, size), dtype=dtype), *turns(angles[None])

    def exact(arrays, precise):
        x, cos, sin = (np.asarray(one, np.float64) for one in arrays)
        first, second = np.split(x, 2, -1)
        cos, sin = cos[:, :, None, : size // 2], sin[:, :, None, size // 2 :]
        return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)

    x, *turned = jax.eval_shape(make, jax.random.key(0))
    moved = 2 * size_of(x) + size_of(turned)
    name = f"{tokens} tokens, {heads} heads of {size}"
    return Case("rotary embedding", name, model, dtype, make, 3.0 * x.size, moved, {"xla": rotate}, exact)


def gate(model, tokens, hidden, dtype) -> Case:
    """What SwiGLU does between its products."""
    run = lambda gate, up: jax.nn.silu(gate) * up
    make = lambda key: normals(key, (tokens, hidden), (tokens, hidden), dtype=dtype)

    def exact(arrays, precise):
        gate, up = (np.asarray(one, np.float64) for one in arrays)
        return gate / (1 + np.exp(-gate)) * up

    moved = 3 * tokens * hidden * jnp.dtype(dtype).itemsize
    return Case("SwiGLU", f"{tokens} x {hidden}", model, dtype, make, 5.0 * tokens * hidden, moved, {"xla": run}, exact)


def loss(model, tokens, width, vocabulary, dtype) -> Case:
    """Cross-entropy with its gradients by x and by the output projection, in chunks of tokens."""
    from jaxpar.models.loss import cross_entropy

    def run(x, unembed, targets):
        weights = jnp.ones(targets.shape, jnp.float32)
        mean = lambda x, unembed: cross_entropy(x, unembed, targets, weights, chunk=512)[0] / tokens
        total, (dx, dw) = jax.value_and_grad(mean, (0, 1))(x, unembed)
        return total, dx, dw

    def make(key):
        x, w = normals(key, (1, tokens, width), (vocabulary, width), dtype=dtype)
        return (
            x,
            (w.astype(jnp.float32) * width**-0.5).astype(dtype),
            jax.random.randint(key, (1, tokens), 0, vocabulary),
        )

    x, w, _ = jax.eval_shape(make, jax.random.key(0))
    few = min(tokens, 256)

    def exact(arrays, precise):
        """The gradient of the first tokens, by JAX's own differentiation of the plain formula."""
        x, w, targets = arrays
        lift = lambda a: jnp.asarray(np.asarray(a, np.float64), precise)
        x, w, ids = lift(x[0, :few]), lift(w), jnp.asarray(np.asarray(targets)[0, :few])

        def total(x):
            logits = x @ w.T
            return jnp.sum(jax.nn.logsumexp(logits, -1) - logits[jnp.arange(few), ids]) / tokens

        return jax.jit(jax.grad(total))(x)

    return Case(
        "cross-entropy, with gradients",
        f"{tokens} x {width}, vocabulary {vocabulary}",
        model,
        dtype,
        make,
        6.0 * tokens * width * vocabulary,
        2 * size_of((x, w)),
        {"xla": run},
        exact,
        lambda outputs: outputs[1][0, :few],
    )
