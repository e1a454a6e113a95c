"""Short-window attention as an operator of the residual stream, over either dimension: along depth (`depth_window`), and along
the sequence, ShortSWA (residual-stream duality)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.base import Behind, DepthMixer
from jaxpar.models.spec import Normal, ParamSpec

LEAST = 32
"""Queries of a block at least, where there are several: smaller ones are too small products."""


def short_window(q_xxQxD, k_xxPxD, v_xxPxD, documents_xxQ, documents_xxP, window: int):
    """Single-head attention of each of Q places to itself and the `window - 1` places before it, without positions:
    `softmax(q Kᵀ / √D) V`, in float32. One operator for both dimensions: places are tokens [B, T, D], or the depths of each token
    [B, T, L, D].

    Scores are those of blocks of queries with the two blocks of keys around them: time and memory grow with Q · window.

    Args:
      k_xxPxD, v_xxPxD: of P = window - 1 + Q places, the last Q of which are the queries' own.
      documents_xxQ, documents_xxP: int32; a place sees those of its own document (at least 0). They have as many dimensions as
        queries and keys without D; a size may be 1.
    """
    Q, C = q_xxQxD.shape[-2], max(window, LEAST)
    if Q <= C:
        return _block(q_xxQxD, k_xxPxD, v_xxPxD, documents_xxQ, documents_xxP, window)
    n = -(-Q // C)

    def blocks(x, n, axis, fill=0):
        """The places along `axis`, padded at the end to n blocks of C."""
        axis += x.ndim
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, n * C - x.shape[axis])
        return jnp.pad(x, pad, constant_values=fill).reshape(*x.shape[:axis], n, C, *x.shape[axis + 1 :])

    def two(x, axis, fill=0):
        """Each block of keys and the next: those that a block of queries meets."""
        x = blocks(x, n + 1, axis, fill)
        first, second = (jax.lax.slice_in_dim(x, i, i + n, axis=axis - 1) for i in (0, 1))
        return jnp.concatenate([first, second], axis=axis)

    keys = two(k_xxPxD, -2), two(v_xxPxD, -2)
    y = _block(blocks(q_xxQxD, n, -2), *keys, blocks(documents_xxQ, n, -1), two(documents_xxP, -1, -1), window)
    return y.reshape(*q_xxQxD.shape[:-2], n * C, -1)[..., :Q, :]


def _block(q, k, v, own, there, window):
    """Query i meets keys i ... i + window - 1."""
    ahead = jnp.arange(k.shape[-2])[None] - jnp.arange(q.shape[-2])[:, None]
    near = (ahead >= 0) & (ahead < window)
    seen = (own[..., :, None] == there[..., None, :]) & near.reshape((1,) * (own.ndim - 1) + near.shape)
    scores = jnp.einsum("...qd,...kd->...qk", q, k) * q.shape[-1] ** -0.5
    # Not -inf: a place of the padding sees nothing, and its weights are never looked at.
    return jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1) @ v


def projections(cfg) -> dict:
    """Parameters of `short_window`'s projections: query, key and value, D to D."""
    D, std = cfg.width, cfg.init_std
    weights = {name: ParamSpec((D, D), ("embed", None), Normal(std)) for name in ("query", "key")}
    return {**weights, "value": ParamSpec((D, D), ("embed", None), Normal(std / (2 * cfg.layers) ** 0.5))}


def projected(params, x_xxD, names, epsilon: float) -> list:
    """What RMSNorm(x), without a gain, is with each of these projections: float32."""
    x = x_xxD.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + epsilon)
    return [x @ params[name].astype(jnp.float32) for name in names]


@dataclass(frozen=True)
class ShortWindow(DepthMixer):
    """`S = X + ShortSWA(norm(X))` over the last `window` tokens is the stream that a layer starts from, `A = S + Attn(norm(S))`,
    `X' = A + MLP(norm(A))` (arXiv 2603.16039, algorithm 1: ShortSWA along the sequence, see `short_window`; the twin of
    `DepthWindow`). A token sees the window's tokens of its own document. The paper is a note without experiments; its
    authors' text recommends windows of 128.

    Keys and values of the window have the stream's width; the cache keeps them for every slot, as it keeps attention's own.

    Never the plain stream, at no initialisation.

    Attributes:
      window: tokens, the newest included.
      epsilon: of the norm, which has no gain.
    """

    window: int = 16
    epsilon: float = 1e-6

    def check(self, cfg) -> None:
        if not 1 <= self.window <= cfg.context:
            raise ValueError(
                f"residual.window = {self.window} tokens is outside 1 to model.context = {cfg.context}, the longest sequence"
            )

    def reach(self, cfg) -> int:
        return self.window

    def memory(self, cfg) -> dict:
        return {"attention": {"key": (cfg.width,), "value": (cfg.width,)}}

    def spec(self, cfg) -> dict:
        return projections(cfg)

    def flops(self, cfg) -> int:
        return 2 * cfg.width * (3 * cfg.width + 2 * self.window)

    def init(self, cfg, x_BxTxD):
        return x_BxTxD

    def tokens(self, state):
        return state.shape[:2]

    def kept(self, cfg, params, state, site):
        names = ("key", "value")
        found = projected(params, state, names, self.epsilon)
        return {name: x.astype(state.dtype) for name, x in zip(names, found, strict=True)}

    def read(self, cfg, params, state, layer, site, behind: Behind | None = None):
        if site == "feedforward":
            return state, state

        def run(params, state, behind):
            (q,) = projected(params, state, ("query",), self.epsilon)
            k, v = (behind.values[name].astype(jnp.float32) for name in ("key", "value"))
            own = behind.documents[:, self.window - 1 :]
            y = short_window(q, k, v, own, behind.documents, self.window)
            return state + y.astype(state.dtype)

        # Scores are computed again in the backward pass.
        x_BxTxD = jax.checkpoint(run, prevent_cse=False)(params, state, behind)
        return x_BxTxD, x_BxTxD

    def write(self, cfg, params, state, told, y_BxTxD, layer, site):
        return told + y_BxTxD

    def final(self, cfg, params, state):
        return state
