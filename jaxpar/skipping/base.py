"""What a skipping strategy is: a frozen dataclass that says which layers each microbatch runs. Free of JAX at import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpar.errors import UserError


@dataclass(frozen=True)
class Skipping:
    """A strategy.

    Attributes:
      microbatches: M, groups of a step's rows with a route each: row i belongs to group i mod M. They run one after the
        other.
    """

    name: ClassVar[str] = ""
    """Of the strategy, in messages."""
    reorders: ClassVar[bool] = False
    """Whether layers run in other places than the stack's; else some are left out where they stand."""

    microbatches: int = 1

    def __post_init__(self):
        if self.microbatches < 1:
            raise UserError(f"{self.name}'s microbatches = {self.microbatches} must be at least 1")

    def check(self, layers: int, rows: int, devices: int = 1) -> None:
        """Whether it suits a model and a batch; before anything is traced.

        Args:
          layers: L.
          rows: of a step's gradients (a batch over the parts of an accumulation).
          devices: over which rows lie.

        Raises:
          UserError: numbers that do not fit.
        """
        if rows % (self.microbatches * devices):
            unit = self.microbatches * devices
            raise UserError(
                f"{rows} rows do not divide into {self.name}'s microbatches = {self.microbatches} on each of {devices} "
                f"device{'s' * (devices > 1)}; choose a multiple of {unit} rows, nearest: {max(1, round(rows / unit)) * unit}"
            )

    def route(self, step, key, layers: int) -> Any:
        """The way of each microbatch: a `Route` with leaves [M, ...].

        Args:
          step: int32, updates done so far.
          key: the run's key.
          layers: L.
        """
        raise NotImplementedError

    def gradient_scale(self, layers: int) -> Any:
        """float32 [L], multiplies the gradients of each layer. None: 1."""
        return None

    def kept(self, route: Any, layers: int) -> Any:
        """The share of the layers that the microbatches run: float32."""
        from jaxpar.models.lazy import jnp

        if route.keep is not None:
            return jnp.mean(route.keep.astype(jnp.float32))
        return jnp.float32(route.layers.shape[-1] / layers)
