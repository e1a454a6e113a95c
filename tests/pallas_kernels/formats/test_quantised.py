"""Quantised arrays against NumPy and ml_dtypes, code for code and scale for scale."""

import itertools
from functools import partial

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.pallas_kernels import formats
from jaxpar.pallas_kernels.formats.packing import unpack
from jaxpar.pallas_kernels.formats.scales import E4M3, E8M0

TINY = 2.0**-126
FLOATS = {
    "e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2, "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn, "e2m1": ml_dtypes.float4_e2m1fn,
}  # fmt: skip
BLOCKED = ["mxint8", "mxint6", "mxint4", "mxfp8", "mxfp8_e5m2", "mxfp6", "mxfp6_e3m2", "mxfp4", "nvint4", "nvfp4"]
PLAIN = ["int8_row", "int4_g32", "fp8_e4m3_tensor", "fp8_e5m2_row", "fp6_e2m3_g16"]
RULES = ["mxfp4-floor", "mxfp8-round", "mxfp8-ocp", "mxint8-asymmetric-ocp"]


def tensors() -> np.ndarray:
    """float32 [tensors, 4, 64]: many kinds of data, each a tensor."""
    draw = np.random.default_rng(0)
    shape = (4, 64)
    normal = draw.standard_normal(shape)
    outlier = normal * np.where(np.arange(64) == 37, 200.0, 1.0)
    one_hot = np.where(np.arange(64) == np.array([[0], [15], [32], [63]]), -3.7, 0.0)
    powers = np.sign(normal) * 2.0 ** draw.integers(-8, 8, shape)
    largest = normal * float(np.finfo(np.float32).max) / np.abs(normal).max()
    # The scale is a power of two exactly: where "ceil" and "floor" meet.
    largest_of_formats = np.array([[24.0], [448 / 4], [7.5 * 8], [127 / 128]]) * np.where(np.arange(64) % 3, 0.3, -1.0)
    # bfloat16's subnormals, beside numbers that are not.
    small = np.where(normal > 0, 2.0**-130, 1.0) * 2.0**-120 * normal
    some_zero = normal * (np.arange(64) >= 32)
    return np.stack(
        [
            normal, draw.laplace(size=shape), draw.standard_t(3, size=shape), 2.0 ** draw.uniform(-60, 60, shape) * np.sign(normal),
            outlier, one_hot, powers, largest, small, some_zero, np.zeros(shape), -np.abs(normal), np.full(shape, 7.0), largest_of_formats,
        ]
    ).astype(np.float32)  # fmt: skip


def power_of(rule: str, amax: np.ndarray, largest: float) -> np.ndarray:
    """The scale's exponent, by comparing with every power of two in float64. amax > 0."""
    k = np.arange(-160, 160)
    bounds, a = largest * 2.0**k, amax[..., None].astype(np.float64)
    if rule == "ceil":
        found = np.where(bounds >= a, k, 999).min(-1)
    elif rule == "floor":
        found = np.where(bounds <= a, k, -999).max(-1)
    elif rule == "round":
        found = np.where(bounds * 2**-0.5 <= a, k, -999).max(-1)
    else:
        found = np.where(2.0**k <= a, k, -999).max(-1) - np.where(2.0**k <= largest, k, -999).max()
    return np.clip(found, -127, 127)


def oracle(x: np.ndarray, name: str):
    """`(codes, scales, values)` of one tensor along its last dimension, in NumPy: uint8, as stored, float64."""
    fmt = formats.get(name)
    x = np.where(np.abs(x) < TINY, np.copysign(0, x), x).astype(np.float32)
    size = {"row": x.shape[-1], "tensor": x.size}.get(fmt.block, fmt.block)
    blocks = x.reshape(-1, size)
    amax = np.abs(blocks).max(1)
    integer = hasattr(fmt.element, "symmetric")
    if integer:
        unit = 2.0**-fmt.element.fraction
        high = (2 ** (fmt.element.bits - 1) - 1) * unit
        low = -high - (0 if fmt.element.symmetric else unit)
    else:
        high = float(ml_dtypes.finfo(FLOATS[fmt.element.name]).max)
        low = -high
    one_over = np.float32(1) / np.float32(high)
    if isinstance(fmt.scale, E8M0):
        k = np.where(amax > 0, power_of(fmt.scale.rule, np.maximum(amax, np.float32(TINY)), high), -127)
        stored, scale = (k + 127).astype(np.uint8), 2.0**k
        y = blocks.astype(np.float64) / scale[:, None]
    elif isinstance(fmt.scale, E4M3):
        t = max(np.float32(amax.max() * one_over) * (np.float32(1) / np.float32(448)), np.float32(2.0**-117))
        stored = ((amax * one_over) / t).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
        stored = np.where((stored == 0) & (amax > 0), 1, stored).astype(np.uint8)
        scale = stored.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * t
        y = blocks / np.where(scale == 0, np.float32(1), scale)[:, None]
    else:
        stored = scale = np.maximum(amax * one_over, np.float32(TINY))
        y = blocks / scale[:, None]
    y = np.clip(y, low, high)
    if integer:
        whole = np.rint(y / unit)
        codes, values = whole.astype(np.int8).view(np.uint8) & (2**fmt.element.bits - 1), whole * unit
    else:
        number = y.astype(FLOATS[fmt.element.name])
        codes, values = number.view(np.uint8), number.astype(np.float64)
    return codes.reshape(x.shape), stored, (values * scale.astype(np.float64)[:, None]).reshape(x.shape)


def unpacked(q: formats.Quantised) -> np.ndarray:
    return np.asarray(unpack(q.codes, q.format.stored_bits, q.axis))


def same_values(ours, expected) -> None:
    """But that float32's subnormals may be flushed. The largest inputs may round past its range, to infinity."""
    ours = np.asarray(ours, np.float64)
    with np.errstate(over="ignore"):
        expected = expected.astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(
        np.where(np.abs(ours) < TINY, 0, ours), np.where(np.abs(expected) < TINY, 0, expected)
    )


@pytest.mark.parametrize("name", [*BLOCKED, *PLAIN, *RULES])
def test_codes_scales_and_values_are_the_oracles(name):
    x = tensors()
    q = formats.quantise(x, name, -1, stacked=1)
    assert q.shape == x.shape
    codes, values = unpacked(q), formats.dequantise(q)
    for i, each in enumerate(x):
        if name.startswith(("nv", "int4", "int8", "fp")) and np.abs(each).max() < 1e-30 and each.any():
            continue  # scales in float32 would be below its range: tested for what they do, further down
        expected, scales, numbers = oracle(each, name)
        np.testing.assert_array_equal(codes[i], expected, err_msg=f"tensor {i}")
        np.testing.assert_array_equal(np.asarray(q.scales[i]).ravel(), scales, err_msg=f"tensor {i}")
        same_values(values[i], numbers)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mxfp6", "nvfp4", "int8_row"])
def test_any_dimension_is_the_last_one_turned(name):
    x = tensors()[:5].transpose(2, 0, 1)[:, :4]
    expected = formats.quantise(np.moveaxis(x, 0, -1), name)
    for axis in (0, -3):
        q = formats.quantise(x, name, axis)
        assert q.axis == -3
        assert q.shape == x.shape
        np.testing.assert_array_equal(np.moveaxis(np.asarray(q.codes), 0, -1), expected.codes)
        np.testing.assert_array_equal(np.moveaxis(np.asarray(q.scales), 0, -1), expected.scales)
        np.testing.assert_array_equal(
            np.moveaxis(np.asarray(formats.dequantise(q)), 0, -1), formats.dequantise(expected)
        )


@pytest.mark.quick
def test_a_block_is_those_neighbours_and_no_others():
    """Value 31 of 64 raised: the scale of the first block follows, the second is as it was; along the other dimension none."""
    x = np.asarray(tensors()[0])
    raised = x.copy()
    raised[1, 31] = 100
    before, after = (formats.quantise(v, "mxint8") for v in (x, raised))
    moved = np.asarray(before.scales != after.scales)
    assert moved.sum() == 1
    assert moved[1, 0]
    changed = np.argwhere(np.asarray(before.codes != after.codes))
    assert {tuple(c) for c in changed // [1, 32]} == {(1, 0)}
    assert len(changed) > 25


@pytest.mark.quick
@pytest.mark.parametrize("name", ["nvfp4", "mxfp6"])
def test_compiled_sliced_stacked_and_sharded_are_the_same_bits(name, devices):
    x = jnp.asarray(tensors()[:8])
    q = formats.quantise(x, name, 1 - 2, stacked=1)
    alone = [formats.quantise(x[i], name) for i in range(8)]
    mapped = jax.vmap(lambda a: formats.quantise(a, name))(x)
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *alone)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("a", None, "b")))
    sharded = jax.jit(lambda a: formats.quantise(jnp.negative(jnp.negative(a)), name, stacked=1))(spread)
    for other in (mapped, stacked, sharded):
        assert jax.tree.structure(other) == jax.tree.structure(q)
        jax.tree.map(np.testing.assert_array_equal, other, q)
        assert other.shape == x.shape
    _, rows = jax.lax.scan(lambda carry, w: (carry, formats.dequantise(w)), 0, q)
    np.testing.assert_array_equal(rows, formats.dequantise(q))
    assert jax.tree.map(lambda a: a[3], q).shape == x.shape[1:]


@pytest.mark.quick
def test_bits_and_bytes():
    x = np.asarray(tensors()[0])
    bits = {
        "mxint8": 8.25,
        "mxint6": 6.25,
        "mxfp6_e3m2": 6.25,
        "mxfp4": 4.25,
        "nvint4": 4.5,
        "int4_g32": 5.0,
        "int8_row": 8.5,
    }
    for name, expected in bits.items():
        q, fmt = formats.quantise(x, name), formats.get(name)
        extra = 0 if q.tensor is None else 32 / x.size
        assert q.bits_per_value == fmt.bits_per_value(64) + extra == expected + extra
        assert q.nbytes * 8 == q.bits_per_value * x.size
        assert q.codes.dtype == jnp.uint8
    assert formats.get("int8_tensor").bits_per_value() == 8


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mxint8", "mxfp8", "nvint4", "int8_row", "int8_tensor"])
def test_nan_and_infinity(name):
    """Said where that is possible; under jit they stay to be seen, in their block alone."""
    x = np.asarray(tensors()[0]).copy()
    fmt = formats.get(name)
    clean = formats.dequantise(formats.quantise(x, name))
    traced = jax.jit(lambda a: formats.dequantise(formats.quantise(a, name)))
    for bad, cast in itertools.product([np.nan, np.inf, -np.inf], [traced, lambda a: formats.fake_quantise(a, name)]):
        x[2, 40] = bad
        with pytest.raises(ValueError, match=r"1 of its 256 values are NaN or infinite, the first at \(2, 40\)"):
            formats.quantise(x, name)
        out = cast(x)
        touched = np.zeros(x.shape, bool)
        if fmt.block == "tensor":
            touched[:] = True
        elif fmt.block == "row":
            touched[2] = True
        else:
            touched[2, 40 // fmt.block * fmt.block : (40 // fmt.block + 1) * fmt.block] = True
        np.testing.assert_array_equal(np.isnan(out), touched)
        np.testing.assert_array_equal(np.asarray(out)[~touched], np.asarray(clean)[~touched])


@pytest.mark.quick
@pytest.mark.parametrize("size", [64, 384, 4096])
def test_nan_is_not_lost_anywhere_in_a_long_row(size):
    """XLA's own maximum of floats loses it on CPUs, in rows that it makes vectors of."""
    x = np.ones((8, size), np.float32)
    at = np.linspace(0, size - 1, 8).astype(int)
    x[np.arange(8), at] = np.nan
    q = jax.jit(lambda x: formats.quantise(x, "int8_row"))(x)
    assert np.isnan(q.scales).all()
    assert not np.any(q.codes)


@pytest.mark.quick
def test_minus_128_needs_both_a_rounded_scale_and_unsymmetric_clipping():
    """INT v.s. FP's defect: it is in the codes with the MX specification's scale, or with a scale of bfloat16's precision."""
    x = np.random.default_rng(1).standard_normal((512, 32)).astype(ml_dtypes.bfloat16)
    worst = lambda name: int((unpacked(formats.quantise(x, name)) == 0x80).sum())
    assert worst("mxint8-asymmetric-ocp") > 0
    assert worst("mxint8-ocp") == worst("mxint8-asymmetric") == worst("mxint8") == worst("int8_row-asymmetric") == 0
    wide = x.astype(np.float32)
    scale = (np.abs(wide).max(1, keepdims=True) / 127).astype(ml_dtypes.bfloat16)
    y = (x / scale).astype(np.float32)  # in bfloat16, as in autocast
    element = formats.get("int8_row").element
    loose = formats.get("int8_row-asymmetric").element
    assert (np.asarray(loose.encode(jnp.asarray(y))) == 0x80).mean() > 1e-4
    assert (np.asarray(element.encode(jnp.asarray(y))) == 0x80).sum() == 0


@pytest.mark.quick
@pytest.mark.parametrize("name", BLOCKED)
def test_values_are_exact_in_bfloat16(name):
    """What kernels rely on: MX as they are, NV without the tensor's float32."""
    q = formats.quantise(np.asarray(tensors()[[0, 2, 4, 6]]), name)
    if q.tensor is not None:
        q = q.replace(tensor=jnp.ones_like(q.tensor))
    wide = formats.dequantise(q)
    narrow = formats.dequantise(q, jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide, narrow.astype(jnp.float32))
    assert float(jnp.abs(wide).max()) > 0


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mxfp4", "nvint4", "int8_row"])
def test_straight_through(name):
    x = jnp.asarray(tensors()[0])
    w = jnp.asarray(tensors()[1])
    out = formats.fake_quantise(x, name)
    np.testing.assert_array_equal(out, formats.dequantise(formats.quantise(x, name)))
    assert float(jnp.abs(out - x).max()) > 0
    loss = lambda x: (formats.fake_quantise(x, name, key=jax.random.key(0)) * w).sum()
    np.testing.assert_array_equal(jax.jit(jax.grad(loss))(x), w)
    # The factor beside it is the rounded value, not x.
    square = lambda x: (formats.fake_quantise(x, name) ** 2).sum() / 2
    np.testing.assert_array_equal(jax.grad(square)(x), out)
    _, tangent = jax.jvp(lambda x: formats.fake_quantise(x, name), (x,), (w,))
    np.testing.assert_array_equal(tangent, w)
    half = x.astype(jnp.bfloat16)
    assert (
        formats.fake_quantise(half, name).dtype
        == jax.grad(lambda a: loss(a).astype(jnp.float32))(half).dtype
        == half.dtype
    )


@pytest.mark.quick
def test_stochastic_rounding_of_arrays():
    """The same key, the same codes; the mean of many is x (ceil: nothing saturates), and codes go to a neighbour only."""
    x = jnp.asarray(tensors()[0])
    draw = jax.jit(lambda key: formats.dequantise(formats.quantise(x, "mxint4", key=key)))
    many = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(0), 1000)), np.float64)
    np.testing.assert_array_equal(draw(jax.random.split(jax.random.key(0), 1000)[7]), many[7])
    near = formats.quantise(x, "mxint4")
    step = np.repeat(np.exp2(np.asarray(near.scales, np.float64) - 127) / 4, 32, axis=-1)
    # A draw's standard deviation is at most half a step; 256 means, none beyond 5 of its own.
    assert (np.abs(many.mean(0) - x) <= 5 * step / 2 / np.sqrt(1000)).all()
    assert (np.abs(many - np.asarray(x)) < step).all()
    assert not np.array_equal(many[0], many[1])


BOUNDS = ["mxint8", "mxfp6_e3m2", "mxfp4", "int8_row", "fp8_e4m3_row"]


@pytest.mark.parametrize("name", BOUNDS)
@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(
    x=hypothesis.extra.numpy.arrays(
        np.float32, (2, 32), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
    )
)
def test_no_error_is_above_half_a_step(name, x):
    """Integers: half the scale's step. Floats: half a unit of the last place of |x|, or of the smallest normal number."""
    fmt = formats.get(name)
    q = formats.quantise(x, fmt)
    scale = np.asarray(q.scales, np.float64)
    if isinstance(fmt.scale, E8M0):
        scale = 2.0 ** (scale - 127)
    error = np.abs(np.asarray(formats.dequantise(q), np.float64) - x)
    if hasattr(fmt.element, "fraction"):
        bound = np.broadcast_to(scale * 2.0**-fmt.element.fraction / 2, x.shape)
    else:
        e = np.floor(np.log2(np.maximum(np.abs(x, dtype=np.float64) / scale, 2.0**fmt.element.least)))
        bound = scale * 2.0 ** (e - fmt.element.mantissa) / 2
    assert (error <= bound * (1 + 1e-6) + TINY).all()


@pytest.mark.quick
def test_tiny_tensors_keep_their_order_of_magnitude():
    """Where scales would leave float32's range: nothing is NaN, infinite or doubled, and what has to be lost is zero."""
    for name in ("nvfp4", "nvint4", "int8_row", "mxfp8"):
        for size in (2.0**-110, 2.0**-122, 2.0**-126):
            x = np.float32(size) * np.asarray(tensors()[0])
            out = np.asarray(formats.dequantise(formats.quantise(x, name)), np.float64)
            assert np.isfinite(out).all()
            assert (np.abs(out) <= 1.5 * np.abs(x).max() + 2.0**-117).all()
    # A block whose own scale, amax / 6, would be a subnormal float32: the tensor's scale leaves room for it.
    x = np.repeat(np.float32([2.0**-111, 2.0**-125]), 16)
    np.testing.assert_array_equal(formats.dequantise(formats.quantise(x, "nvfp4"))[16:], x[16:])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: formats.quantise(x[:, :40], "mxfp4"), "mxfp4 takes blocks of 32, and 40 is no positive multiple of 32; "
         r"nearest: 32 or 64 \(zeros up to 64 change no other value\)"),
        (lambda x: formats.quantise(x[:, :7], "int4_row"), "2 codes of 4 bits together, and 7 is no positive multiple of 2"),
        (lambda x: formats.quantise(x[:, :0], "int8_row"), "nearest: 1 "),
        (lambda x: formats.quantise(x[:3], "nvfp4", 0), "shape .3, 64. along axis -2: nvfp4 takes blocks of 16, and 3"),
        (lambda x: formats.quantise(x, "mxfp4", 2), r"axis = 2, but the array has the shape \(4, 64\)"),
        (lambda x: formats.quantise(x, "mxfp4", 1, stacked=2), "stacked = 2 leading dimensions"),
        (lambda x: formats.quantise(x.astype(np.int32), "mxint8"), "cannot quantise int32; convert it to float32"),
        (lambda x: formats.fake_quantise(x[:, :40], "mxfp4"), "mxfp4 takes blocks of 32, and 40"),
        (lambda x: formats.get("mxfp5"), "unknown number format 'mxfp5'; did you mean mxfp8 or mxfp6"),
        (lambda x: formats.get("whatever"), "formats are mxint8, mxint6"),
        (lambda x: formats.get("int4_g33"), "block = 33; it must be a positive multiple of 2"),
        (lambda x: formats.get("mxfp4-asymmetric"), "mxfp4 has nothing that 'asymmetric' changes; it takes ceil, floor"),
        (lambda x: formats.get("fp8_e4m3_row-ceil"), "has no variants"),
        (lambda x: formats.get("int8_row").bits_per_value(), "give row="),
    ],
)  # fmt: skip
def test_what_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(np.asarray(tensors()[0]))


@pytest.mark.quick
def test_names():
    for name in formats.NAMES:
        fmt = formats.get(name)
        assert fmt.name == name
        assert formats.get(fmt) is fmt
        assert hash(fmt) == hash(formats.get(name))
    assert formats.get("mxfp8") == formats.get("mxfp8_e4m3")
    assert formats.get("mxfp8-ocp").name == "mxfp8_e4m3-ocp"
    assert formats.get("fp6_e3m2_g64").block == 64
    assert not formats.get("mxint8-asymmetric").element.symmetric
    assert partial(formats.get("mxint8").misfit, 64)() is None


def test_laid_along_is_the_same_array_with_its_quantised_dimension_innermost():
    """A stack of layers too; a compiled function takes it as it lies."""
    w = jax.random.normal(jax.random.key(0), (2, 64, 32))
    q = formats.quantise(w, "int8_row", 1)
    laid = formats.laid_along(q)
    assert (laid.format, laid.axis, laid.shape) == (q.format, q.axis, q.shape)
    assert laid.codes.format.layout.major_to_minor == (0, 2, 1)
    compiled = jax.jit(formats.dequantise).lower(laid).compile()
    assert compiled.input_formats[0][0].codes.layout.major_to_minor == (0, 2, 1)
    np.testing.assert_array_equal(compiled(laid), formats.dequantise(q))
    stack = formats.laid_along(q, stacked=1)
    assert stack.codes.format.layout.major_to_minor == (2, 0, 1)
    np.testing.assert_array_equal(formats.dequantise(stack), formats.dequantise(q))
    with pytest.raises(ValueError, match="takes arrays in memory, and this one is traced; lay it before"):
        jax.jit(formats.laid_along)(q)
