"""Recovery as configuration: which stages are lost when, and the strategies to choose from. Free of JAX, and of NumPy at import: `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxpar.errors import UserError
from jaxpar.recovery.checkfree import CheckFree
from jaxpar.recovery.checkfree_plus import CheckFreePlus
from jaxpar.recovery.checkpoint_rollback import CheckpointRollback
from jaxpar.recovery.composite import Composite
from jaxpar.recovery.copy_neighbour import CopyNeighbour
from jaxpar.recovery.no_failure import NoFailure
from jaxpar.recovery.random_init import RandomInit
from jaxpar.recovery.redundant import Redundant
from jaxpar.recovery.replica_peer import ReplicaPeer
from jaxpar.recovery.skip_stage import SkipStage
from jaxpar.recovery.snapshot import Snapshot
from jaxpar.recovery.uniform_average import UniformAverage

if TYPE_CHECKING:
    from jaxpar.recovery.failures import FailureTrace

AnyRecovery = (
    NoFailure
    | CheckFree
    | CheckFreePlus
    | UniformAverage
    | CopyNeighbour
    | RandomInit
    | SkipStage
    | Redundant
    | ReplicaPeer
    | Snapshot
    | CheckpointRollback
    | Composite
)
Events = tuple[tuple[int, int], ...]


def parse_events(text: str) -> Events:
    """`"10:1,20:3"` as ((10, 1), (20, 3)): stage 1 in step 10, stage 3 in step 20.

    Raises:
      UserError: a part that is not step:stage.
    """
    events = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        step, colon, stage = (p.strip() for p in part.partition(":"))
        if not (colon and step.isdecimal() and stage.isdecimal()):
            raise UserError(f"failures {text!r}: {part!r} is not step:stage; write for instance 10:1,20:3")
        events.append((int(step), int(stage)))
    return tuple(events)


@dataclass(frozen=True)
class FailureConfig:
    """Which stages are lost when. Steps count from 1, as the progress line does, and stages from 0: a stage that is lost
    in step t is lost before the gradients of step t. Where the strategy goes back and steps are done again, "step" means
    the number of steps done so far, those done again included: time goes on, whatever the strategy does.

    What `failure_rate`, `rates`, `at` and `file` give is put together.

    Attributes:
      failure_rate: the probability that a stage is lost in a step, for each stage alike and independently.
      rates: a probability for each stage instead.
      fallible: which stages `failure_rate` is for: all, or all but the first and the last.
      adjacent: neighbours drawn in the same step both fail (kept), or only the lower one of two neighbours (thinned).
      at: given losses, as step:stage,step:stage.
      file: a CSV file with one "step,stage" a line. None: none.
      stages: how many stages the layers are divided into. None: the mesh's stages, or where there is only one a stage for
        each layer.
      seed: of the draws. The same seed gives the same losses with every strategy, and on every machine.
    """

    failure_rate: float = 0.0
    rates: tuple[float, ...] = ()
    fallible: Literal["all", "middle"] = "all"
    adjacent: Literal["kept", "thinned"] = "kept"
    at: Events = field(default=(), metadata={"parse": parse_events})
    file: str | None = None
    stages: int | None = None
    seed: int = 0

    def __post_init__(self):
        for name, rate in [("failure_rate", self.failure_rate), *(("rates", r) for r in self.rates)]:
            if not 0 <= rate <= 1:
                raise UserError(f"failures.{name} = {rate} is a probability a step and stage, and outside [0, 1]")
        if self.rates and self.failure_rate:
            raise UserError(
                f"failures.failure_rate = {self.failure_rate} and failures.rates = {self.rates} are both given; give one"
            )
        if self.stages is not None and self.stages < 1:
            raise UserError(f"failures.stages must be at least 1, got {self.stages}")
        if self.seed < 0:
            raise UserError(f"failures.seed must be at least 0, got {self.seed}")

    @property
    def none(self) -> bool:
        """Whether nothing is ever lost."""
        return not (self.failure_rate or any(self.rates) or self.at or self.file)

    def count(self, layers: int, mesh_stages: int) -> int:
        """How many stages there are.

        Raises:
          UserError: they do not divide the layers.
        """
        count = self.stages or (mesh_stages if mesh_stages > 1 else layers)
        if layers % count:
            where = "failures.stages" if self.stages else "the mesh axis stage"
            near = min((d for d in range(1, layers + 1) if layers % d == 0), key=lambda d: abs(d - count))
            raise UserError(
                f"{where} = {count} does not divide model.layers = {layers}, and stages that stand in for each other must "
                f"be equal; nearest that works: failures.stages {near}"
            )
        return count

    def trace(self, stages: int, steps: int) -> FailureTrace:
        """The losses of a run of `steps` steps with `stages` stages.

        Raises:
          UserError: a stage that does not exist, a step beyond the run, another number of rates than stages, a file that
            is missing or torn.
        """
        from jaxpar.recovery.failures import FailureTrace, read_csv

        if self.rates and len(self.rates) != stages:
            raise UserError(
                f"failures.rates has {len(self.rates)} rates, but there are {stages} stages; give one for each"
            )
        rates = self.rates or (self.failure_rate,) * stages
        if self.fallible == "middle" and not self.rates:
            rates = tuple(rate if 0 < s < stages - 1 else 0.0 for s, rate in enumerate(rates))
        events = [("failures.at", event) for event in self.at]
        if self.file is not None:
            events += [(self.file, event) for event in read_csv(Path(self.file))]
        for where, (step, stage) in events:
            if stage >= stages:
                raise UserError(
                    f"{where} loses stage {stage} in step {step}, but there are {stages} stages: 0 to {stages - 1}"
                )
            if not 1 <= step <= steps:
                raise UserError(
                    f"{where} loses stage {stage} in step {step}, but the run has the steps 1 to {steps}; choose one of "
                    "them, or train longer"
                )
        listed = frozenset(event for _, event in events)
        return FailureTrace(stages, rates, self.seed, listed, thin=self.adjacent == "thinned")
