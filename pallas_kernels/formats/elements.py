"""The numbers that a value is rounded to: small integers and small floats, exactly as their specifications have them.

An element knows its values and turns float32 into codes and back. Codes are uint8, one a value, the number's bits in the
low end. No JAX is imported with this module, so that configurations may name formats.

Sources: OCP 8-bit Floating Point Specification (OFP8) 1.0, E4M3 and E5M2; OCP Microscaling Formats (MX) Specification 1.0,
section 5.3, E2M3, E3M2, E2M1 and INT8.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np


def rounded(steps, noise=None):
    """`steps` to whole numbers: to the nearest, ties to even; with `noise` (uint32 bits) up or down at random.

    The chance of going up is the fraction that is cut off, to 2⁻²⁴ of a step: without bias where nothing is clipped.
    """
    import jax.numpy as jnp

    if noise is None:
        return jnp.round(steps)
    down = jnp.floor(steps)
    # The difference of a float32 and its floor is exact; steps + u would be rounded, and so biased.
    chance = (noise >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)
    return down + (chance < steps - down).astype(jnp.float32)


def exponent(x):
    """floor(log2 |x|) of normal float32 numbers, from their bits: int32. Zero and subnormals give -127."""
    import jax
    import jax.numpy as jnp

    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return ((bits >> 23) & 0xFF) - 127


def power_of_two(k):
    """2^k as float32, made from bits (`exp2` is not exact everywhere). k is int32, clipped to -126 ... 127."""
    import jax
    import jax.numpy as jnp

    return jax.lax.bitcast_convert_type((jnp.clip(k, -126, 127) + 127) << 23, jnp.float32)


@dataclass(frozen=True)
class Int:
    """Integers in two's complement, in steps of 2^-fraction.

    Attributes:
      bits: 2 to 8.
      symmetric: clip to ±(2^(bits-1) - 1). Otherwise -2^(bits-1) is used as well, which lies outside of the scale's range:
        it appears where a scale was rounded down, and biases gradients (INT v.s. FP, arXiv 2510.25602).
      fraction: binary digits behind the point. MX INT8 has 6: its largest value is 127/64.
    """

    bits: int
    symmetric: bool = True
    fraction: int = 0

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"Int.bits = {self.bits}; codes are held in bytes: 2 to 8")

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    @property
    def largest(self) -> float:
        return (2 ** (self.bits - 1) - 1) / 2**self.fraction

    def values(self) -> np.ndarray:
        """float64 [2^bits], the value of each code. That of -2^(bits-1) is there, whether it is used or not."""
        code = np.arange(2**self.bits)
        return np.where(code >= 2 ** (self.bits - 1), code - 2**self.bits, code) / 2.0**self.fraction

    def encode(self, y, noise=None):
        """float32 to uint8 codes of its shape; what is larger than the range gets the nearest end. NaN gets 0."""
        import jax.numpy as jnp

        low, high = -(2 ** (self.bits - 1)) + self.symmetric, 2 ** (self.bits - 1) - 1
        steps = jnp.clip(y * np.float32(2.0**self.fraction), low, high)
        whole = rounded(jnp.where(jnp.isnan(steps), 0, steps), noise).astype(jnp.int32)
        return (whole & (2**self.bits - 1)).astype(jnp.uint8)

    def decode(self, codes):
        """uint8 codes to float32 values."""
        import jax.numpy as jnp

        return self.integers(codes).astype(jnp.float32) * np.float32(2.0**-self.fraction)

    def integers(self, codes):
        """uint8 codes to int8: the values in steps of 2^-fraction."""
        import jax
        import jax.numpy as jnp

        unused = 8 - self.bits
        if not unused:
            # What a kernel takes is then what is in memory: shifts by nothing would be a pass over it.
            return jax.lax.bitcast_convert_type(codes, jnp.int8)
        # The sign bit moved to the top, and back with copies of itself.
        return jax.lax.bitcast_convert_type(codes << np.uint8(unused), jnp.int8) >> np.int8(unused)


@dataclass(frozen=True)
class Float:
    """Sign, exponent, mantissa; with subnormals.

    Attributes:
      exponents, mantissa: bits of each.
      special: "none" (all codes are numbers: FP6, FP4), "nan" (only the codes of all ones are not: E4M3), "ieee" (the
        largest exponent is infinity and NaN: E5M2).
      overflow: what becomes of a value that rounds past the largest: "saturate" to it, as MX conversions do, or the
        "special" value (NaN for E4M3, infinity for E5M2), OFP8's non-saturating mode. Infinity is such a value.
    """

    exponents: int
    mantissa: int
    special: Literal["none", "nan", "ieee"] = "none"
    overflow: Literal["saturate", "special"] = "saturate"

    def __post_init__(self):
        if self.exponents < 1 or self.mantissa < 1 or self.bits > 8:
            raise ValueError(
                f"Float of {self.exponents} exponent and {self.mantissa} mantissa bits; each is at least 1, and with the "
                "sign they are at most 8"
            )
        if self.special == "none" and self.overflow == "special":
            raise ValueError(f"{self.name} has no NaN and no infinity to overflow to; it saturates")

    @property
    def bits(self) -> int:
        return 1 + self.exponents + self.mantissa

    @property
    def name(self) -> str:
        return f"e{self.exponents}m{self.mantissa}"

    @property
    def bias(self) -> int:
        return 2 ** (self.exponents - 1) - 1

    @property
    def least(self) -> int:
        """The exponent of the smallest normal number."""
        return 1 - self.bias

    @property
    def largest_code(self) -> int:
        """Of a positive finite number."""
        top = 2 ** (self.bits - 1) - 1
        return {"none": top, "nan": top - 1, "ieee": top - 2**self.mantissa}[self.special]

    @property
    def nan_code(self) -> int | None:
        """The positive quiet NaN."""
        top = 2 ** (self.bits - 1) - 1
        return {"none": None, "nan": top, "ieee": top - 2 ** (self.mantissa - 1) + 1}[self.special]

    @property
    def largest(self) -> float:
        return float(self.values()[self.largest_code])

    def values(self) -> np.ndarray:
        """float64 [2^bits], the value of each code."""
        code = np.arange(2 ** (self.bits - 1))
        field, digits = code >> self.mantissa, code & (2**self.mantissa - 1)
        steps = np.where(field > 0, digits + 2**self.mantissa, digits)
        half = np.ldexp(steps.astype(np.float64), np.maximum(field, 1) - self.bias - self.mantissa)
        half[self.largest_code + 1 :] = np.nan
        if self.special == "ieee":
            half[self.largest_code + 1] = np.inf
        return np.concatenate([half, -half])

    def encode(self, y, noise=None):
        """float32 to uint8 codes of its shape. NaN gets the code of NaN, or 0 where there is none."""
        import jax.numpy as jnp

        # Far above the largest number all is alike; infinity would have no integer below.
        bound = self.largest * (1 if self.overflow == "saturate" else 4)
        size = jnp.minimum(jnp.abs(y), np.float32(bound))
        e = jnp.maximum(exponent(size), self.least)
        steps = rounded(size * power_of_two(self.mantissa - e), noise)
        # A normal number has 2^mantissa steps or more: they add the 1 to the exponent's field by themselves, and so does
        # rounding up into the next binade.
        code = ((e - self.least) << self.mantissa) + jnp.where(jnp.isnan(y), 0, steps).astype(jnp.int32)
        if self.overflow == "special":
            past = self.nan_code if self.special == "nan" else self.largest_code + 1
            code = jnp.where(code > self.largest_code, past, code)
        code = jnp.where(jnp.isnan(y), self.nan_code or 0, code)
        return (code + jnp.where(jnp.signbit(y), 2 ** (self.bits - 1), 0)).astype(jnp.uint8)

    def decode(self, codes):
        """uint8 codes to float32 values."""
        import jax.numpy as jnp

        code = codes.astype(jnp.int32) & (2 ** (self.bits - 1) - 1)
        field, digits = code >> self.mantissa, code & (2**self.mantissa - 1)
        steps = jnp.where(field > 0, digits + 2**self.mantissa, digits).astype(jnp.float32)
        value = steps * power_of_two(jnp.maximum(field, 1) - self.bias - self.mantissa)
        if self.special != "none":
            value = jnp.where(code > self.largest_code, np.float32(np.nan), value)
        if self.special == "ieee":
            value = jnp.where(code == self.largest_code + 1, np.float32(np.inf), value)
        return jnp.where(codes >> (self.bits - 1) != 0, -value, value)


E4M3 = Float(4, 3, "nan")
E5M2 = Float(5, 2, "ieee")
E2M3 = Float(2, 3)
E3M2 = Float(3, 2)
E2M1 = Float(2, 1)
