"""RMSNorm and LayerNorm. Statistics in float32, whatever the compute dtype.

The backward pass keeps the input, in its own dtype, and the statistics, and computes what follows from them again: the
centred and the normed input are float32 arrays as large, which cost more to write and to read than to compute.
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.spec import Constant, ParamSpec

STATISTICS = "norm_statistics"


def _thinly(normed):
    """With a backward pass that keeps what the docstring above says."""
    keep = jax.checkpoint_policies.save_only_these_names(STATISTICS)
    return jax.checkpoint(normed, policy=keep, prevent_cse=False)


def _mean(x):
    """Over the last axis, for the backward pass to keep."""
    return jax.ad_checkpoint.checkpoint_name(jnp.mean(x, axis=-1, keepdims=True), STATISTICS)


@dataclass(frozen=True)
class RMSNorm:
    """`x / sqrt(mean(x²) + epsilon) · scale` (Zhang & Sennrich 2019).

    Attributes:
      epsilon: added to the mean square.
      unit_offset: the stored scale is relative to one, `(1 + scale)`, so that it starts at zero (Gemma).
    """

    epsilon: float = 1e-5
    unit_offset: bool = False

    def spec(self, size: int, axis: str | None = "norm") -> dict:
        start = 0.0 if self.unit_offset else 1.0
        return {"scale": ParamSpec((size,), (axis,), Constant(start), decay=False)}

    def __call__(self, params: dict, x):
        """x [..., size] -> [..., size] in x's dtype."""
        return _thinly(self._normed)(params, x)

    def _normed(self, params: dict, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(_mean(jnp.square(y)) + self.epsilon)
        scale = params["scale"].astype(jnp.float32)
        if self.unit_offset:
            scale = 1.0 + scale
        return (y * scale.reshape((1,) * (y.ndim - 1) + scale.shape)).astype(x.dtype)


@dataclass(frozen=True)
class LayerNorm:
    """`(x - mean) / sqrt(variance + epsilon) · scale + bias` (Ba et al. 2016).

    Attributes:
      epsilon: added to the variance.
      bias: whether a bias is learned.
    """

    epsilon: float = 1e-5
    bias: bool = True

    def spec(self, size: int, axis: str | None = "norm") -> dict:
        specs = {"scale": ParamSpec((size,), (axis,), Constant(1.0), decay=False)}
        if self.bias:
            specs["bias"] = ParamSpec((size,), (axis,), Constant(0.0), decay=False)
        return specs

    def __call__(self, params: dict, x):
        """x [..., size] -> [..., size] in x's dtype."""
        return _thinly(self._normed)(params, x)

    def _normed(self, params: dict, x):
        y = x.astype(jnp.float32)
        y = y - _mean(y)
        y = y * jax.lax.rsqrt(_mean(jnp.square(y)) + self.epsilon)
        row = lambda p: p.astype(jnp.float32).reshape((1,) * (y.ndim - 1) + p.shape)
        y = y * row(params["scale"])
        if self.bias:
            y = y + row(params["bias"])
        return y.astype(x.dtype)
