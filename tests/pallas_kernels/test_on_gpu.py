"""The Hopper kernels on a Hopper GPU, with the tiles of their tables: against float64, no worse than 1.5 times plain XLA.

Command:   JAX_PLATFORMS=cuda python -m pytest tests/pallas_kernels/test_on_gpu.py

Elsewhere all of it is skipped, and the interpreter's tests stand for it. Which calls get a kernel without its name follows from
what has passed here: `unwise` of each.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.attention import MaskSpec, attention, attention_gradients, mosaic_gpu
from jaxpar.pallas_kernels.attention.block import dropped
from jaxpar.pallas_kernels.attention.xla import xla_plan
from jaxpar.pallas_kernels.decode import mosaic_gpu as decode_mosaic_gpu
from jaxpar.pallas_kernels.decode import mosaic_gpu_codes as decode_mosaic_gpu_codes
from jaxpar.pallas_kernels.decode.xla import decode_xla
from jaxpar.pallas_kernels.formats import quantise
from jaxpar.pallas_kernels.matmul import mosaic_gpu as products
from jaxpar.pallas_kernels.matmul import mosaic_gpu_codes as codes_in_registers
from jaxpar.pallas_kernels.matmul import product_reference
from jaxpar.pallas_kernels.matmul.products import product
from jaxpar.pallas_kernels.tiles import chip
from tests.pallas_kernels import decode_cases
from tests.pallas_kernels.attention_cases import (
    INPUTS,
    NAMES,
    Case,
    arguments,
    documents,
    errors,
    no_worse,
    program,
    truth,
)

KIND = jax.devices()[0].device_kind
pytestmark = pytest.mark.skipif(
    chip(KIND) != "hopper", reason=f"needs a Hopper GPU, and here is a {KIND} (JAX_PLATFORMS=cuda where there is one)"
)
BF16, FP16 = jnp.bfloat16, jnp.float16
CEILINGS = {BF16: 8e-3, FP16: 1e-3, jnp.float32: 1e-6}
UNITS = {BF16: 2**-8, FP16: 2**-11, jnp.float32: 2**-18}
"""A difference that is rounding, where XLA has less by luck."""


def packed(T, S, window=None, **more):
    segments = dict(q_segments=documents(2, T, 0), k_segments=documents(2, S, 1))
    return MaskSpec(window=None if window is None else jnp.int32(window), **segments, **more)


ATTENTION = {
    "causal, 64": Case((1, 640, 640, 2, 2, 64), MaskSpec(), BF16, scale=0.125),
    "causal, 128": Case((1, 640, 640, 2, 2, 128), MaskSpec(), BF16, scale=0.09),
    "causal, 256": Case((1, 640, 640, 2, 2, 256), MaskSpec(), BF16, scale=0.06),
    "causal, grouped, 64": Case((2, 384, 384, 4, 1, 64), MaskSpec(), BF16),
    "causal, grouped, 128": Case((2, 384, 384, 4, 2, 128), MaskSpec(), BF16),
    "causal, grouped, 256, capped": Case((1, 384, 384, 4, 1, 256), MaskSpec(), BF16, cap=5.0, scale=0.06),
    "causal, float16, 96": Case((1, 300, 300, 2, 2, 96), MaskSpec(), FP16, scale=0.1),
    "window known, 128": Case((1, 700, 700, 2, 1, 128), MaskSpec(window=130), BF16),
    "window, 64": Case((1, 700, 700, 2, 2, 64), MaskSpec(window=jnp.int32(7)), BF16),
    "window, 256": Case((1, 700, 700, 2, 1, 256), MaskSpec(window=jnp.int32(200)), BF16, scale=0.06),
    "documents, 128": Case((2, 450, 450, 2, 2, 128), packed(450, 450), BF16),
    "documents, bidirectional, 64": Case((2, 450, 450, 2, 1, 64), packed(450, 450, causal=False), BF16),
    "all at once, 64, float16": Case((2, 300, 520, 2, 1, 64), packed(300, 520, 150), FP16, starts=(230, 3), cap=4.0),
    "all at once, 80": Case((2, 300, 520, 2, 2, 80), packed(300, 520, 150), BF16, starts=(230, 3), cap=4.0),
    "all at once, 256": Case((2, 300, 520, 2, 1, 256), packed(300, 520, 150), BF16, starts=(230, 3), cap=4.0),
    "full, other lengths, 128": Case((2, 130, 1000, 2, 1, 128), MaskSpec(causal=False), BF16),
    "empty rows, 128": Case((1, 256, 256, 2, 2, 128), MaskSpec(), BF16, starts=(0, 100)),
    "ragged cache, 64": Case(
        (2, 8, 240, 2, 1, 64),
        MaskSpec(
            window=11,
            q_index=np.array([np.arange(3, 11), np.arange(150, 158)], np.int32),
            k_index=np.broadcast_to(np.arange(240, dtype=np.int32), (2, 240)),
        ),
        BF16,
    ),
}
"""Shapes are small, for float64 has all of the weights in memory; several blocks and more steps than stages."""


def check(case, kind, found, theirs, expected) -> None:
    for label, a, b, right in zip(NAMES, found, theirs, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        dtype = jnp.float32 if label == "lse" else case.dtype
        ours, xlas = errors(a, right), errors(b, right)
        print(f"{kind:16} {label:4} {ours[0]:.2e} (XLA {xlas[0]:.2e})")
        no_worse(ours, xlas, UNITS[dtype], (kind, label))
        if kind == "normal":
            assert ours[0] <= CEILINGS[dtype], (label, ours)
            # Nothing passes by being small.
            assert np.sqrt(np.mean(right[np.isfinite(right)] ** 2)) > 0.003, label


@pytest.mark.parametrize("kernels_back", [1, 2])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_against_float64(name, kernels_back):
    """Kernels run before and after XLA: nothing is left in memory for them to find. The same bits but in dq, to which blocks
    of the one kernel add as they come."""
    case = ATTENTION[name]

    def kernels(q, *rest, **more):
        made = mosaic_gpu.plan(q, *rest, **more)
        return replace(made, tiles=replace(made.tiles, kernels_back=kernels_back))

    ours, xla = program(case, kernels), program(case, xla_plan)
    for kind in INPUTS if name in ("causal, 64", "causal, 128", "documents, 128") else ("normal",):
        given = arguments(case, kind)
        found, theirs, again = (run(*given, case.mask, case.starts) for run in (ours, xla, ours))
        for label, a, b in zip(NAMES, found, again, strict=True):
            if label != "dq":
                np.testing.assert_array_equal(a, b)
        check(case, kind, found, theirs, truth(case, given))


@pytest.mark.parametrize("start", [40, 400])
@pytest.mark.parametrize("name", ["all at once, 64, float16", "all at once, 256"])
def test_attention_does_not_read_what_nothing_sees(name, start):
    """NaN in keys ahead of every query, or behind every window."""
    case = replace(ATTENTION[name], starts=(start, 0))
    given = arguments(case)
    first, last = max(start - int(case.mask.window) + 1, 0), start + case.shape[1]
    gone = np.ones(case.shape[2], bool)
    # Blocks that some query sees a key of are read whole.
    gone[first // 128 * 128 : -(-last // 128) * 128] = False
    assert gone.any()
    spoil = lambda x: jnp.where(jnp.asarray(gone)[None, :, None, None], jnp.nan, x).astype(x.dtype)
    q, k, v, *rest = given
    found = program(case, mosaic_gpu.plan)(q, spoil(k), spoil(v), *rest, case.mask, case.starts)
    for label, a, right in zip(NAMES, found, truth(case, given), strict=True):
        assert errors(a, right)[0] < CEILINGS[jnp.float32 if label == "lse" else case.dtype], label


@pytest.mark.parametrize("size", [64, 128, 256])
def test_gradients_of_parts_of_the_keys_add_up_in_float32(size):
    case = Case((1, 256, 512, 2, 1, size), MaskSpec(), BF16, starts=(256, 0), scale=0.1)
    q, k, v, d_out, d_lse = arguments(case)
    call = dict(mask=case.mask, scale=case.scale)

    @jax.jit
    def parts(q, k, v, d_out, d_lse):
        out, lse = attention(q, k, v, **call, q_start=256, lse_out=True, implementation="xla")
        drop, found = dropped(out, d_out, d_lse), []
        for at in (slice(0, 256), slice(256, 512)):
            part = q, k[:, at], v[:, at], d_out, lse, drop
            found.append(attention_gradients(*part, **call, q_start=256, k_start=at.start, implementation="mosaic_gpu"))
        return found

    (dq, *first), (more, *second) = parts(q, k, v, d_out, d_lse)
    sums = dq + more, *(jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    for label, found, right in zip(NAMES[2:], sums, truth(case, (q, k, v, d_out, d_lse))[2:], strict=True):
        assert found.dtype == jnp.float32
        assert errors(found, right)[0] < 6e-3, label


def test_attention_under_vmap_and_in_a_scan():
    """As a model calls it, layer by layer."""
    case = ATTENTION["causal, 128"]
    q, k, v, *_ = arguments(case)
    call = lambda name: lambda x: attention(x, k, v, mask=case.mask, scale=case.scale, implementation=name)

    def layers(name):
        def run(q):
            body = lambda x, _: (call(name)(x), None)
            return jnp.sum(jax.lax.scan(body, q, None, length=3)[0].astype(jnp.float32) ** 2)

        return jax.jit(jax.vmap(jax.grad(run)))(jnp.stack([q, 2 * q]))

    assert errors(layers("mosaic_gpu"), np.asarray(layers("xla"), np.float64))[0] < 0.02


DecodeCase = decode_cases.Case
DECODE = {
    "64": DecodeCase((3, 1, 2048, 8, 2, 64), None, (2048, 1, 0), BF16),
    "128, float16": DecodeCase((2, 1, 3000, 8, 2, 128), None, (3000, 1777), FP16, scale=0.1),
    "256": DecodeCase((2, 1, 1024, 4, 1, 256), None, (1000, 513), BF16, scale=0.06),
    "several queries, window, cap": DecodeCase((2, 5, 800, 4, 2, 128), None, (800, 61), FP16, window=90, cap=3.0),
    "window known, 256": DecodeCase((2, 2, 800, 4, 1, 256), None, (800, 161), BF16, window=300, known=True, scale=0.06),
    "pages of 16": DecodeCase((2, 2, 512, 4, 2, 64), None, (450, 95), BF16, page=16, window=170),
    "pages of 128": DecodeCase((2, 1, 1024, 8, 8, 128), None, (1024, 700), BF16, page=128, scale=0.1),
    "pages of 8, 256": DecodeCase((2, 1, 256, 4, 1, 256), None, (250, 95), FP16, page=8, scale=0.06),
    "int8": DecodeCase((2, 1, 1024, 8, 8, 128), None, (1000, 333), BF16, "int8_row", scale=0.1),
    "int8, three heads, 64": DecodeCase((2, 3, 712, 6, 3, 64), None, (690, 64), BF16, "int8_row"),
    "int8, 256": DecodeCase((2, 1, 712, 4, 1, 256), None, (690, 64), BF16, "int8_row", scale=0.06),
    "int8 pages": DecodeCase((1, 2, 512, 8, 8, 64), None, (510,), BF16, "int8_row", 32, window=150),
    "int8 blocks": DecodeCase((2, 1, 712, 4, 2, 128), None, (690, 64), BF16, "int8_g32", scale=0.1),
    "int4": DecodeCase((2, 1, 1024, 8, 8, 128), None, (1000, 333), BF16, "int4_row", scale=0.1),
    "int4, 256": DecodeCase((2, 1, 600, 4, 1, 256), None, (600, 333), BF16, "int4_row", scale=0.06),
    "int4 blocks": DecodeCase((2, 1, 712, 4, 2, 128), None, (690, 64), BF16, "int4_g32", scale=0.1),
    "int4 pages": DecodeCase((2, 1, 1024, 4, 2, 128), None, (1000, 130), BF16, "int4_row", page=128, scale=0.1),
}
IN_REGISTERS = {name: case for name, case in DECODE.items() if case.form is not None} | {
    "int4, 64": DecodeCase((2, 1, 1024, 4, 1, 64), None, (1000, 333), BF16, "int4_row", scale=0.1),
    "int4, four heads": DecodeCase((2, 2, 712, 8, 4, 128), None, (690, 64), BF16, "int4_row", scale=0.1, window=500),
    "int8, four heads, 256": DecodeCase((2, 1, 712, 8, 4, 256), None, (690, 64), BF16, "int8_row", scale=0.06),
    "int4 blocks, four heads": DecodeCase((2, 1, 3000, 16, 4, 128), None, (3000, 2111), BF16, "int4_g32", scale=0.1),
}
DECODE_CEILINGS = {BF16: 5e-3, FP16: 6e-4, jnp.float32: 1e-6}


@pytest.mark.parametrize(
    ("case", "kernel"),
    [pytest.param(case, decode_mosaic_gpu.decode_mosaic_gpu, id=name) for name, case in DECODE.items()]
    + [
        pytest.param(case, decode_mosaic_gpu_codes.decode_mosaic_gpu_codes, id=f"{name}, in registers")
        for name, case in IN_REGISTERS.items()
    ],
)
def test_decoding_against_float64(case, kernel):
    """With NaN in every slot that no row holds, and the same bits without."""
    ours, xla = (decode_cases.call(case, run) for run in (kernel, decode_xla))
    given = decode_cases.arguments(case)
    spoilt = decode_cases.poisoned(case, given)
    found, theirs, clean = ours(*spoilt), xla(*spoilt), ours(*given)
    exact = decode_cases.truth(replace(case, dtype=jnp.float32), given)
    for label, a, b, c, right in zip(("out", "lse"), found, theirs, clean, exact, strict=True):
        np.testing.assert_array_equal(a, c)
        dtype = jnp.float32 if label == "lse" else case.dtype
        mine, xlas = errors(a, right), errors(b, right)
        print(f"{label:4} {mine[0]:.2e} (XLA {xlas[0]:.2e})")
        no_worse(mine, xlas, UNITS[dtype], label)
        rounded = case.form is not None and "_g" in case.form and label == "lse"
        assert mine[0] <= (1e-3 if rounded else DECODE_CEILINGS[dtype]), (label, mine)


PRODUCTS = {
    "W8A8": ("int8_row", "int8_row"),
    "fp8": ("fp8_e4m3_row", "fp8_e4m3_row"),
    "W4A16": (None, "int4_g128"),
    "W4A16, a scale a column": (None, "int4_row"),
    "W8A16": (None, "int8_row"),
}


@pytest.mark.parametrize(
    ("name", "rows", "inputs_size", "kernel"),
    [(name, rows, 1024, products.product_mosaic_gpu) for name in PRODUCTS for rows in (1, 16, 40, 260)]
    + [
        (name, rows, size, codes_in_registers.product_mosaic_gpu_codes)
        for name in PRODUCTS
        if PRODUCTS[name][0] is None
        for rows, size in ((1, 1024), (5, 640), (8, 14336), (11, 2176), (16, 4096))
    ],
)
def test_products_against_float64(name, rows, inputs_size, kernel):
    rng = np.random.default_rng(0)
    inputs, weights = PRODUCTS[name]
    x = jnp.asarray(rng.standard_normal((rows, inputs_size)) * np.exp(rng.standard_normal((rows, 1))), BF16)
    w = jnp.asarray(rng.standard_normal((inputs_size, 512)) * np.exp(rng.standard_normal((1, 512))), jnp.float32)
    a, b = x if inputs is None else quantise(x, inputs), quantise(w, weights, 0)
    dtype = BF16 if inputs is None else jnp.float32
    found = jax.jit(lambda a, b: kernel(a, b, (-1, -2), dtype))(a, b)
    theirs = jax.jit(lambda a, b: product(a, b, (-1, -2), dtype).astype(dtype))(a, b)
    right = product_reference(a, b, (-1, -2))
    mine, xlas = errors(found, right), errors(theirs, right)
    print(f"{mine[0]:.2e} (XLA {xlas[0]:.2e})")
    if name == "W8A8":
        np.testing.assert_array_equal(np.asarray(found), np.asarray(theirs))
    # The matrix unit's own sums of float8 have fewer bits than float32.
    no_worse(mine, xlas, 2.0**-9 if dtype == BF16 else 2.0**-12 if name == "fp8" else 1e-6, name)


@pytest.mark.parametrize("size", [640, 4096, 14336])
@pytest.mark.parametrize("dtype", [BF16, FP16, jnp.float32])
def test_rows_in_int8_are_the_bits_of_xla(size, dtype):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((301, size)) * np.exp(rng.standard_normal((301, 1)))
    x[1], x[2, size // 2], x[3, 1] = 0, np.nan, np.inf
    x[4] = np.clip((np.arange(size) - size // 2) / 2, -127, 127)
    ours, xla = (
        jax.jit(lambda x, name=name: quantise(x, "int8_row", implementation=name))(jnp.asarray(x, dtype))
        for name in ("mosaic_gpu", "xla")
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(xla), strict=True):
        np.testing.assert_array_equal(a, b)


def test_one_kernel_backwards_is_what_this_jax_gets():
    """Not two, of which the results are the same bits on every run."""
    case = ATTENTION["causal, 64"]
    text = str(jax.make_jaxpr(program(case, mosaic_gpu.plan))(*arguments(case), case.mask, case.starts))
    assert ("attention_backward_dk_dv" in text) == (gpu.MAY_ADD and not gpu.same_bits())
