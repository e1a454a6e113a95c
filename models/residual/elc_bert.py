"""ELC-BERT: each layer reads a softmax-weighted average of all layers' outputs (Charpentier & Samuel 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.base import Deltas, Stack, masked, seen, weighted
from jaxpar.models.spec import Constant, ParamSpec


def average(logits_n, slots_nxBxTxD, last):
    """The softmax-weighted average of the slots up to `last`."""
    slots, mask = seen(slots_nxBxTxD, last)
    logits_n = masked(mask, logits_n[: slots.shape[0]].astype(jnp.float32), -jnp.inf)
    return weighted(jax.nn.softmax(logits_n), slots)


@dataclass(frozen=True)
class ElcBert(Deltas):
    """`x_n = Σ_{i < n} softmax(α_n)_i H_i`, and the layer's output `H_n = a + FFN(x_n + a)`, a = Attention(x_n), is the next
    source: x_n itself is in no output, the average is the only way past a layer ("Not all layers are equally as
    important", section 3). H_0 is the embedding.

    Never the plain stream, at no initialisation. The decoder around it is ours (pre-norms, no NormFormer, no scaling of
    weights with depth): what is theirs is how outputs are combined.

    Attributes:
      variant: "zero": α starts at 0, a uniform average. "base": α of the newest starts at 1 (a softmax weight of e/(n - 1 + e), not 1),
        and the feed-forward sees a alone, as in the released code. "normalized": zero, with each output normalised, without a
        gain. "weighted_output": zero, and the head reads an average of all outputs too.
    """

    variant: Literal["base", "zero", "normalized", "weighted_output"] = "zero"

    def spec(self, cfg) -> dict:
        # Of "base", what it differs from its start: the newest has another place in every layer.
        return {"average": ParamSpec((cfg.layers + 1,), (None,), Constant(0.0), decay=False)}

    def head_spec(self, cfg) -> dict:
        return self.spec(cfg) if self.variant == "weighted_output" else {}

    def flops(self, cfg) -> int:
        return cfg.width * (cfg.layers + 1)

    def mix(self, cfg, params, slots_nxBxTxD, layer):
        logits_n = params["average"].astype(jnp.float32)
        if self.variant == "base":
            logits_n = logits_n + (jnp.arange(logits_n.shape[0]) == layer)
        x_BxTxD = average(logits_n, slots_nxBxTxD, layer)
        return x_BxTxD, x_BxTxD

    def read(self, cfg, params, state: Stack, layer, site):
        if site == "feedforward" and self.variant == "base":
            given, _ = state.stream
            return given, given
        return super().read(cfg, params, state, layer, site)

    def write(self, cfg, params, state: Stack, told, y_BxTxD, layer, site) -> Stack:
        state = super().write(cfg, params, state, told, y_BxTxD, layer, site)
        if site == "attention" or self.variant != "normalized":
            return state
        x = state.fresh[0].astype(jnp.float32)
        x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-7)
        return state._replace(fresh=(x.astype(y_BxTxD.dtype),))

    def final(self, cfg, params, state: Stack):
        if self.variant != "weighted_output":
            return state.slots[-1]
        return average(params["average"], state.slots, cfg.layers)
