"""Vertical Attention: static softmax weights over the normalised states before a layer (Kojima et al.)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.base import Cumulative
from jaxpar.models.residual.elc_bert import average
from jaxpar.models.spec import Constant, ParamSpec


@dataclass(frozen=True)
class VerticalAttention(Cumulative):
    """Layer l's stream starts at `Σ_{j ≤ l} softmax(α_l)_j · RMSNorm(X_j)` over the states X_j behind the layers before (X_0 the
    embedding), and its branches add to it (OpenReview A6uabXKiXc, known to us from its reviews). The norm has no gain.

    Never the plain stream, at no initialisation. The paper leaves open, as far as its reviews tell, whether the neighbouring
    stream is kept beside the average, and how α starts: here it is not, and at zero.

    Attributes:
      epsilon: of the norm of states.
    """

    epsilon: float = 1e-6

    def spec(self, cfg) -> dict:
        return {"average": ParamSpec((cfg.layers + 1,), (None,), Constant(0.0), decay=False)}

    def flops(self, cfg) -> int:
        return cfg.width * (cfg.layers + 1)

    def mix(self, cfg, params, slots_nxBxTxD, layer):
        x = slots_nxBxTxD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        y_BxTxD = average(params["average"], x.astype(slots_nxBxTxD.dtype), layer)
        return y_BxTxD, y_BxTxD
