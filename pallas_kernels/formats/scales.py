"""The scale that the values of a block share: how it is found from the largest magnitude, stored, and applied.

Letters in names: amax is the largest magnitude of each block, float32, with the block's own dimensions kept as 1. Blocks
with NaN or infinity in them have an amax that is not finite; they get the scale NaN, so that the whole block is NaN
afterwards and nothing is hidden. No JAX is imported with this module.

All of float32's subnormals count as zero: some devices flush them, and codes should not depend on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxpar.pallas_kernels.formats import elements
from jaxpar.pallas_kernels.formats.elements import exponent, power_of_two

TINY = np.float32(2.0**-126)
"""The smallest normal float32."""


def _times_power(x, k):
    """x · 2^k for int32 k in -254 ... 254, exact where x and the result are normal: in two steps, as 2^k may be neither."""
    first = k >> 1
    return x * power_of_two(first) * power_of_two(k - first)


def _reciprocal(largest: float) -> np.float32:
    """Multiplied by, not divided by: a compiler turns division by a constant into this, and eager code would differ."""
    return np.float32(1.0) / np.float32(largest)


@dataclass(frozen=True)
class E8M0:
    """A power of two, 2^-127 ... 2^127, held as the exponent plus 127; 255 is NaN (MX specification, section 5.4.1).

    Attributes:
      rule: which power of two. With s = amax / (the element's largest value):
        "ceil": 2^ceil(log2 s). Nothing saturates (INT v.s. FP's choice, and ours).
        "floor": 2^floor(log2 s). The largest values of most blocks saturate.
        "round": 2^round(log2 s).
        "ocp": 2^(floor(log2 amax) - floor(log2 largest)), the MX specification's (section 6.3); it may saturate.
    """

    rule: Literal["ceil", "floor", "round", "ocp"] = "ceil"

    bits = 8
    name = "E8M0"

    def encode(self, amax, largest: float, over):
        """The uint8 scales of blocks whose element goes up to `largest`. A block of zeros gets 0, the smallest.

        Exact: exponents and mantissas are compared, and no logarithm is rounded.

        Returns:
          `(scales, None)`; scales of amax's shape.
        """
        import jax
        import jax.numpy as jnp

        digits, power = np.frexp(largest)
        digits, power = 2 * digits, int(power) - 1
        e = exponent(amax)
        # 1 <= m < 2
        m = jax.lax.bitcast_convert_type(
            (jax.lax.bitcast_convert_type(amax, jnp.int32) & 0x7FFFFF) | 0x3F800000, jnp.float32
        )
        k = e - power
        if self.rule == "ceil":
            k = k + (m > np.float32(digits))
        elif self.rule == "floor":
            k = k - (m < np.float32(digits))
        elif self.rule == "round":
            # log2 (m / digits) against ±1/2: the bounds are irrational, so no float32 lies on them.
            k = k + (m > _below(digits * np.sqrt(2.0))) - (m <= _below(digits / np.sqrt(2.0)))
        code = jnp.where(amax > 0, jnp.clip(k, -127, 127) + 127, 0)
        return jnp.where(jnp.isfinite(amax), code, 255).astype(jnp.uint8), None

    def divide(self, x, scales, tensor):
        return _times_power(x, 127 - scales.astype(np.int32)) * _nan_at(scales, 255)

    def multiply(self, values, scales, tensor):
        return _times_power(values, scales.astype(np.int32) - 127) * _nan_at(scales, 255)


def _below(x: float) -> np.float32:
    """The largest float32 that is not above x."""
    near = np.float32(x)
    return near if float(near) <= x else np.nextafter(near, np.float32(-np.inf))


def _nan_at(codes, code: int):
    import jax.numpy as jnp

    return jnp.where(codes == code, np.float32(np.nan), np.float32(1.0))


@dataclass(frozen=True)
class E4M3:
    """An 8-bit float a block, and a float32 for the whole tensor which lifts the blocks' scales into its range (NVFP4).

    With s = amax / largest: t = max(s) / 448, and the scale is t · E4M3(s / t), rounded to the nearest; where that lies
    below s, the largest value of the block saturates. A block whose scale would round to zero gets the smallest E4M3
    number instead, 2^-9: it would be lost for nothing.
    """

    bits = 8
    name = "E4M3"

    def encode(self, amax, largest: float, over):
        """See `E8M0.encode`.

        Args:
          over: the dimensions that make up a tensor, over which t is one number.

        Returns:
          `(scales, t)`: uint8 of amax's shape, float32 with the dimensions `over` as 1.
        """
        import jax.numpy as jnp

        good = jnp.isfinite(amax)
        s = jnp.where(good, amax, 0) * _reciprocal(largest)
        # t · 2^-9 is to be a normal float32.
        t = jnp.maximum(
            jnp.max(s, axis=over, keepdims=True) * _reciprocal(elements.E4M3.largest), np.float32(2.0**-117)
        )
        code = elements.E4M3.encode(s / t)
        code = jnp.where((code == 0) & (amax > 0), 1, code)
        return jnp.where(good, code, elements.E4M3.nan_code).astype(jnp.uint8), t

    def _scale(self, scales, tensor):
        return elements.E4M3.decode(scales) * tensor

    def divide(self, x, scales, tensor):
        import jax.numpy as jnp

        s = self._scale(scales, tensor)
        return x / jnp.where(s == 0, 1, s)

    def multiply(self, values, scales, tensor):
        return values * self._scale(scales, tensor)


@dataclass(frozen=True)
class Float32:
    """amax / largest as float32, at least 2^-126."""

    bits = 32
    name = "float32"

    def encode(self, amax, largest: float, over):
        """See `E8M0.encode`."""
        import jax.numpy as jnp

        s = jnp.maximum(amax * _reciprocal(largest), TINY)
        return jnp.where(jnp.isfinite(amax), s, np.float32(np.nan)), None

    def divide(self, x, scales, tensor):
        return x / scales

    def multiply(self, values, scales, tensor):
        return values * scales


Scale = E8M0 | E4M3 | Float32
