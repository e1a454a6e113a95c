"""Elements against ml_dtypes, bit for bit, and against a search over all codes in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxpar.pallas_kernels.formats.elements import E2M1, E2M3, E3M2, E4M3, E5M2, Float, Int, exponent, power_of_two
from jaxpar.pallas_kernels.formats.packing import pack, unpack

pytestmark = pytest.mark.quick

FLOATS = {
    "e4m3": (E4M3, ml_dtypes.float8_e4m3fn),
    "e5m2": (E5M2, ml_dtypes.float8_e5m2),
    "e2m3": (E2M3, ml_dtypes.float6_e2m3fn),
    "e3m2": (E3M2, ml_dtypes.float6_e3m2fn),
    "e2m1": (E2M1, ml_dtypes.float4_e2m1fn),
}
INTS = {"int8": Int(8), "int6": Int(6), "int4": Int(4), "mxint8": Int(8, fraction=6), "int8 to -128": Int(8, False)}
ALL = {name: element for name, (element, _) in FLOATS.items()} | INTS

encode = jax.jit(lambda element, y: element.encode(y), static_argnums=0)
decode = jax.jit(lambda element, c: element.decode(c), static_argnums=0)


def samples(element) -> np.ndarray:
    """float32: all bfloat16 numbers (infinities, not NaN), what lies around and in the middle of neighbouring values, and noise."""
    values = element.values()
    values = np.unique(values[np.isfinite(values)])
    ties = (values[1:] + values[:-1]) / 2
    points = np.concatenate([values, ties, [1.5 * values[-1], 2 * values[-1] - values[-2], -0.0, 0.0]]).astype(
        np.float32
    )
    step = np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))
    every = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
    draw = np.random.default_rng(0)
    noise = draw.standard_normal(20000) * 2.0 ** draw.uniform(-20, 18, 20000)
    return np.concatenate([points, *step, every[~np.isnan(every)], noise.astype(np.float32)])


def bits(x) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


@pytest.mark.parametrize("name", FLOATS)
def test_every_code_is_the_number_that_ml_dtypes_has(name):
    element, dtype = FLOATS[name]
    codes = np.arange(2**element.bits, dtype=np.uint8)
    numbers = codes.view(dtype).astype(np.float32)
    np.testing.assert_array_equal(decode(element, codes), numbers)
    np.testing.assert_array_equal(element.values().astype(np.float32), numbers)
    np.testing.assert_array_equal(np.signbit(decode(element, codes)), np.signbit(numbers))
    whole = codes[~np.isnan(numbers) & ~np.isinf(numbers)]
    np.testing.assert_array_equal(encode(element, decode(element, whole)), whole)
    assert element.largest == float(ml_dtypes.finfo(dtype).max)
    assert element.least == ml_dtypes.finfo(dtype).minexp
    # 0x7F in E4M3, 0x7E in E5M2; there is none in FP6 and FP4.
    nan = np.array(np.nan, dtype) if element.special != "none" else None
    assert element.nan_code == (None if nan is None else int(bits(nan)) & 0x7F)


@pytest.mark.parametrize("name", FLOATS)
def test_rounding_is_ml_dtypes_cast(name):
    """Saturating: of the clamped number. FP6 and FP4 saturate by themselves, so there infinity is compared too."""
    element, dtype = FLOATS[name]
    x = samples(element)
    clamped = np.clip(x, -element.largest, element.largest)
    np.testing.assert_array_equal(encode(element, x), bits(clamped.astype(dtype)))
    if element.special == "none":
        np.testing.assert_array_equal(encode(element, x), bits(x.astype(dtype)))


@pytest.mark.parametrize("name", ["e4m3", "e5m2"])
def test_overflow_to_nan_or_infinity_is_ml_dtypes_cast(name):
    element, dtype = FLOATS[name]
    special = Float(element.exponents, element.mantissa, element.special, overflow="special")
    x = samples(element)
    np.testing.assert_array_equal(encode(special, x), bits(x.astype(dtype)))
    assert (np.abs(x) > element.largest).sum() > 1000
    nan = encode(special, np.array([np.nan, -np.nan], np.float32))
    np.testing.assert_array_equal(nan, bits(np.array([np.nan, -np.nan], dtype)))


def test_int4_is_ml_dtypes_int4():
    codes = np.arange(16, dtype=np.uint8)
    numbers = codes.view(ml_dtypes.int4).astype(np.float32)
    np.testing.assert_array_equal(decode(Int(4), codes), numbers)
    np.testing.assert_array_equal(encode(Int(4, symmetric=False), numbers), codes)
    # -8 is outside of the symmetric range.
    np.testing.assert_array_equal(encode(Int(4), np.float32([-8, -7, 7, 8])), [9, 9, 7, 7])


@pytest.mark.parametrize("name", ALL)
def test_rounding_is_the_nearest_of_all_codes(name):
    """In float64, ties to the even code of the two. Nothing of the encoder is used, not even its table."""
    element = ALL[name]
    if isinstance(element, Int):
        low = -(2 ** (element.bits - 1)) + element.symmetric
        values = np.arange(low, 2 ** (element.bits - 1)) / 2.0**element.fraction
        even = np.arange(low, 2 ** (element.bits - 1)) % 2 == 0
    else:
        magnitudes = FLOATS[name][1]
        codes = np.arange(2 ** (element.bits - 1), dtype=np.uint8)
        values = codes.view(magnitudes).astype(np.float64)
        codes, values = codes[np.isfinite(values)], values[np.isfinite(values)]
        even = codes % 2 == 0
        values, even = np.concatenate([-values[:0:-1], values]), np.concatenate([even[:0:-1], even])
    x = samples(element)
    x64 = np.clip(x.astype(np.float64), values[0], values[-1])
    above = np.clip(np.searchsorted(values, x64), 1, len(values) - 1)
    up, down = values[above] - x64, x64 - values[above - 1]
    nearest = np.where((up < down) | ((up == down) & even[above]), values[above], values[above - 1])
    np.testing.assert_array_equal(decode(element, encode(element, x)), nearest.astype(np.float32))
    assert (up == down).sum() >= len(values) - 1


@pytest.mark.parametrize("element", [E4M3, E2M1, Int(4), Int(8, fraction=6)], ids=lambda e: e.name)
def test_stochastic_rounding_has_no_bias(element):
    """The mean of n draws is x within 5 standard deviations: of one draw, step · sqrt(p (1 - p)), p the part cut off."""
    n = 4096
    spread = np.float32(element.largest) * np.float32([0.013, 0.3, -0.37, 0.62, -0.99, 0.001, 0.5, 1.0])
    noise = jax.random.bits(jax.random.key(3), (n, len(spread)), jnp.uint32)
    drawn = jax.jit(lambda y, u: element.decode(element.encode(y, u)))(np.tile(spread, (n, 1)), noise)
    drawn = np.asarray(drawn, np.float64)
    values = np.unique(element.values()[np.isfinite(element.values())])
    for k, x in enumerate(spread.astype(np.float64)):
        below, above = values[values <= x].max(), values[values >= x].min()
        assert set(np.unique(drawn[:, k])) <= {below, above}
        p = 0.0 if below == above else (x - below) / (above - below)
        deviation = (above - below) * np.sqrt(p * (1 - p) / n)
        assert abs(drawn[:, k].mean() - x) <= 5 * deviation
        if 0.05 < p < 0.95:
            assert len(np.unique(drawn[:, k])) == 2


@pytest.mark.parametrize(("bits", "together"), [(4, 2), (6, 4)])
@pytest.mark.parametrize("axis", [-1, -2])
def test_packing_holds_every_pair_of_codes(bits, together, axis):
    """All pairs at each two neighbouring places; and the layout is read by hand: the first code in the lowest bits."""
    pairs = np.stack(np.meshgrid(*[np.arange(2**bits)] * 2, indexing="ij"), -1).reshape(-1, 2).astype(np.uint8)
    codes = np.concatenate([np.roll(np.concatenate([pairs, pairs[::-1]], 1), k, 1) for k in range(4)]).reshape(-1, 4)
    codes = codes if axis == -1 else codes.T
    data = jax.jit(partial(pack, bits=bits, axis=axis))(codes)
    assert data.dtype == jnp.uint8
    assert data.shape[axis] * 8 == codes.shape[axis] * bits
    np.testing.assert_array_equal(jax.jit(partial(unpack, bits=bits, axis=axis))(data), codes)
    rows, bytes_ = (codes, np.asarray(data)) if axis == -1 else (codes.T, np.asarray(data).T)
    for row, stored in list(zip(rows, bytes_, strict=True))[::977]:
        for start in range(0, 4, together):
            number = sum(int(c) << (bits * i) for i, c in enumerate(row[start : start + together]))
            first = start * bits // 8
            assert number.to_bytes(together * bits // 8, "little") == bytes(
                stored[first : first + together * bits // 8]
            )


def test_powers_and_exponents_are_exact():
    k = np.arange(-126, 128, dtype=np.int32)
    np.testing.assert_array_equal(power_of_two(k), np.ldexp(np.float32(1), k))
    np.testing.assert_array_equal(exponent(np.ldexp(np.float32(1), k)), k)
    below = np.nextafter(np.ldexp(np.float32(1), k[1:]), np.float32(0))
    np.testing.assert_array_equal(exponent(-below), k[:-1])
    np.testing.assert_array_equal(exponent(np.float32([0, 1e-40])), [-127, -127])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Int(9), "Int.bits = 9; codes are held in bytes: 2 to 8"),
        (lambda: Float(5, 3), "5 exponent and 3 mantissa bits"),
        (lambda: Float(2, 1, overflow="special"), "e2m1 has no NaN and no infinity to overflow to"),
    ],
)
def test_what_is_no_element(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
