"""A mixer that is watched: the same stream, and what each branch of each layer read, gave and took from which source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.base import DepthMixer, Stack, Streams

BRANCHES = ("attention", "feedforward")


class Seen(NamedTuple):
    """What was seen. L layers; the second dimension of two is attention and feed-forward.

    Attributes:
      reads: [L, B, T, D], what each layer's attention reads of the stream (its queries, where they read apart).
      given: float32 [L, 2], root mean square of what branches gave.
      stream: float32 [L, 2], that of what they read.
      cosine: float32 [L, 2], mean over tokens of cos(x, x + y), x what a branch read and y what it gave.
      weights: float32 [L, 2, 3, n], how much of each of the n sources a branch reads, see `shares`; of query, key and value
        (all the same where they do not read apart). NaN where a branch reads no source.
    """

    reads: Any
    given: Any
    stream: Any
    cosine: Any
    weights: Any


def rms(x):
    return jnp.sqrt(jnp.mean(jnp.square(x.astype(jnp.float32))))


def cosine(a, b):
    """Cosine of vectors along the last dimension, float32; 0 where one of them is zero."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    lengths = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    return (a * b).sum(-1) / jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny)


def sources_of(state: Stack) -> list:
    """A stack's sources as tangents: for each, what the state would grow by if the source grew by itself. Where sums are
    open (`Stack.carry`), the last source is the open one."""
    zero = jax.tree.map(jnp.zeros_like, state)
    found = [zero._replace(slots=zero.slots.at[i].set(state.slots[i])) for i in range(state.slots.shape[0])]
    if state.carry is not None:
        found.append(zero._replace(fresh=state.fresh) if state.fresh else zero._replace(carry=state.carry))
    return found


def shares(read, state: Stack):
    """How much of each source a read holds: float32 [3, n] of query, key and value.

    The read's response to a source's growth, `J v_i`, along that source: the mean over tokens of `<J v_i, v_i> / <v_i, v_i>`.
    For a read `Σ_i w_i v_i` with fixed weights, or with weights that do not look at how large a source is (attention over
    normalised keys), that is w_i. It needs no mixer to tell its weights. A source that is zero (not written yet) has 0.
    """

    def three(state):
        x = read(state)
        return jnp.stack(x[:3]) if isinstance(x, Streams) else jnp.stack([x] * 3)

    # How the read responds, by transposing its gradients: sums over slots have no forward-mode rule.
    x, pull = jax.vjp(three, state)
    _, transposed = jax.vjp(lambda cotangent: pull(cotangent)[0], jnp.zeros_like(x))
    response = lambda tangent: transposed(tangent)[0]
    found = []
    for tangent in sources_of(state):
        v = jax.tree.reduce(jnp.add, jax.tree.map(lambda x: x.sum(0) if x.ndim == 4 else x, tangent))
        v = v.astype(jnp.float32)
        along = (response(tangent).astype(jnp.float32) * v[None]).sum(-1)
        size = jnp.square(v).sum(-1)
        found.append(jnp.where(size > 0, along / jnp.where(size > 0, size, 1.0)[None], 0.0).mean((1, 2)))
    return jnp.stack(found, axis=1)


@dataclass(frozen=True)
class Watched(DepthMixer):
    """`inner`, bit for bit; its state goes beside what was seen.

    Attributes:
      inner: the mixer. Attention Residuals in their direct form: where a layer's two branches look at whole blocks
        together, the second one's share of them is not seen.
    """

    inner: DepthMixer

    def check(self, cfg) -> None:
        self.inner.check(cfg)

    def check_route(self, route) -> None:
        self.inner.check_route(route)

    def spec(self, cfg) -> dict:
        return self.inner.spec(cfg)

    def head_spec(self, cfg) -> dict:
        return self.inner.head_spec(cfg)

    def flops(self, cfg) -> int:
        return self.inner.flops(cfg)

    def reach(self, cfg) -> int:
        return self.inner.reach(cfg)

    def first_reach(self, cfg) -> int:
        return self.inner.first_reach(cfg)

    def first_spec(self, cfg) -> dict:
        return self.inner.first_spec(cfg)

    def memory(self, cfg) -> dict:
        return self.inner.memory(cfg)

    def kept(self, cfg, params, state, site):
        return self.inner.kept(cfg, params, state[0], site)

    def init(self, cfg, x_BxTxD, *first):
        state = self.inner.init(cfg, x_BxTxD, *first)
        n = len(sources_of(state)) if isinstance(state, Stack) else 0
        two = jnp.zeros((cfg.layers, 2), jnp.float32)
        reads = jnp.zeros((cfg.layers, *x_BxTxD.shape), x_BxTxD.dtype)
        weights = jnp.full((cfg.layers, 2, 3, n), jnp.nan, jnp.float32)
        return state, Seen(reads, two, two, two, weights)

    def tokens(self, state):
        return self.inner.tokens(state[0])

    def read(self, cfg, params, state, layer, site, *behind):
        inner, seen = state
        x, told = self.inner.read(cfg, params, inner, layer, site, *behind)
        first = x.query if isinstance(x, Streams) else x
        if site == "attention":
            seen = seen._replace(reads=seen.reads.at[layer].set(first))
        # A feed-forward branch that goes on from the layer's own stream reads no source.
        if isinstance(inner, Stack) and (site == "attention" or inner.stream is None):
            read = lambda state: self.inner.read(cfg, params, state, layer, site)[0]
            weights = seen.weights.at[layer, BRANCHES.index(site)].set(shares(read, inner))
            seen = seen._replace(weights=weights)
        return x, (told, first, seen)

    def write(self, cfg, params, state, told, y_BxTxD, layer, site):
        inner, _ = state
        told, x, seen = told
        at = layer, BRANCHES.index(site)
        seen = seen._replace(
            given=seen.given.at[at].set(rms(y_BxTxD)),
            stream=seen.stream.at[at].set(rms(x)),
            cosine=seen.cosine.at[at].set(cosine(x, x + y_BxTxD).mean()),
        )
        return self.inner.write(cfg, params, inner, told, y_BxTxD, layer, site), seen

    def commit(self, cfg, state, layer):
        return self.inner.commit(cfg, state[0], layer), state[1]

    def final(self, cfg, params, state):
        return self.inner.final(cfg, params, state[0])
