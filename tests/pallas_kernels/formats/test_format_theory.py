"""The paper's formulas, against integrals, against its numbers, and against measurements of the formats themselves."""

import json
import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats

from jaxpar.pallas_kernels.formats import measure, theory
from jaxpar.pallas_kernels.formats.format import NAMES, get
from tests.processes import start

PAPER = {"mxint8": 7.55, "mxint6": 1.96, "mxint4": 2.04, "nvint4": 2.39}
"""INT v.s. FP's crossover crest factors."""

GOLDEN = {
    "normal": (41.61, 31.53, 29.42, 30.96, 16.85, 18.76, 21.28, 20.44),
    "laplace": (39.95, 31.55, 27.70, 30.24, 14.91, 17.59, 19.77, 20.66),
}
"""QSNR in dB of the pairs' formats in order, by another program (NumPy, float64, ml_dtypes), 2^20 values of seed 0. Where
these change, a format has: look for which codes or scales differ."""


@pytest.mark.quick
def test_published_crossovers():
    for integer, floating in theory.PAIRS:
        assert round(theory.crossover(integer, floating, as_published=True), 2) == PAPER[integer]


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mxfp8", "mxfp6", "mxfp4", "nvfp4", "fp8_e5m2_row"])
@pytest.mark.parametrize("crest", [1.7, 3.1])
def test_the_float_formula_is_its_integral(name, crest):
    """Noise of normal, subnormal and vanishing numbers, each integrated over the normal density."""
    fmt = get(name)
    M, step = fmt.element.mantissa, 2.0 ** (fmt.element.least - fmt.element.mantissa)
    rho = {"E8M0": 1.5, "E4M3": 1.05, "float32": 1.0}[fmt.scale.name]
    scale = rho * crest / fmt.element.largest  # of a block whose root mean square is 1
    half, normal = scale * step / 2, scale * 2.0**fmt.element.least
    mean = lambda f, low, high: 2 * scipy.integrate.quad(lambda x: f(x) * scipy.stats.norm.pdf(x), low, high)[0]
    top = mean(lambda x: x * x, normal, np.inf) - (crest**2 / 16 if fmt.block == 16 else 0)
    noise = top / (24 * 4**M)
    noise += mean(lambda x: (scale * step) ** 2 / 12, half, normal) + mean(lambda x: x * x, 0, half)
    np.testing.assert_allclose(theory.qsnr(name, crest, as_published=True), -10 * np.log10(noise), atol=1e-4)


@pytest.mark.quick
def test_the_integer_formula():
    """Published: 6.02 dB a bit, 20 dB for ten times the crest factor. Ours: half a step evenly, steps to 127."""
    published = lambda name, k: theory.qsnr(name, k, as_published=True)
    assert abs(published("mxint8", 2.0) - (4.78 + 6.02 * 8 - 20 * math.log10(1.5 * 2.0))) < 1e-9
    assert abs(published("mxint8", 3.0) - published("mxint6", 3.0) - 12.04) < 1e-9
    assert abs(published("nvint4", 2.0) + 10 * math.log10((1.05 * 2) ** 2 / (12 * 64) * 15 / 16)) < 1e-9
    over = scipy.integrate.quad(lambda u: 4**u, 0, 1)[0]
    assert abs(theory.qsnr("mxint8", 2.0) + 10 * math.log10(over * 4 / 127**2 / 12)) < 1e-9
    # The mean of (step / value)² / 12 over one binade, evenly in the logarithm.
    a = scipy.integrate.quad(lambda u: 4.0**-u, 0, 1)[0] / 12
    assert abs(theory.qsnr("mxfp8", 2.0) + 10 * math.log10(a / 64)) < 0.01


@pytest.mark.parametrize(("data", "golden"), GOLDEN.items())
def test_measurements_are_another_programs(data, golden):
    draw = np.random.default_rng(0)
    normal = draw.standard_normal(1 << 20)
    x = normal if data == "normal" else draw.laplace(size=1 << 20)
    names = [name for pair in theory.PAIRS for name in pair]
    found = [measure.measured(x.reshape(-1, 1024), name) for name in names]
    np.testing.assert_allclose(found, golden, atol=0.03)


@pytest.mark.parametrize("name", [n for n in NAMES if "tensor" not in n])
def test_the_formula_is_what_is_measured(name):
    """Around the crest factor that blocks of normally distributed values have, within 0.25 dB (NVFP4: 0.4, its largest value
    is not exact); there the paper's integers are off by 1.2 dB at 4 bits, for the 8 steps where there are 7."""
    usual = measure.crest(measure.gaussian(name, 1 << 15), name)
    for crest in (0.95 * usual, usual, 1.1 * usual, 1.25 * usual):
        found = measure.measured(measure.with_crest(name, crest, 1 << 15), name)
        assert abs(theory.qsnr(name, crest) - found) < (0.4 if name == "nvfp4" else 0.25), crest
        published = theory.qsnr(name, crest, as_published=True) - found
        if name.startswith(("mxint4", "int4")):
            assert 0.9 < published < 1.3
        elif name != "nvfp4":
            assert -0.3 < published < 0.85


def test_normally_distributed_blocks():
    for name in ("mxint8", "mxint4", "mxfp8", "mxfp6", "nvint4", "nvfp4", "int8_row", "int8_tensor", "int4_g64"):
        x = measure.gaussian(name, 1 << 16)
        # The scales of blocks of one size are not evenly spread over a power of two: up to a third of a dB.
        within = 0.4 if name.startswith("mx") else 0.25
        assert abs(theory.qsnr(name, measure.crest(x, name)) - measure.measured(x, name)) < within, name


def test_measured_crossovers_and_their_order():
    """Near ours, and 4 bits in blocks of 32 not where the paper has them: below 6 bits, not above. 8-bit integers are ahead
    at every crest factor that 32 values can have: the paper's 7.55 is above sqrt(32)."""
    found = {pair[0]: measure.measured_crossover(*pair, 1 << 15) for pair in theory.PAIRS}
    assert found.pop("mxint8") is None
    assert theory.crossover("mxint8", "mxfp8") > theory.largest_crest("mxint8") == math.sqrt(32)
    for integer, floating in theory.PAIRS[1:]:
        assert abs(found[integer] - theory.crossover(integer, floating)) < 0.08
    assert sorted(found, key=found.get) == ["mxint4", "mxint6", "nvint4"]
    assert sorted(found, key=PAPER.get) == ["mxint6", "mxint4", "nvint4"]
    assert found["mxint4"] < PAPER["mxint4"] - 0.15
    assert abs(found["mxint6"] - PAPER["mxint6"]) < 0.1


def test_the_predicted_winner_wins():
    """Whenever the crest factor is more than a tenth away from the crossover."""
    for integer, floating in theory.PAIRS:
        cross = theory.crossover(integer, floating)
        for crest in (0.7 * cross, 0.88 * cross, 1.12 * cross, 1.3 * cross):
            if crest < 0.8 * theory.largest_crest(integer):
                x = measure.with_crest(integer, crest, 1 << 15)
                ahead = measure.measured(x, integer) - measure.measured(x, floating)
                assert (ahead > 0) == (crest < cross), (integer, crest, ahead)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["mxint8", "nvint4", "int8_row"])
@pytest.mark.parametrize("crest", [1.3, 2.0, 3.7])
def test_data_has_the_crest_factor(name, crest):
    x = measure.with_crest(name, crest, 1 << 14).astype(np.float64)
    rms = np.sqrt((x**2).mean(1))
    np.testing.assert_allclose(np.abs(x).max(1) / rms, crest, rtol=1e-4)
    assert abs(measure.crest(x, name) - crest) < 1e-3
    if name == "mxint8":
        assert rms.min() >= 1 - 1e-6
        assert rms.max() <= 2 + 1e-6
        # As much energy in the lower half of the binade as in the upper, evenly in the logarithm.
        assert abs((rms[rms < math.sqrt(2)] ** 2).sum() / (rms**2).sum() - 0.5) < 0.1
    else:
        np.testing.assert_allclose(rms, 1, rtol=1e-6)
    assert measure.measured(np.full((2, 32), 2.0), "mxint8") == math.inf


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: theory.qsnr("mxint8-ocp", 2.0), "mxint8-ocp: the formula holds for symmetric integers and scales"),
        (lambda: theory.qsnr("mxint8-asymmetric", 2.0), "symmetric integers"),
        (lambda: theory.qsnr("mxint8", 0.9), "at least 1; got 0.9"),
        (lambda: theory.crossover("mxfp8", "mxint8"), "mxfp8_e4m3 and mxint8 do not cross between 1 and 12"),
        (lambda: measure.with_crest("nvfp4", 4.1, 4096), r"4.1 is outside of 1 to sqrt\(16\) = 4.00"),
    ],
)
def test_what_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


@pytest.mark.quick
def test_formats_are_named_without_jax():
    program = (
        "import sys, json; from jaxpar.pallas_kernels import formats; from jaxpar.pallas_kernels.formats import theory; "
        "formats.get('mxfp4-ocp'); theory.crossover('mxint4', 'mxfp4'); "
        "print(json.dumps(sorted({'jax', 'matplotlib'} & set(sys.modules))))"
    )
    process = start(["-c", program])
    assert process.wait(60) == 0, process.output
    assert json.loads(process.output) == []
