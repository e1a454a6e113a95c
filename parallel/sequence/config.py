"""What a run says about rows whose tokens lie on several devices. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from jaxpar.parallel.sequence.choose import Links, Workload, choose


@dataclass(frozen=True)
class SequenceConfig:
    """How attention works on a mesh with a `sequence` axis.

    Attributes:
      attention: ring passes keys and values round, ring_bidirectional half of them each way, tokenring passes queries and
        results (which are more than keys and values where queries are grouped), rsa holds whole rows of weights (as first
        published), ulysses exchanges heads for tokens, hybrid does that between neighbours and a ring between groups;
        auto is the one that waits least for data by the rule of `choose`, from head counts and links (`jaxpar explain`
        says which, and why).
      exchange: how many devices exchange heads for tokens in a hybrid; divides the axis.
      layout: which tokens a device has. zigzag balances causal work; striped does too, with half-masked blocks;
        contiguous does not.
    """

    attention: Literal["ring", "ring_bidirectional", "tokenring", "rsa", "ulysses", "hybrid", "auto"] = "ring"
    exchange: int = 2
    layout: Literal["zigzag", "striped", "contiguous"] = "zigzag"

    def settled(self, work: Workload, links: Links) -> tuple[SequenceConfig, str]:
        """This, with `auto` replaced by the kind that `choose` picks, and the reason in one sentence ("" where a kind is
        named already)."""
        if self.attention != "auto":
            return self, ""
        choice = choose(work, links)
        inner = choice.inner if choice.kind == "hybrid" else self.exchange
        return replace(self, attention=choice.kind, exchange=inner), choice.reason

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
