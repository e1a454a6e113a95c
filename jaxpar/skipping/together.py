"""What a run skips, with both ends swapped besides: CheckFree+'s order under LayerDrop and its kind. Free of JAX at import."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from jaxpar.errors import UserError
from jaxpar.models.lazy import jnp
from jaxpar.skipping.base import Skipping
from jaxpar.skipping.chance import Chance, LayerDrop
from jaxpar.skipping.paths import Fixed, SwapEnds


@dataclass(frozen=True)
class Swapped(Skipping):
    """Layers left out by chance, and every second microbatch in swapped order. What is drawn belongs to a layer, wherever
    in the order it stands.

    Attributes:
      chance: which layers are left out; its microbatches, an even number of them.
      order: in which order stages run.
    """

    name: ClassVar[str] = "swap-ends"
    reorders: ClassVar[bool] = True

    microbatches: int = 2
    chance: Chance = LayerDrop(2)
    order: SwapEnds = SwapEnds(2)

    def check(self, layers: int, rows: int, devices: int = 1) -> None:
        self.order.check(layers, rows, devices)

    def route(self, step, key, layers: int) -> Any:
        order_Mxn = self.order.route(step, key, layers).layers
        drawn = self.chance.route(step, key, layers)
        by_position = lambda x: None if x is None else jnp.take_along_axis(x, order_Mxn, axis=1)
        return drawn.replace(layers=order_Mxn, keep=by_position(drawn.keep), scale=by_position(drawn.scale))

    def gradient_scale(self, layers: int) -> Any:
        return self.chance.gradient_scale(layers)


def with_swaps(skipping: Skipping | None, stages: int, instead: str) -> Skipping:
    """A strategy in whose routes every second microbatch swaps the first two and the last two stages.

    Args:
      skipping: what is skipped already. None: nothing.
      stages: S.
      instead: what else could be done, for the message.

    Raises:
      UserError: paths that have an order of their own.
    """
    if skipping is None:
        return SwapEnds(2, stages=stages)
    if isinstance(skipping, Fixed):
        if isinstance(skipping, SwapEnds) and skipping.stages == stages:
            return skipping
        raise UserError(
            f"{skipping.name} with stages = {skipping.stages} has an order of its own, and the recovery strategy is meant for "
            f"{stages} stages of which both ends are swapped; skip by chance, {instead}"
        )
    m = math.lcm(2, skipping.microbatches)
    return Swapped(m, replace(skipping, microbatches=m), SwapEnds(m, stages=stages))
