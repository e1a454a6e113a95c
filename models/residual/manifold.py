"""Manifold-constrained hyper-connections: streams are mixed by doubly stochastic matrices (mHC, DeepSeek 2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.hyper_connections import ManyStreams
from jaxpar.models.spec import Constant, Normal, ParamSpec


def sinkhorn(logits, iterations: int):
    """Matrices near the doubly stochastic ones: exponentials, columns and rows divided by their sums in turn.

    Args:
      logits: float32 [..., N, N].

    Returns:
      float32 [..., N, N]: rows sum to 1, columns the closer to it the more iterations.
    """
    start = jnp.exp(logits - logits.max((-2, -1), keepdims=True))

    def turn(m, _):
        m = m / m.sum(-2, keepdims=True)
        return m / m.sum(-1, keepdims=True), None

    return jax.lax.scan(turn, start, None, length=iterations)[0]


@dataclass(frozen=True)
class Diagonal:
    """An initial value: a constant on the diagonal, zero elsewhere."""

    value: float

    def __call__(self, key, shape, dtype):
        return self.value * jnp.eye(*shape, dtype=dtype)


@dataclass(frozen=True)
class ManifoldHyperConnections(ManyStreams):
    """A branch reads `Σ_i σ(p_i) X_i`, and behind it `X_i ← Σ_j R_ij X_j + 2σ(q_i) · y`, R = Sinkhorn(exp r) (arXiv
    2512.24880, section 4). p, q and r are `α · (RMSNorm(vec X) φ) + bias`, each with its α. Sinkhorn's iterations run in
    float32 and are computed again in the backward pass. As products of doubly stochastic matrices are such, no depth
    amplifies the streams.

    Never the plain stream, at no initialisation: φ is random, or no two streams would ever differ. Biases, of
    which the paper is silent: p such that equal streams are read as one of them, q = 0 (so y is written once), r =
    `identity` times the unit matrix.

    Attributes:
      streams: N, at least 1.
      iterations: of Sinkhorn.
      scale: the initial value of each α.
      identity: the initial bias of r on its diagonal.
      epsilon: of the norm.
    """

    iterations: int = 20
    scale: float = 0.01
    identity: float = 4.0
    epsilon: float = 1e-6

    def check(self, cfg) -> None:
        super().check(cfg)
        if self.iterations < 1:
            raise ValueError(f"residual.iterations = {self.iterations} of Sinkhorn must be at least 1")

    def spec(self, cfg) -> dict:
        N = self.streams
        once = math.log(1 / (N - 1)) if N > 1 else 4.0
        one = {
            "dynamic": ParamSpec((N, cfg.width, N * N + 2 * N), (None, "embed", None), Normal(cfg.init_std)),
            "scales": ParamSpec((3,), (None,), Constant(self.scale), decay=False),
            "read": ParamSpec((N,), (None,), Constant(once), decay=False),
            "write": ParamSpec((N,), (None,), Constant(0.0), decay=False),
            "mix": ParamSpec((N, N), (None, None), Diagonal(self.identity), decay=False),
        }
        return {"attention": one, "feedforward": one}

    def flops(self, cfg) -> int:
        N = self.streams
        return 2 * 2 * cfg.width * (N * (N * N + 2 * N) + N + N * N + N)

    def mixes(self, params, state):
        """p, q and r: [B, T, N], [B, T, N] and [B, T, N, N], the last made doubly stochastic."""
        N = self.streams
        p = {name: x.astype(jnp.float32) for name, x in params.items()}
        x = state.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=(-2, -1), keepdims=True) + self.epsilon)
        moves = jnp.einsum("btnd,ndm->btm", x, p["dynamic"])
        read_BxTxN = jax.nn.sigmoid(p["scales"][0] * moves[..., :N] + p["read"][None, None])
        write_BxTxN = 2 * jax.nn.sigmoid(p["scales"][1] * moves[..., N : 2 * N] + p["write"][None, None])
        rest = moves[..., 2 * N :]
        logits = p["scales"][2] * rest.reshape(*rest.shape[:2], N, N) + p["mix"][None, None]
        again = jax.checkpoint(lambda logits: sinkhorn(logits, self.iterations), prevent_cse=False)
        return read_BxTxN, write_BxTxN, again(logits)

    def read(self, cfg, params, state, layer, site):
        read_BxTxN, write_BxTxN, mix_BxTxNxN = self.mixes(params[site], state)
        x_BxTxD = jnp.einsum("btn,btnd->btd", read_BxTxN.astype(state.dtype), state)
        return x_BxTxD, (mix_BxTxNxN, write_BxTxN)

    def write(self, cfg, params, state, told, y_BxTxD, layer, site):
        mix_BxTxNxN, write_BxTxN = (x.astype(state.dtype) for x in told)
        moved = jnp.einsum("btij,btjd->btid", mix_BxTxNxN, state)
        return moved + write_BxTxN[..., None] * y_BxTxD[:, :, None]
