"""DenseFormer: each layer's input is a weighted average of all states before it (Pagliardini et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.lazy import jnp
from jaxpar.models.residual.base import Cumulative, masked, number_of, seen, slot, weighted
from jaxpar.models.spec import Constant, ParamSpec


@dataclass(frozen=True)
class DenseFormer(Cumulative):
    """`Y_i = Σ_{j ≤ i} α_ij X_j` behind layer i, where X_0 is the embedding and X_j what layer j gave (section 3). Weights
    are scalars, neither positive nor normalised; layers count from 1, and layer 1 reads the embedding as it is.

    Equal to the plain stream at initialisation, for any dilation and period, bitwise: weights are stored as what they
    differ from `α_ii = 1` and zero elsewhere. (So weight decay would pull towards the plain stream, not towards none;
    there is none here. The authors decay α itself, by 1e-3.)

    Attributes:
      dilation: average states that are a multiple of so many layers behind (the paper's k).
      period: average behind every so many layers only (its p).
    """

    dilation: int = 1
    period: int = 1

    def check(self, cfg) -> None:
        for name in ("dilation", "period"):
            value = getattr(self, name)
            if not 1 <= value <= cfg.layers:
                raise ValueError(
                    f"residual.{name} = {value} is outside 1 to model.layers = {cfg.layers}: no layer would read more than "
                    "the one before it"
                )

    def spec(self, cfg) -> dict:
        # A layer's own row is of what it reads, which the layer before gave; the last one is the head's.
        return {"average": ParamSpec((cfg.layers + 1,), (None,), Constant(0.0), decay=False)}

    def head_spec(self, cfg) -> dict:
        return self.spec(cfg)

    def flops(self, cfg) -> int:
        return round(2 * cfg.width * (cfg.layers + 3) / 2 / self.dilation / self.period)

    def average(self, params, slots_nxBxTxD, i):
        """Y_i from X_0 ... X_i."""
        newest = slot(slots_nxBxTxD, i)
        slots, mask = seen(slots_nxBxTxD, i)
        j_n = jnp.arange(slots.shape[0])
        used_n = ((i - j_n) % self.dilation == 0) & (i % self.period == 0) & (i > 0)
        used_n = used_n if mask is None else used_n & mask
        return newest + weighted(masked(used_n, params["average"][: slots.shape[0]]), slots)

    def mix(self, cfg, params, slots_nxBxTxD, layer):
        y_BxTxD = self.average(params, slots_nxBxTxD, layer)
        return y_BxTxD, y_BxTxD

    def final(self, cfg, params, state):
        return self.average(params, state.slots, number_of(cfg.layers))
