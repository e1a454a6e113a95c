"""DeepCrossAttention: queries, keys and values each from their own learned sum of what layers gave (Heddes et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.base import Deltas, Streams, masked, number_of, seen
from jaxpar.models.spec import Constant, ParamSpec

STREAMS = ("query", "key", "value")


@dataclass(frozen=True)
class DeepCrossAttention(Deltas):
    """Three generalised residual networks over G = [x_0, f_1, ..., f_l], the embedding and what each layer before gave, read
    queries, keys and values; the feed-forward sees the queries' input plus attention's output, and a fourth is the head's.
    Version 1: `Σ_i b_i G_i`. Version 2: b_i has an entry for each feature. Version 3 (the paper's): `Σ_i (b_i + ReLU(w · G_i)) · G_i`.

    Equal to the plain stream at initialisation (b = 1, w = 0), for every version and with `latest` too; up to the order
    of the sum.

    Attributes:
      version: of the network, 1 to 3.
      latest: k-DCA: sources are the embedding, the sum of the middle ones, and the k latest. None: all apart. (An open
        re-implementation drops the middle, and is not the plain stream at the start.)
    """

    version: Literal[1, 2, 3] = 3
    latest: int | None = None

    def check(self, cfg) -> None:
        if self.latest is not None and not 1 <= self.latest < cfg.layers:
            raise ValueError(
                f"residual.latest = {self.latest} is outside 1 to {cfg.layers - 1}: with model.layers = {cfg.layers} nothing "
                "would be in the middle; leave it out for all layers apart"
            )

    @property
    def kept(self):
        return None if self.latest is None else self.latest + 2

    def network(self, cfg) -> dict:
        # The embedding first, then from the newest backwards, so that the k latest have the same places in every layer.
        n = cfg.layers + 1 if self.kept is None else self.kept
        weights = ParamSpec((n, cfg.width), (None, "norm"), Constant(1.0), decay=False)
        if self.version == 2:
            return {"weights": weights}
        flat = ParamSpec((n, cfg.width), (None, "norm"), Constant(0.0), decay=False)
        scalars = {"weights": ParamSpec((n,), (None,), Constant(1.0), decay=False)}
        return scalars | ({"dynamic": flat} if self.version == 3 else {})

    def spec(self, cfg) -> dict:
        return {name: self.network(cfg) for name in STREAMS}

    def head_spec(self, cfg) -> dict:
        return self.network(cfg)

    def flops(self, cfg) -> int:
        sources = (cfg.layers + 3) / 2 if self.kept is None else self.kept
        return round(3 * 2 * cfg.width * sources * (2 if self.version == 3 else 1))

    def gathered(self, slots_nxBxTxD, layer):
        """G, float32, and its mask. With `latest`: embedding, middle, and the k newest from the newest backwards."""
        slots, mask = seen(slots_nxBxTxD, layer)
        x = slots.astype(jnp.float32)
        if self.kept is None:
            return x, mask
        k, i_n = self.latest, jnp.arange(slots.shape[0])
        middle = ((i_n > 0) & (i_n <= layer - k)).astype(jnp.float32)
        newest_kxn = (i_n[None] == layer - jnp.arange(k)[:, None]) & (i_n[None] > 0)
        picks = jnp.concatenate([(i_n == 0)[None], middle[None], newest_kxn]).astype(jnp.float32)
        return jnp.einsum("mn,nbtd->mbtd", picks, x), None

    def network_of(self, params, x_nxBxTxD, mask):
        weights = params["weights"].astype(jnp.float32)[: x_nxBxTxD.shape[0]]
        if self.version == 2:
            return jnp.einsum("nd,nbtd->btd", masked(mask, weights), x_nxBxTxD)
        if self.version == 1:
            return jnp.einsum("n,nbtd->btd", masked(mask, weights), x_nxBxTxD)
        w_nxD = params["dynamic"].astype(jnp.float32)[: x_nxBxTxD.shape[0]]
        gates = jax.nn.relu(jnp.einsum("nd,nbtd->nbt", w_nxD, x_nxBxTxD)) + weights[:, None, None]
        return jnp.einsum("nbt,nbtd->btd", masked(mask, gates), x_nxBxTxD)

    def mix(self, cfg, params, slots_nxBxTxD, layer):
        x, mask = self.gathered(slots_nxBxTxD, layer)
        streams = [self.network_of(params[name], x, mask).astype(slots_nxBxTxD.dtype) for name in STREAMS]
        return Streams(*streams), streams[0]

    def final(self, cfg, params, state):
        x, mask = self.gathered(state.slots, number_of(cfg.layers))
        return self.network_of(params, x, mask).astype(state.slots.dtype)
