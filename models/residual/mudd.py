"""MUDDFormer: each layer's queries, keys, values and stream are four dynamic sums over all states before it (Xiao et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.norms import RMSNorm
from jaxpar.models.residual.base import Cumulative, Streams, masked, number_of, seen, slot, weighted
from jaxpar.models.spec import Constant, Normal, ParamSpec


@dataclass(frozen=True)
class MuddFormer(Cumulative):
    """`X̄ᶜ = Σ_{j ≤ l} Aᶜ_j X_j` for c of query, key, value and residual, `A = GELU(RMSNorm(X_l) W_1) W_2 + a` a token, from the newest state
    (section 3; no softmax). Layer: `h = X̄ᴿ + Attention(X̄Q, X̄K, X̄V)`, each with a norm of its own, `X_l+1 = h + FFN(h)`. The
    first layer reads the embedding; the head reads one more sum.

    Equal to the plain stream at initialisation, bitwise: W_2 is zero, and a, stored as what it differs from this, is one for
    the newest state. (The released torch port starts a at random, to be loaded over.)

    Slots are padded to the depth, so that every layer has one shape and the loop can be scanned; the authors unroll it. The
    widths of the feed-forward layers stay equal; theirs grow with depth.

    Attributes:
      epsilon: of the norm before W_1.
    """

    epsilon: float = 1e-6

    def check(self, cfg) -> None:
        if cfg.norm_placement == "post":
            raise ValueError(
                "residual = MuddFormer gives queries, keys and values a norm each before the projections, and "
                "model.norm_placement = 'post' has none there; choose 'pre' or 'pre_post'"
            )

    def hidden(self, ways: int, cfg) -> int:
        """The width between W_1 and W_2: that of the last of layers with so many ways, as one shape is to do for all."""
        return ways * (cfg.layers + 1)

    def sums(self, cfg, ways: int, wider: int = 1) -> dict:
        K, n = wider * self.hidden(ways, cfg), cfg.layers + 1
        return {
            "scale": ParamSpec((cfg.width,), ("norm",), Constant(1.0), decay=False),
            "inner": ParamSpec((cfg.width, K), ("embed", None), Normal(cfg.width**-0.5)),
            "outer": ParamSpec((K, ways, n), (None, None, None), Constant(0.0)),
            "static": ParamSpec((ways, n), (None, None), Constant(0.0), decay=False),
        }

    def spec(self, cfg) -> dict:
        norms = {"key_norm": cfg.norm.spec(cfg.width), "value_norm": cfg.norm.spec(cfg.width)}
        return {"sums": self.sums(cfg, 4), **norms}

    def head_spec(self, cfg) -> dict:
        return self.sums(cfg, 1, wider=4)

    def flops(self, cfg) -> int:
        n, K = cfg.layers + 1, self.hidden(4, cfg)
        return 2 * (cfg.width * K + K * 4 * n + 4 * cfg.width * n)

    def ways(self, params, slots_nxBxTxD, i):
        """The sums over X_0 ... X_i, each [B, T, D]."""
        newest = slot(slots_nxBxTxD, i)
        slots, mask = seen(slots_nxBxTxD, i)
        n = slots.shape[0]
        x = RMSNorm(self.epsilon)({"scale": params["scale"]}, newest).astype(jnp.float32)
        hidden = jax.nn.gelu(x @ params["inner"].astype(jnp.float32), approximate=False)
        outer, static = (params[name].astype(jnp.float32)[..., :n] for name in ("outer", "static"))
        weights = jnp.einsum("btk,kcn->cnbt", hidden, outer) + static[:, :, None, None]
        first = i > 0  # the first layer has nothing to sum over but what it reads anyway
        return [newest + weighted(masked(mask, w) * first, slots) for w in weights]

    def mix(self, cfg, params, slots_nxBxTxD, layer):
        query, key, value, stream = self.ways(params["sums"], slots_nxBxTxD, layer)
        return Streams(query, key, value, (params["key_norm"], params["value_norm"])), stream

    def final(self, cfg, params, state):
        return self.ways(params, state.slots, number_of(cfg.layers))[0]
