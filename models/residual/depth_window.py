"""Attention over depth: a layer's state looks at the last few states of its own token (residual-stream duality)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.base import Cumulative, slot
from jaxpar.models.residual.short_window import projected, projections, short_window


@dataclass(frozen=True)
class DepthWindow(Cumulative):
    """`X_l + softmax(q K ᵀ / √D) V` over the last `window` states X_l, X_l-1, ... of a token is the stream that layer l starts
    from, q = X_l W_q, K = X W_k, V = X W_v (arXiv 2603.16039, section 2.5: ShortSWA along depth, see `short_window`, and its
    twin along the sequence, `ShortWindow`). The paper is a note without experiments: that the read is added to the stream,
    and not taken in its place, follows its form for sequences (algorithm 1), and the norm before the projections too.

    Never the plain stream, at no initialisation.

    Attributes:
      window: states, the newest included.
      epsilon: of the norm, which has no gain.
    """

    window: int = 4
    epsilon: float = 1e-6

    def check(self, cfg) -> None:
        if not 1 <= self.window <= cfg.layers:
            raise ValueError(
                f"residual.window = {self.window} states is outside 1 to model.layers = {cfg.layers}: the last layer has "
                f"{cfg.layers} states to read, the embedding among them"
            )

    def spec(self, cfg) -> dict:
        return projections(cfg)

    def flops(self, cfg) -> int:
        return 2 * cfg.width * (cfg.width * (1 + 2 * self.window) + 2 * self.window)

    def mix(self, cfg, params, slots_nxBxTxD, layer):
        newest = slot(slots_nxBxTxD, layer)
        # The window's slots in order of depth; before the embedding there is none.
        first = layer - self.window + 1
        padded = jnp.pad(slots_nxBxTxD, ((self.window - 1, 0), (0, 0), (0, 0), (0, 0)))
        x_WxBxTxD = jax.lax.dynamic_slice_in_dim(padded, layer, self.window, 0)
        (q_BxTxD,) = projected(params, newest, ("query",), self.epsilon)
        k, v = (jnp.moveaxis(x, 0, 2) for x in projected(params, x_WxBxTxD, ("key", "value"), self.epsilon))
        there = jnp.where(first + jnp.arange(self.window, dtype=jnp.int32) >= 0, 0, -1)[None, None]
        y = short_window(q_BxTxD[:, :, None], k, v, jnp.zeros((1, 1, 1), jnp.int32), there, self.window)
        y_BxTxD = newest + y[:, :, 0].astype(newest.dtype)
        return y_BxTxD, y_BxTxD
