"""What a feed-forward layer is asked. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class FeedForwardLayer:
    """The interface. `params` are this layer's own entries, sliced from the stack.

    Attributes:
      routed: whether what a token gets depends on more than its own vector: then `routed_apply` is called.
    """

    routed: ClassVar[bool] = False

    def check(self, cfg) -> None:
        """Raises ValueError where this layer cannot be combined with the model; `cfg` has its derived sizes."""

    def spec(self, cfg) -> dict:
        """Parameters for one layer (stacked by the caller)."""
        raise NotImplementedError

    def apply(self, cfg, params: dict, x_BxSxD, ops) -> Any:
        """[B, S, D] -> [B, S, D]."""
        raise NotImplementedError

    def flops(self, cfg) -> int:
        """Forward matmul FLOPs for one token of one layer."""
        raise NotImplementedError

    def tally(self, cfg, ctx, rows: int) -> Any:
        """What is counted from layer to layer, a tree of arrays [rows]; None: nothing."""
        return None

    def penalty(self, cfg, tally, ctx, weights_BxT) -> Any:
        """What training adds to the sum of token losses for what was counted. Where a row's tokens lie over devices: this
        device's share of it."""
        raise NotImplementedError
