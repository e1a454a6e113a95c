"""Which layers a call runs, as data: left out, in another order, or by chance."""

from __future__ import annotations

from dataclasses import replace

import jax
from flax import struct


@struct.dataclass
class Route:
    """A way through the stack of L layers. Arrays: another way compiles nothing again, but for another length n.

    Attributes:
      layers: int32 [n], the layers that run, in this order. The others are not in the program: they cost nothing, and
        their gradient is zero. None: all L, in order (n = L).
      keep: bool [n], False where a layer is not run after all. A branch (`lax.cond`), which costs nothing where it is
        not taken; under `vmap` it would become a choice between two results, both computed. None: all run.
      scale: float32 [n], multiplies what a layer adds to the state. None: 1.
      exits: float32 [exits + 1], what the loss at each exit and at the last layer weighs in training, where it is not
        what `cfg.exits.loss` says without a step. None: it is.
    """

    layers: jax.Array | None = None
    keep: jax.Array | None = None
    scale: jax.Array | None = None
    exits: jax.Array | None = None

    def part(self, first: int, last: int) -> Route:
        """The same for the layers from `first` to before `last`, of a route in the stack's order."""
        cut = lambda x: None if x is None else x[first:last]
        return replace(self, keep=cut(self.keep), scale=cut(self.scale))
