"""Deep Delta Learning: a branch's output is a direction, along which the stream is erased and written (Zhang et al. 2026)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.base import Behind, DepthMixer, dot
from jaxpar.models.spec import Constant, Normal, ParamSpec

KERNEL = 4
"""The span of the convolutions, over channels and over tokens."""


@dataclass(frozen=True)
class Uniform:
    """Uniform between -bound and bound."""

    bound: float

    def __call__(self, key, shape, dtype):
        return jax.random.uniform(key, shape, jnp.float32, -self.bound, self.bound).astype(dtype)


@dataclass(frozen=True)
class Newest:
    """A convolution over tokens [K, ...] that gives the newest token as it is."""

    def __call__(self, key, shape, dtype):
        return jnp.zeros(shape, dtype).at[-1].set(1)


def shifted(behind: Behind, kernel: int) -> list:
    """The values behind each of S tokens, [B, S, ...] for each of `kernel` places, the token itself last; zero where the place is
    in another document or in none."""
    n = kernel - 1
    S = behind.documents.shape[1] - n
    own_BxS, found = behind.documents[:, n:], []
    for j in range(kernel):
        x, same = behind.values[:, j : j + S], behind.documents[:, j : j + S] == own_BxS
        found.append(x if j == n else jnp.where(same.reshape(*same.shape, *(1,) * (x.ndim - 2)), x, 0))
    return found


def delta(x_BxTxVxD, k_BxTxD, v_BxTxV, beta_BxT, *, erase: bool = True):
    """`X + β k (vᵀ - kᵀX)`, or `X + β k vᵀ` without erasing; products in float32, the sum in X's dtype."""
    k = k_BxTxD.astype(jnp.float32)
    if erase:
        v_BxTxV = v_BxTxV - dot(k[:, :, None], x_BxTxVxD.astype(jnp.float32))
    move_BxTxV = beta_BxT[..., None] * v_BxTxV
    return x_BxTxVxD + (move_BxTxV[..., None] * k[:, :, None]).astype(x_BxTxVxD.dtype)


def direction(y_BxTxD, epsilon: float):
    """`y / sqrt(|y|² + ε²)`, float32: shorter than 1 where |y| is not far above ε."""
    y = y_BxTxD.astype(jnp.float32)
    return y * jax.lax.rsqrt(dot(y, y)[..., None] + epsilon**2)


@dataclass(frozen=True)
class DeepDelta(DepthMixer):
    """`X ← X + β k (vᵀ - kᵀX)` with X of `channels` vectors a token, k the branch's normalised output, and β = 2σ(gate) in
    (0, 2) and v from what the branch read (arXiv 2601.00417, eq. 3 to 5).

    Never the plain stream, at no initialisation. With β near 0 every branch is silent and gets no gradient (a dead
    start), so β starts at 1.

    One channel is the scalar form. With more, the embedding is repeated, and a layer reads a mix of the channels: a
    convolution over channels, each feature with its own kernel, then a weighted sum (the authors' compressor CC, one for both
    branches of a layer); or a causal convolution over the last 4 tokens, each feature of each channel with its own kernel,
    then the weighted sum (TC). The first state can be such a convolution of embeddings (EC), which starts as the repeated
    embedding. No convolution looks into another document. The head reads a mix over channels in either case; the
    authors' head convolves over tokens where their layers do.

    The gate sees RMSNorm(x) without a gain, the authors' with the branch's gain, which the gate's weights can hold.

    Attributes:
      channels: d_v.
      compressor: what a layer reads of the channels: a mix over "channels" (CC) or over "tokens" (TC). TC starts as the mean, with
        one channel too.
      embedding: the first state: "repeat" the embedding, or its "convolution" over the last 4 tokens (EC).
      update: "delta"; "write" leaves the erasure kᵀX out: the control that the authors name as missing.
      value: v is "linear" in RMSNorm(x), as in the paper; "sigmoid": 4σ(W x + b) of x itself, as in the authors' expanded
        form; "constant": 2, as in their scalar form.
      beta: β at the start.
      epsilon: of the direction's norm.
    """

    channels: int = 1
    compressor: Literal["channels", "tokens"] = "channels"
    embedding: Literal["repeat", "convolution"] = "repeat"
    update: Literal["delta", "write"] = "delta"
    value: Literal["linear", "sigmoid", "constant"] = "linear"
    beta: float = 1.0
    epsilon: float = 1e-5

    def check(self, cfg) -> None:
        if self.channels < 1:
            raise ValueError(f"residual.channels = {self.channels} must be at least 1")
        if not 0 < self.beta < 2:
            raise ValueError(
                f"residual.beta = {self.beta} is outside (0, 2), the range of 2 sigmoid: at 0 no branch has a gradient, and at 2 the "
                "gate has none; 1 is what the authors start from"
            )

    def reach(self, cfg) -> int:
        return KERNEL if self.compressor == "tokens" else 1

    def first_reach(self, cfg) -> int:
        return KERNEL if self.embedding == "convolution" else 1

    def memory(self, cfg) -> dict:
        if self.compressor == "channels":
            return {}
        return dict.fromkeys(("attention", "feedforward"), (self.channels, cfg.width))

    def kept(self, cfg, params, state, site):
        return state

    def first_spec(self, cfg) -> dict:
        if self.embedding == "repeat":
            return {}
        return {"mix": self._taps(cfg, Newest())}

    def _taps(self, cfg, init) -> ParamSpec:
        """A kernel over tokens of each feature of each channel."""
        return ParamSpec((KERNEL, self.channels, cfg.width), (None, None, "norm"), init, decay=False)

    def spec(self, cfg) -> dict:
        D, V = cfg.width, self.channels
        start = math.log(self.beta / (2 - self.beta))
        one = {
            "gate": {
                "weight": ParamSpec((D,), ("norm",), Normal(cfg.init_std), decay=False),
                "bias": ParamSpec((), (), Constant(start), decay=False),
            }
        }
        if self.value != "constant":
            one["value"] = {
                "weight": ParamSpec((D, V), ("embed", None), Normal(cfg.init_std)),
                "bias": ParamSpec((V,), (None,), Constant(0.0), decay=False),
            }
        compress = self.head_spec(cfg)
        if self.compressor == "tokens":
            read = ParamSpec((V,), (None,), Constant(1 / V), decay=False)
            compress = {"compress": {"mix": self._taps(cfg, Constant(1 / KERNEL)), "read": read}}
        return {"attention": one, "feedforward": one, **compress}

    def head_spec(self, cfg) -> dict:
        if self.channels == 1:
            return {}
        kernel = min(KERNEL, self.channels)
        return {
            "compress": {
                "mix": ParamSpec((kernel, cfg.width), (None, "norm"), Uniform(kernel**-0.5), decay=False),
                "read": ParamSpec((self.channels,), (None,), Constant(1 / self.channels), decay=False),
            }
        }

    def flops(self, cfg) -> int:
        V = self.channels
        mixed = KERNEL * V if self.compressor == "tokens" else V if V > 1 else 0
        return 2 * 2 * cfg.width * (1 + (self.value != "constant") * V + mixed + 2 * V)

    def init(self, cfg, x_BxTxD, params=None, behind: Behind | None = None):
        if self.embedding == "repeat":
            return jnp.repeat(x_BxTxD[:, :, None], self.channels, axis=2)
        taps = params["mix"].astype(x_BxTxD.dtype)
        return sum(x[:, :, None] * w[None, None] for x, w in zip(shifted(behind, KERNEL), taps, strict=True))

    def tokens(self, state):
        return state.shape[:2]

    def over_tokens(self, params, behind: Behind):
        """What a branch reads of the channels of the last tokens: [B, T, D]."""
        p = params["compress"]
        taps_KxVxD = (p["mix"] * p["read"][None, :, None]).astype(behind.values.dtype)
        terms = zip(shifted(behind, KERNEL), taps_KxVxD, strict=True)
        return sum(jnp.einsum("btvd,vd->btd", x, w) for x, w in terms)

    def compressed(self, params, state):
        """What a branch reads of the channels: [B, T, D]."""
        if self.channels == 1:
            return state[:, :, 0]
        mix_KxD, read_V = (params["compress"][name].astype(jnp.float32) for name in ("mix", "read"))
        K, V = mix_KxD.shape[0], self.channels
        # Channel u of the convolution is Σ_j mix_j · X_(u + j - left); gathered by channel, each has one weight a feature.
        left = (K - 1) // 2
        padded = jnp.pad(read_V, (K, K))
        # Channel v is met by kernel entry j where u = v - j + left.
        taps_VxK = jnp.stack([padded[K + left - j : K + left - j + V] for j in range(K)], axis=1)
        return jnp.einsum("btvd,vd->btd", state, (taps_VxK @ mix_KxD).astype(state.dtype))

    def read(self, cfg, params, state, layer, site, behind: Behind | None = None):
        x_BxTxD = self.compressed(params, state) if behind is None else self.over_tokens(params, behind)
        p = jax.tree.map(lambda w: w.astype(jnp.float32), params[site])
        x = x_BxTxD.astype(jnp.float32)
        product = lambda w: jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST)
        # Products with RMSNorm(x) are products with x, scaled: the norm itself need not exist.
        scale_BxT = jax.lax.rsqrt(dot(x, x) / x.shape[-1] + 1e-6)
        beta_BxT = 2 * jax.nn.sigmoid(product(p["gate"]["weight"]) * scale_BxT + p["gate"]["bias"])
        if self.value == "constant":
            v_BxTxV = jnp.full((*beta_BxT.shape, self.channels), 2.0)
        else:
            linear = self.value == "linear"
            v_BxTxV = product(p["value"]["weight"])
            v_BxTxV = (v_BxTxV * scale_BxT[..., None] if linear else v_BxTxV) + p["value"]["bias"][None, None]
            v_BxTxV = v_BxTxV if linear else 4 * jax.nn.sigmoid(v_BxTxV)
        return x_BxTxD, (v_BxTxV, beta_BxT)

    def write(self, cfg, params, state, told, y_BxTxD, layer, site):
        run = lambda state, y, told: delta(state, direction(y, self.epsilon), *told, erase=self.update == "delta")
        # Directions and products are computed again in the backward pass: the stream and the branch's output are all it keeps.
        return jax.checkpoint(run, prevent_cse=False)(state, y_BxTxD, told)

    def final(self, cfg, params, state):
        return self.compressed(params, state)
