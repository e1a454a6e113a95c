"""What a run says about rows whose tokens lie on several devices. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SequenceConfig:
    """How attention works on a mesh with a `sequence` axis.

    Attributes:
      attention: ring passes keys and values round, ring_bidirectional half of them each way, tokenring passes queries and
        results, rsa holds whole rows of weights (as first published), ulysses exchanges heads for tokens.
      layout: which tokens a device has. zigzag balances causal work; striped does too, with half-masked blocks;
        contiguous does not.
    """

    attention: Literal["ring", "ring_bidirectional", "tokenring", "rsa", "ulysses"] = "ring"
    layout: Literal["zigzag", "striped", "contiguous"] = "zigzag"
