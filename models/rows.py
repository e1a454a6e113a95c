"""Where the tokens of a row lie: here, or over the devices of a sequence axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rows:
    """All here, one after the other. Where they lie over devices, an object with the same methods stands in
    (`jaxpar.parallel.sequence.rows.SpreadRows`), and `Context.places` says which of them a device has.

    What looks at a token's neighbours in its row works on *runs*: consecutive tokens of a row, stored one after the other on
    one device, all runs of one length.
    """

    @property
    def spread(self) -> bool:
        """Whether a device has a part of each row."""
        return False

    def runs(self, tokens: int, shards: int) -> tuple[int, Any]:
        """The length of a run, and which stored run is the first of a row, the second, ... (None: they lie in this order).

        Args:
          tokens: at hand, T.
          shards: of so many equal parts that T is cut into, a run lies within one.
        """
        return tokens // shards, None

    def gather(self, x):
        """[B, n, ...] of each device -> [B, devices · n, ...], as they are stored."""
        return x

    def total(self, x):
        """A sum over the tokens at hand -> over those of all devices."""
        return x
