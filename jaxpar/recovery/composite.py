"""One strategy behind another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxpar.errors import UserError
from jaxpar.models.lazy import jax
from jaxpar.recovery.base import Recovered, Recovery, Rollback, Stages
from jaxpar.recovery.checkfree import CheckFree
from jaxpar.recovery.checkfree_plus import CheckFreePlus
from jaxpar.recovery.checkpoint_rollback import CheckpointRollback
from jaxpar.recovery.copy_neighbour import CopyNeighbour
from jaxpar.recovery.random_init import RandomInit
from jaxpar.recovery.redundant import Redundant
from jaxpar.recovery.replica_peer import ReplicaPeer
from jaxpar.recovery.skip_stage import SkipStage
from jaxpar.recovery.snapshot import Snapshot
from jaxpar.recovery.uniform_average import UniformAverage

Tree = Any
First = CheckFree | CheckFreePlus | UniformAverage | CopyNeighbour | RandomInit | SkipStage | Redundant
Then = CheckpointRollback | Snapshot | RandomInit | SkipStage | CopyNeighbour | CheckFree | CheckFreePlus | Redundant


@dataclass(frozen=True)
class Composite(Recovery):
    """Recover with the first strategy what it can recover, and fall through to the second with what it cannot.

    All losses of a step go to one of the two. In Python `then` may be another composite. Embedding and head are lost with
    their stages only where both can bring them back.

    Attributes:
      first: is asked first.
      then: recovers what `first` cannot.
    """

    first: First = CheckFree()
    then: Then = CheckpointRollback()

    def __post_init__(self):
        if any(isinstance(member, ReplicaPeer) for member in self._members.values()):
            raise UserError(
                "a composite cannot hold replica-peer: its failures leave a living replica, and nothing falls through"
            )

    @property
    def _members(self) -> dict[str, Recovery]:
        return {"first": self.first, "then": self.then}

    @property
    def ends(self) -> bool:
        return self.first.ends and self.then.ends

    @property
    def swaps(self) -> bool:
        return self.first.swaps or self.then.swaps

    @property
    def copies(self) -> str:
        return max((m.copies for m in self._members.values()), key=("", "parts", "state").index)

    @property
    def needs_norms(self) -> bool:
        return self.first.needs_norms or self.then.needs_norms

    @property
    def norm_point(self) -> str:
        """Of the first member that asks for norms."""
        return next((m.norm_point for m in self._members.values() if m.needs_norms), "pre-clip")

    def check(self, stages: int) -> None:
        for member in self._members.values():
            member.check(stages)

    def recoverable(self, failed_S):
        first = self.first.recoverable(failed_S)
        return first | self.then.recoverable(failed_S)

    def can_recover(self, failed_S):
        return self.first.can_recover(failed_S) | self.then.can_recover(failed_S)

    def refuses(self, failed_S) -> str:
        one, other = self.first.refuses(failed_S), self.then.refuses(failed_S)
        return f"{one}; and then: {other}" if one and other else ""

    def _chosen(self, failed_S) -> Recovery:
        return self.first if self.first.can_recover(failed_S) else self.then

    def rollback(self, failed_S) -> Rollback | None:
        return self._chosen(failed_S).rollback(failed_S)

    def back_to(self, failed_S, step: int, saved: int | None) -> int:
        return self._chosen(failed_S).back_to(failed_S, step, saved)

    def persistent(self, state, stages: Stages) -> Tree:
        return {name: member.persistent(state, stages) for name, member in self._members.items()}

    def begin(self, rec: Tree, state, stages: Stages) -> Tree:
        return {name: member.begin(rec[name], state, stages) for name, member in self._members.items()}

    def observe(self, rec: Tree, state, norms_S, held, stages: Stages) -> Tree:
        return {name: m.observe(rec[name], state, norms_S, held, stages) for name, m in self._members.items()}

    def rate_scale(self, rec: Tree):
        scales = [m.rate_scale(rec[name]) for name, m in self._members.items()]
        scales = [scale for scale in scales if scale is not None]
        return None if not scales else scales[0] if len(scales) == 1 else scales[0] * scales[1]

    def damage(self, rec: Tree, failed_S, stages: Stages) -> Tree:
        return {name: member.damage(rec[name], failed_S, stages) for name, member in self._members.items()}

    def recover(self, rec: Tree, state, failed_S, stages: Stages) -> Recovered:
        return jax.lax.cond(
            self.first.can_recover(failed_S),
            lambda: self.first.recover(rec["first"], state, failed_S, stages),
            lambda: self.then.recover(rec["then"], state, failed_S, stages),
        )

    def settle(self, rec: Tree, state, failed_S, recovered_S, stages: Stages) -> Tree:
        mine = self.first.can_recover(failed_S)
        by = {"first": recovered_S & mine, "then": recovered_S & ~mine}
        return {name: m.settle(rec[name], state, failed_S, by[name], stages) for name, m in self._members.items()}
