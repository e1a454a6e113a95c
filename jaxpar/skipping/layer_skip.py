"""The layer dropout of LayerSkip. Free of JAX at import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from jaxpar.errors import UserError
from jaxpar.models.lazy import jnp
from jaxpar.skipping.chance import Chance, _rate


@dataclass(frozen=True)
class LayerSkipDropout(Chance):
    """Later layers are left out much more often than early ones, so that exits in front of them learn to do without
    (Elhoushi et al. 2024, "LayerSkip", §4.1.1): layer l of 0 ... L-1 in step t of T with probability

        rate · S(t) · (exp(l·ln 2 / (L-1)) - 1),    S(t) = exp(t·ln 2 / (T-1)) - 1

    The paper draws for each sample; here a microbatch's rows are drawn together, so that a layer that is left out costs
    nothing. Nothing is scaled.

    Attributes:
      rate: p_max, of the last layer. 0.1 to 0.2 in the paper.
      ramp: T of S, with which they train from scratch. 0: S is 1, with which they go on from a trained model.
    """

    name: ClassVar[str] = "layer-skip-dropout"

    rate: float = 0.1
    ramp: int = 0

    def __post_init__(self):
        super().__post_init__()
        _rate(self.name, "rate", self.rate)
        if self.ramp < 0 or self.ramp == 1:
            raise UserError(f"{self.name}'s ramp = {self.ramp} steps must be 0 (none) or at least 2")

    def probabilities(self, step, layers: int):
        rise = lambda share: jnp.exp(share * math.log(2)) - 1.0
        depth_L = rise(jnp.arange(layers, dtype=jnp.float32) / max(layers - 1, 1))
        reached = rise(jnp.minimum(step / (self.ramp - 1), 1.0)) if self.ramp else 1.0
        return 1.0 - self.rate * reached * depth_L
