"""How much a format loses: the signal-to-quantisation-noise ratio by formula, and where integers and floats cross.

Source: "INT v.s. FP" (arXiv 2510.25602): a block of normally distributed values, of which the largest is kappa times the
block's root mean square (the crest factor). With r = rho · kappa, phi and Phi the normal density and distribution:

    Int(b)            noise = r² / (3 · 4^b), which they give as QSNR = 4.78 + 6.02 b - 20 log10 r
    Float(M, bias)    noise = a w + beta r² p + z
                      a     = 1 / (24 · 4^M)                      a normal number's noise over its square
                      beta  = 4^(1-bias-M) / (12 Qmax²)           half a subnormal step, squared, averaged
                      t1    = r 2^(1-bias) / Qmax                 where normal numbers begin
                      t0    = r 2^(-bias-M) / Qmax                below, all is rounded to zero
                      w     = 2 (t1 phi(t1) + 1 - Phi(t1)),   p = 2 (Phi(t1) - Phi(t0)),   z = 2 Phi(t0) - 1 - 2 t0 phi(t0)

and QSNR = -10 log10 noise. rho is what the scale's rounding costs: 1.5 for E8M0, 1.05 for E4M3. With E4M3 scales the largest
value of each block of g is taken to be exact: the integer's noise times 1 - 1/g, and kappa²/g off w.

Differences in the default here (`as_published=False`), each of which brings the formula nearer to what is measured:

    Int        steps to the largest value: 2^(b-1) - 1, which symmetric clipping leaves, not 2^(b-1): 1.16 dB of INT4
    E8M0       rho² = 3 / (2 ln 2) = 2.164, the mean of 4^u for u even in [0, 1), not 1.5² = 2.25
    E4M3       rho = 1: rounded to the nearest, it is as often below as above
    Float      a = 1 / (16 ln 4 · 4^M) = 1 / (22.2 · 4^M): the mean over scales of (step / value)² / 12
    row, g     scales in float32 have rho = 1, and an exact largest value

No JAX is imported with this module.
"""

from __future__ import annotations

import math

from jaxpar.pallas_kernels.formats.elements import Float, Int
from jaxpar.pallas_kernels.formats.format import Format, get
from jaxpar.pallas_kernels.formats.scales import E4M3, E8M0

PAIRS = (("mxint8", "mxfp8_e4m3"), ("mxint6", "mxfp6_e2m3"), ("mxint4", "mxfp4"), ("nvint4", "nvfp4"))
"""An integer and a float format of the same bits and blocks, that the paper compares."""


def density(t: float) -> float:
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def distribution(t: float) -> float:
    return (1 + math.erf(t / math.sqrt(2))) / 2


def applies(fmt: str | Format) -> bool:
    """Whether the formula is of this format: it takes scales that saturate nothing, and integers that are symmetric."""
    fmt = get(fmt)
    saturates = isinstance(fmt.scale, E8M0) and fmt.scale.rule != "ceil"
    return not saturates and (isinstance(fmt.element, Float) or fmt.element.symmetric)


def largest_crest(fmt: str | Format) -> float:
    """sqrt(g): all of a block's energy in one value. Infinite for rows and tensors, whose size is not known."""
    block = get(fmt).block
    return math.sqrt(block) if isinstance(block, int) else math.inf


def qsnr(fmt: str | Format, crest: float, *, as_published: bool = False) -> float:
    """The signal-to-quantisation-noise ratio in dB.

    Args:
      crest: the largest magnitude of a block over its root mean square, at least 1.
      as_published: the paper's constants, for its formats; otherwise the differences above.

    Raises:
      ValueError: a format that the formula is not of, or a crest factor below 1.
    """
    fmt = get(fmt)
    if not applies(fmt):
        raise ValueError(
            f"{fmt.name}: the formula holds for symmetric integers and scales that saturate nothing (rule ceil)"
        )
    if crest < 1:
        raise ValueError(f"a crest factor is the largest magnitude over the root mean square, at least 1; got {crest}")
    if isinstance(fmt.scale, E8M0):
        rho2, exact = (2.25 if as_published else 1.5 / math.log(2)), 0.0
    else:
        rho2 = 1.05**2 if as_published and isinstance(fmt.scale, E4M3) else 1.0
        exact = 1 / fmt.block if isinstance(fmt.block, int) else 0.0
    r2 = rho2 * crest * crest
    noise = (_int if isinstance(fmt.element, Int) else _float)(fmt.element, r2, crest * crest, exact, as_published)
    return -10 * math.log10(noise)


def _int(element: Int, r2: float, crest2: float, exact: float, as_published: bool) -> float:
    if as_published and not exact:
        return r2 / 10 ** (0.478 + 0.602 * element.bits)  # with their rounded constants, for their digits
    steps = 2 ** (element.bits - 1) - (not as_published)
    return r2 / (12 * steps * steps) * (1 - exact)


def _float(element: Float, r2: float, crest2: float, exact: float, as_published: bool) -> float:
    M, bias, largest, r = element.mantissa, element.bias, element.largest, math.sqrt(r2)
    a = 1 / ((24 if as_published else 16 * math.log(4)) * 4**M)
    beta = 4.0 ** (1 - bias - M) / (12 * largest * largest)
    t0, t1 = r * 2.0 ** (-bias - M) / largest, r * 2.0 ** (1 - bias) / largest
    normal = max(0.0, 2 * (t1 * density(t1) + 1 - distribution(t1)) - exact * crest2)
    subnormal = 2 * (distribution(t1) - distribution(t0))
    zero = 2 * distribution(t0) - 1 - 2 * t0 * density(t0)
    return a * normal + beta * r2 * subnormal + zero


def crossover(integer: str | Format, floating: str | Format, *, as_published: bool = False) -> float:
    """The crest factor below which the integer format loses less. It may lie above what a block can have, sqrt(g).

    Raises:
      ValueError: no crossing between 1 and 12.
    """
    ahead = lambda k: qsnr(integer, k, as_published=as_published) - qsnr(floating, k, as_published=as_published)
    low, high = 1.0, 12.0
    if ahead(low) <= 0 or ahead(high) >= 0:
        raise ValueError(
            f"{get(integer).name} and {get(floating).name} do not cross between {low:g} and {high:g}: the integers are "
            f"{ahead(low):+.2f} and {ahead(high):+.2f} dB ahead there"
        )
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if ahead(middle) > 0 else (low, middle)
    return (low + high) / 2
