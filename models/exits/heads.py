"""What stands between the stream at an exit and the output projection, which is the model's own. Free of JAX at import."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.lazy import jax
from jaxpar.models.spec import Constant, Normal, ParamSpec


@dataclass(frozen=True)
class Shared:
    """The last layer's norm: an exit has no parameters (CALM, Schuster et al. 2022, §3.2; LayerSkip, Elhoushi et al. 2024,
    §4.1.2)."""

    def spec(self, cfg) -> dict:
        return {}

    def flops(self, cfg) -> int:
        """Forward matmul FLOPs for a token, without the output projection."""
        return 0

    def normed(self, cfg, head: dict, own, x_BxTxD, matmul):
        """The stream, [B, T, D], as the output projection is to see it.

        Args:
          head: `params["head"]` of the model.
          own: this exit's parameters.
          matmul: as in `Ops`.
        """
        return cfg.norm(head["norm"], x_BxTxD)


@dataclass(frozen=True)
class OwnNorm(Shared):
    """A norm of each exit's own (EE-LLM, Chen et al. 2023, §2.1, with a shared output projection)."""

    def spec(self, cfg) -> dict:
        return {"norm": cfg.norm.spec(cfg.width)}

    def normed(self, cfg, head: dict, own, x_BxTxD, matmul):
        return cfg.norm(own["norm"], x_BxTxD)


@dataclass(frozen=True)
class Adapter(OwnNorm):
    """A bottleneck, `x + gelu(x·down)·up`, and a norm, both of each exit's own (DEED, Tang et al. 2023, §3.2, whose modules
    adapt what shallow layers give to the shared head). `up` starts at zero: the exit begins as `OwnNorm`.

    Attributes:
      size: inner size.
    """

    size: int = 32

    def __post_init__(self):
        if self.size < 1:
            raise ValueError(f"model.exits.head.size = {self.size} must be at least 1")

    def spec(self, cfg) -> dict:
        down = ParamSpec((cfg.width, self.size), ("embed", None), Normal(cfg.init_std))
        up = ParamSpec((self.size, cfg.width), (None, "embed"), Constant(0.0))
        return {"down": {"kernel": down}, "up": {"kernel": up}, **super().spec(cfg)}

    def flops(self, cfg) -> int:
        return 2 * 2 * cfg.width * self.size

    def normed(self, cfg, head: dict, own, x_BxTxD, matmul):
        inner = jax.nn.gelu(matmul(x_BxTxD, own["down"]["kernel"]))
        return super().normed(cfg, head, own, x_BxTxD + matmul(inner, own["up"]["kernel"]), matmul)
