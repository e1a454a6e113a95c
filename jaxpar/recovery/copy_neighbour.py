"""A copy of one neighbour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpar.models.lazy import jnp
from jaxpar.recovery.base import Stages, array_module
from jaxpar.recovery.checkfree import Neighbours


@dataclass(frozen=True)
class CopyNeighbour(Neighbours):
    """Make a lost stage a copy of a neighbour; at the end that has no such neighbour, of the other one (CheckFree's
    "naive").

    Attributes:
      side: previous: the stage before, as in CheckFree's code; next: the stage after.
    """

    side: Literal["previous", "next"] = "previous"

    least: ClassVar[int] = 2

    def _why_least(self) -> str:
        return "a stage alone has no neighbour to copy"

    def recoverable(self, failed_S):
        np = array_module(failed_S)
        if self.side == "previous":
            source = np.concatenate([failed_S[1:2], failed_S[:-1]])
        else:
            source = np.concatenate([failed_S[1:], failed_S[-2:-1]])
        return failed_S & ~source

    def _why_not(self) -> str:
        return (
            f"{self.name} copies the {self.side} stage, which was lost with it; choose a composite or thinned failures"
        )

    def shares(self, rec: Any, stages: Stages):
        share_S = jnp.full(stages.count, float(self.side == "previous"), jnp.float32)
        return share_S.at[0].set(0.0).at[-1].set(1.0)

    def moved(self, stages: Stages, state) -> list[float]:
        return [float(stages.stage_bytes())] * stages.count
