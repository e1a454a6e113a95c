"""Snapshots in memory, and going back to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpar.errors import UserError
from jaxpar.models.lazy import jax
from jaxpar.models.spec import LAYERS
from jaxpar.recovery import lost
from jaxpar.recovery.base import Recovered, Recovery, Rollback, Stages, copied, state_bytes

Tree = Any


@dataclass(frozen=True)
class Snapshot(Recovery):
    """Keep a copy of the whole state in memory every few steps, and go back to it, all stages together, when one is lost.

    The copy is assumed to lie where a failing stage does not take it along (the memory of other machines, as in Wang et
    al. 2023, "Gemini", SOSP). The step and the position in the data go back too: the same batches are done again, and the
    trajectory is bitwise the one without failures. Whoever calls a step by hand must therefore recover first
    (`jaxpar.recovery.transform.recovery_program`) and then take the batch at `state.data_position`; the loop does.

    Attributes:
      every: steps between snapshots.
    """

    every: int = 10

    exact: ClassVar[bool] = True
    ends: ClassVar[bool] = True
    copies: ClassVar[str] = "state"

    def __post_init__(self):
        if self.every < 1:
            raise UserError(f"{self.name}'s every = {self.every} steps must be at least 1")

    def recoverable(self, failed_S):
        return failed_S

    def rollback(self, failed_S) -> Rollback | None:
        return "memory"

    def back_to(self, failed_S, step: int, saved: int | None) -> int:
        return step // self.every * self.every

    def persistent(self, state, stages: Stages) -> Tree:
        return {"snapshot": copied(_whole(state))}

    def begin(self, rec: Tree, state, stages: Stages) -> Tree:
        # At the start of the next step, where the position in the data has moved on too.
        take = lambda: _whole(state)
        due = (state.step % self.every == 0) & (state.step != rec["snapshot"]["step"])
        return {"snapshot": jax.lax.cond(due, take, lambda: rec["snapshot"])}

    def recover(self, rec: Tree, state, failed_S, stages: Stages) -> Recovered:
        old = rec["snapshot"]
        if jax.tree.structure(old["slots"]) != jax.tree.structure(state.slots):
            raise UserError("a snapshot must see every slot: put recovering behind (outside) all other transforms")
        # The run's key never changes, and no stage holds it alone.
        return self.found(state.replace(**old), failed_S, stages, steps_lost=state.step - old["step"], rolled=True)

    def moved(self, stages: Stages, state) -> list[float]:
        # Every stage goes back, from wherever its copy lies.
        return [float(state_bytes(state, stages, labels=(LAYERS, "first", "last")))] * stages.count


def _whole(state) -> dict[str, Tree]:
    return {**lost.parts(state), "step": state.step, "data_position": state.data_position}
