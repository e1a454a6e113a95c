"""Redundant computation: each stage's machine holds a shadow of the next stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpar.models.spec import LAYERS
from jaxpar.recovery import replicas
from jaxpar.recovery.base import Recovered, Recovery, Stages, array_module, state_bytes

Tree = Any


@dataclass(frozen=True)
class Redundant(Recovery):
    """Bring a lost stage back, bitwise, from the copy that the stage before it holds (the last one, for the first stage).

    Thorpe et al. 2023, "Bamboo" (NSDI): stage i also computes stage i + 1, forward in the pipeline's bubble. Here the copy
    of parameters, moments, counts and averages is refreshed after each step instead of computed twice, which gives the
    same bits; it costs the memory of a second model and moves it once a step. Bamboo's extra forward pass made an
    iteration 1.65 times as long in CheckFree's measurements (table 2). Two adjacent losses are fatal, as there.
    """

    exact: ClassVar[bool] = True
    ends: ClassVar[bool] = True
    copies: ClassVar[str] = "parts"
    least: ClassVar[int] = 2

    def _why_least(self) -> str:
        return "a copy must lie on another stage"

    def recoverable(self, failed_S):
        return failed_S & ~array_module(failed_S).roll(failed_S, 1)

    def _why_not(self) -> str:
        return (
            f"{self.name} keeps a stage's copy on the stage before it (of the first, on the last), which was lost with it; "
            "choose --failures.adjacent thinned, or a composite with a checkpoint behind it"
        )

    def persistent(self, state, stages: Stages) -> Tree:
        return {"copy": replicas.everything(state, stages)}

    def observe(self, rec: Tree, state, norms_S, held, stages: Stages) -> Tree:
        return self.persistent(state, stages)

    def damage(self, rec: Tree, failed_S, stages: Stages) -> Tree:
        # What lies with stage i is the copy of stage i + 1; the first stage's ends lie on the last, the last's before it.
        return {"copy": replicas.damaged(rec["copy"], failed_S[-1], failed_S[-2], stages, failed_S)}

    def recover(self, rec: Tree, state, failed_S, stages: Stages) -> Recovered:
        back_S = self.recoverable(failed_S)
        state = replicas.put_back(state, rec["copy"], back_S, stages)
        return self.found(state, back_S, stages)

    def settle(self, rec: Tree, state, failed_S, recovered_S, stages: Stages) -> Tree:
        return self.persistent(state, stages)

    def moved(self, stages: Stages, state) -> list[float]:
        moved = [state_bytes(state, stages, labels=(LAYERS,)) / stages.count] * stages.count
        moved[0] += replicas.end_bytes(state, "first", stages)
        moved[-1] += replicas.end_bytes(state, "last", stages)
        return moved
