"""How positions enter: rotary embeddings (RoPE) with their scaling variants, learned embeddings, or not at all."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from jaxpar.models.lazy import jnp
from jaxpar.models.spec import Normal, ParamSpec


@dataclass(frozen=True)
class LinearScaling:
    """Positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    factor: float = 1.0

    def __call__(self, inv_freq, base, size):
        return inv_freq / self.factor, 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __call__(self, inv_freq, base, size):
        wavelength = 2 * math.pi / inv_freq
        smooth = (self.original_context / wavelength - self.low_freq_factor) / (
            self.high_freq_factor - self.low_freq_factor
        )
        smooth = np.clip(smooth, 0.0, 1.0)
        return (1 - smooth) * inv_freq / self.factor + smooth * inv_freq, 1.0


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): interpolation by part of the spectrum, and a scale on the rotated vectors.

    Attributes:
      factor: how many times longer the context is than `original_context`.
      beta_fast, beta_slow: turns over the original context above which a dimension is kept, and below which it is
        interpolated.
      attention_factor: the scale of cos and sin. None: `0.1·ln(factor) + 1`.
      truncate: round the ramp's ends to whole dimensions, as the authors' code does.
    """

    factor: float = 4.0
    original_context: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __call__(self, inv_freq, base, size):
        def dimension(turns):
            return size * math.log(self.original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        ramp = (np.arange(size // 2, dtype=np.float64) - low) / (high - low or 0.001)
        kept = 1.0 - np.clip(ramp, 0.0, 1.0)
        scale = self.attention_factor
        if scale is None:
            scale = 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0
        return inv_freq / self.factor * (1 - kept) + inv_freq * kept, scale


@dataclass(frozen=True)
class FactorScaling:
    """Each frequency divided by its own factor: what GGUF files store, and LongRoPE (Ding et al. 2024) with one set.

    Attributes:
      factors: one for each of the rotated pairs.
      attention_factor: the scale of cos and sin.
    """

    factors: tuple[float, ...] = ()
    attention_factor: float = 1.0

    def __call__(self, inv_freq, base, size):
        if len(self.factors) != size // 2:
            raise ValueError(
                f"positions.scaling.factors has {len(self.factors)} entries, but {size} rotated dimensions have "
                f"{size // 2} pairs; give one for each"
            )
        return inv_freq / np.asarray(self.factors, np.float64), self.attention_factor


Scaling = LinearScaling | Llama3Scaling | YarnScaling | FactorScaling


@dataclass(frozen=True)
class Rope:
    """Rotary position embeddings (Su et al. 2021), in the half-split layout of Llama and Hugging Face.

    Attributes:
      base: wavelengths run from 2π to 2π·base.
      scaling: how a longer context is reached.
      local_base: the base of sliding-window layers, which take no scaling (Gemma 3). None: the same as the others.
      fraction: the part of the head size that is rotated.
    """

    base: float = 10_000.0
    scaling: Scaling | None = None
    local_base: float | None = None
    fraction: float = 1.0

    def rotated(self, head_size: int) -> int:
        return int(head_size * self.fraction)

    def spec(self, cfg) -> dict:
        return {}

    def of_layer(self, local: bool) -> tuple[float, Scaling | None]:
        """The base and the scaling of a layer; `local`: it has a sliding window."""
        return (self.local_base, None) if local and self.local_base is not None else (self.base, self.scaling)

    def frequencies(self, head_size: int, local: bool) -> tuple[np.ndarray, float]:
        """Inverse frequencies [rotated / 2] (radians per token, float64) and the scale of cos and sin."""
        size = self.rotated(head_size)
        base, scaling = self.of_layer(local)
        inv_freq = base ** -(np.arange(0, size, 2, dtype=np.float64) / size)
        return (inv_freq, 1.0) if scaling is None else scaling(inv_freq, base, size)

    def table(self, cfg) -> dict[str, np.ndarray]:
        """What each layer needs, as data: `inv_freq` [L, rotated / 2] and `rope_scale` [L], float32."""
        rows = [self.frequencies(cfg.head_size, cfg.slides(layer)) for layer in range(cfg.layers)]
        return {
            "inv_freq": np.stack([f for f, _ in rows]).astype(np.float32),
            "rope_scale": np.array([s for _, s in rows], np.float32),
        }


def turns(angles_BxTxR, scale=1.0):
    """Cosines and sines [B, T, 1, 2R] as `rotate` takes them, from the angles of R pairs."""
    cos, sin = jnp.cos(angles_BxTxR) * scale, jnp.sin(angles_BxTxR) * scale
    return tuple(jnp.concatenate(halves, -1)[:, :, None] for halves in ([cos, cos], [-sin, sin]))


def rotate(x_BxTxHxK, cos_BxTx1xN, sin_BxTx1xN):
    """Turn the first N of K dimensions of each head: pairs are (i, i + N/2). Computed in float32."""
    N = cos_BxTx1xN.shape[-1]
    x = x_BxTxHxK[..., :N].astype(jnp.float32)
    # The halves are swapped by a reversal, whose gradient is a reversal too; that of slices would be zeros and sums.
    swapped = jnp.flip(x.reshape(*x.shape[:-1], 2, N // 2), -2).reshape(x.shape)
    turned = x * cos_BxTx1xN + swapped * sin_BxTx1xN
    turned = turned.astype(x_BxTxHxK.dtype)
    return turned if x.shape == x_BxTxHxK.shape else jnp.concatenate([turned, x_BxTxHxK[..., N:]], axis=-1)


@dataclass(frozen=True)
class Learned:
    """A learned embedding for each position, added to the token's (GPT-2)."""

    def spec(self, cfg) -> dict:
        return {"positions": ParamSpec((cfg.context, cfg.width), (None, "embed"), Normal(cfg.init_std))}

    def table(self, cfg) -> dict[str, np.ndarray]:
        return {}


@dataclass(frozen=True)
class NoPositions:
    """No positions at all: the causal mask alone tells order (Kazemnejad et al. 2023)."""

    def spec(self, cfg) -> dict:
        return {}

    def table(self, cfg) -> dict[str, np.ndarray]:
        return {}
