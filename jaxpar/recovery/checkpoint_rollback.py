"""Going back to the newest checkpoint on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxpar.recovery.base import Recovery, Rollback


@dataclass(frozen=True)
class CheckpointRollback(Recovery):
    """Go back to the run's newest checkpoint (`checkpoint_every`), all stages together, and do its batches again.

    Without a checkpoint the run starts over. Reading files is the loop's business: in the program the lost stages stay
    destroyed, and `Report.recovered` says so. The trajectory is bitwise the one without failures, and takes longer: with a
    probability P of losing anything in a step and k steps between checkpoints, ((1-P)^-k - 1)/(kP) times as many steps
    (tests/recovery/test_failures.py counts them).
    """

    exact: ClassVar[bool] = True
    ends: ClassVar[bool] = True

    def can_recover(self, failed_S):
        return failed_S.any() | True

    def rollback(self, failed_S) -> Rollback | None:
        return "disk"

    def back_to(self, failed_S, step: int, saved: int | None) -> int:
        return 0 if saved is None else step // saved * saved
