"""Attention over depth: a layer's state looks at the last few states of its own token (residual-stream duality)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.base import Cumulative, slot
from jaxpar.models.spec import Normal, ParamSpec


def short_window(x_xxSxD, query, key, value, window: int):
    """Single-head attention of each place to itself and the `window - 1` places before it, along the last dimension but
    one, without positions: `softmax(x W_q (x W_k)ᵀ / √d) x W_v`. One operator for both dimensions: a sequence [B, T, D], or
    the depths of each token [B, T, L, D].
    """
    x = x_xxSxD.astype(jnp.float32)
    q, k, v = (x @ w.astype(jnp.float32) for w in (query, key, value))
    behind = jnp.arange(x.shape[-2])[:, None] - jnp.arange(x.shape[-2])[None]
    hidden = (behind < 0) | (behind >= window)
    scores = jnp.einsum("...qd,...kd->...qk", q, k) * q.shape[-1] ** -0.5
    hidden = hidden.reshape((1,) * (scores.ndim - 2) + hidden.shape)
    return (jax.nn.softmax(jnp.where(hidden, -jnp.inf, scores), axis=-1) @ v).astype(x_xxSxD.dtype)


@dataclass(frozen=True)
class DepthWindow(Cumulative):
    """`X_l + softmax(q K ᵀ / √D) V` over the last `window` states X_l, X_l-1, ... of a token is the stream that layer l starts
    from, q = X_l W_q, K = X W_k, V = X W_v (arXiv 2603.16039, section 2.5: ShortSWA along depth, see `short_window`). The
    paper is a note without experiments: that the read is added to the stream, and not taken in its place, follows its form
    for sequences (algorithm 1), and the norm before the projections too.

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
        D, std = cfg.width, cfg.init_std
        out = std / (2 * cfg.layers) ** 0.5
        weights = {name: ParamSpec((D, D), ("embed", None), Normal(std)) for name in ("query", "key")}
        return {**weights, "value": ParamSpec((D, D), ("embed", None), Normal(out))}

    def flops(self, cfg) -> int:
        return 2 * cfg.width * (cfg.width * (1 + 2 * self.window) + 2 * self.window)

    def mix(self, cfg, params, slots_nxBxTxD, layer):
        newest = slot(slots_nxBxTxD, layer)
        # The window's slots in order of depth; before the embedding there is none.
        first = layer - self.window + 1
        padded = jnp.pad(slots_nxBxTxD, ((self.window - 1, 0), (0, 0), (0, 0), (0, 0)))
        x = jax.lax.dynamic_slice_in_dim(padded, layer, self.window, 0).astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        q_BxTxD = x[-1] @ params["query"].astype(jnp.float32)
        k, v = (x @ params[name].astype(jnp.float32) for name in ("key", "value"))
        scores = jnp.einsum("btd,nbtd->nbt", q_BxTxD, k) * cfg.width**-0.5
        there = (first + jnp.arange(self.window) >= 0)[:, None, None]
        weights = jax.nn.softmax(jnp.where(there, scores, -jnp.inf), axis=0)
        y_BxTxD = newest + jnp.einsum("nbt,nbtd->btd", weights, v).astype(newest.dtype)
        return y_BxTxD, y_BxTxD
