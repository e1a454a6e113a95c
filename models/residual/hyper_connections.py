"""Hyper-connections: several copies of the stream, and learned mixes of them (Zhu et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.base import DepthMixer
from jaxpar.models.spec import Constant, ParamSpec


@dataclass(frozen=True)
class ManyStreams(DepthMixer):
    """The state of both kinds of hyper-connections: [B, T, N, D], N streams, all of them the embedding at first."""

    streams: int = 4

    def check(self, cfg) -> None:
        if self.streams < 1:
            raise ValueError(f"residual.streams = {self.streams} must be at least 1")

    def init(self, cfg, x_BxTxD):
        return jnp.repeat(x_BxTxD[:, :, None], self.streams, axis=2)

    def tokens(self, state):
        return state.shape[:2]

    def final(self, cfg, params, state):
        return state.astype(jnp.float32).sum(2).astype(state.dtype)


@dataclass(frozen=True)
class HyperConnections(ManyStreams):
    """A branch reads `Σ_i a_i X_i`, and behind it `X_j ← Σ_i A_ij X_i + b_j · y` (arXiv 2409.19606, eq. 3 and 10 to 14).
    a, A and b are `static + s · tanh(norm(X) W)`, each stream telling its own entries. The head reads the sum of streams.

    Equal to the plain stream at initialisation for any number of streams, bitwise until the head (and there where N is a
    power of two): W is zero, and static
    parts, stored as what they differ from this, are one stream alone for a (branch k reads stream k mod N), the
    identity for A and ones for b. The head sees N times the plain stream, which its norm takes out but for the
    epsilon. Under "post" norms the final norm does so too.

    Attributes:
      streams: N, the paper's expansion rate.
      scale: the initial value of s.
      epsilon: of the norm.
    """

    scale: float = 0.01
    epsilon: float = 1e-6

    def spec(self, cfg) -> dict:
        N = self.streams
        gate = lambda *shape: ParamSpec(shape, (None,) * len(shape), Constant(0.0), decay=False)
        one = {
            # For each stream: its entry of a, its row of A, its entry of b.
            "dynamic": ParamSpec((cfg.width, N + 2), ("embed", None), Constant(0.0), decay=False),
            "scales": ParamSpec((2,), (None,), Constant(self.scale), decay=False),
            "read": gate(N),
            "mix": gate(N, N),
            "write": gate(N),
        }
        return {"attention": one, "feedforward": one}

    def flops(self, cfg) -> int:
        N = self.streams
        return 2 * 2 * cfg.width * (N * (N + 2) + N + N * N + N)

    def read(self, cfg, params, state, layer, site):
        p = {name: x.astype(jnp.float32) for name, x in params[site].items()}
        x = state.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        moves = jnp.tanh(x @ p["dynamic"])
        of_mix, of_write = p["scales"][0], p["scales"][1]
        read_BxTxN = of_mix * moves[..., 0] + p["read"][None, None]
        mix_BxTxNxN = of_mix * moves[..., 1:-1] + p["mix"][None, None]
        write_BxTxN = of_write * moves[..., -1] + p["write"][None, None]
        branch = 2 * layer + (site == "feedforward")
        own = jax.lax.dynamic_index_in_dim(state, branch % self.streams, 2, keepdims=False)
        more = jnp.einsum("btn,btnd->btd", read_BxTxN.astype(state.dtype), state)
        return own + more, (mix_BxTxNxN, write_BxTxN)

    def write(self, cfg, params, state, told, y_BxTxD, layer, site):
        mix_BxTxNxN, write_BxTxN = (x.astype(state.dtype) for x in told)
        moved = jnp.einsum("btij,btid->btjd", mix_BxTxNxN, state)
        return state + moved + y_BxTxD[:, :, None] + write_BxTxN[..., None] * y_BxTxD[:, :, None]
