"""What a run says about rows whose tokens lie on several devices. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SequenceConfig:
    """How attention works on a mesh with a `sequence` axis.

    Attributes:
      attention: ring passes keys and values round, ring_bidirectional half of them each way, tokenring passes queries and
        results (which are more than keys and values where queries are grouped), rsa holds whole rows of weights (as first
        published), ulysses exchanges heads for tokens, hybrid does that between neighbours and a ring between groups.
      exchange: how many devices exchange heads for tokens in a hybrid; divides the axis.
      layout: which tokens a device has. zigzag balances causal work; striped does too, with half-masked blocks;
        contiguous does not.
    """

    attention: Literal["ring", "ring_bidirectional", "tokenring", "rsa", "ulysses", "hybrid"] = "ring"
    exchange: int = 2
    layout: Literal["zigzag", "striped", "contiguous"] = "zigzag"

    def exchanging(self, devices: int) -> int:
        """Of so many devices along the axis, how many exchange heads with each other.

        Raises:
          ValueError: a hybrid's groups that do not divide the axis.
        """
        match self.attention:
            case "ulysses":
                return devices
            case "hybrid" if devices > 1:
                if self.exchange < 1 or devices % self.exchange:
                    near = min(
                        (d for d in range(1, devices + 1) if devices % d == 0), key=lambda d: abs(d - self.exchange)
                    )
                    raise ValueError(
                        f"sequence.exchange = {self.exchange} devices that exchange heads do not divide the mesh axis "
                        f"sequence({devices}); nearest that works: {near}"
                    )
                return self.exchange
            case _:
                return 1
