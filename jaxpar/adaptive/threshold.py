"""How sure an exit must be. Free of JAX at import."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.errors import UserError
from jaxpar.models.lazy import jnp


@dataclass(frozen=True)
class Threshold:
    """A token leaves where the exit's confidence is above it. It may fall from token to token, because what later tokens lose
    is passed on to fewer others (CALM, Schuster et al. 2022, §4, and as in their code):

        λ_t = value · ((1 - decay) + decay · exp(-temperature · t / T))

    Attributes:
      value: λ, from 0 (nearly always) to 1 (never).
      decay: share of it that decays. 0: it is constant. 0.1 in CALM.
      temperature: how fast. 4 in CALM.
    """

    value: float = 0.9
    decay: float = 0.0
    temperature: float = 4.0

    def __post_init__(self):
        if not 0 <= self.value <= 1:
            fires = "never" if self.value > 1 else "always"
            raise UserError(
                f"threshold.value = {self.value} would {fires} fire: confidences are between 0 and 1; choose one between, for "
                "example 0.9"
            )
        if not 0 <= self.decay <= 1:
            raise UserError(f"threshold.decay = {self.decay} is a share of the threshold, between 0 and 1")
        if not 0 < self.temperature < float("inf"):
            raise UserError(f"threshold.temperature = {self.temperature} must be a finite number above 0")

    def at(self, t, most):
        """float32: λ_t for the t-th new token of at most T = `most`."""
        return self.scaled(self.value, t, most)

    def scaled(self, value, t, most):
        """The same for another λ, which may be traced."""
        share = jnp.asarray(t, jnp.float32) / jnp.asarray(most, jnp.float32)
        return value * ((1.0 - self.decay) + self.decay * jnp.exp(-self.temperature * share))
