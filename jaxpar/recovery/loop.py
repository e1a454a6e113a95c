"""The loop's side of recovery: what a run loses before a step, and the program or the checkpoint that mends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.ahead import abstract_batch
from jaxpar.program import Program
from jaxpar.recovery.base import Recovery
from jaxpar.recovery.failures import FailureTrace
from jaxpar.recovery.plan import named
from jaxpar.recovery.transform import RECOVERY, recovery_program
from jaxpar.step import Batch, Metrics, Step, TrainState

Repair = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def lower_repair(
    step: Step, program: Program, state: TrainState, rows: int, length: int, stages: int
) -> jax.stages.Lowered:
    """`recovery_program` traced for these shapes; arguments as for `jaxpar.ahead.lower`. Steps without failures are
    compiled without it."""
    places = jax.tree.map(lambda x: x.sharding, state)
    whole = NamedSharding(program.mesh, PartitionSpec())
    failed = jax.ShapeDtypeStruct((stages,), bool, sharding=whole)
    repair = jax.jit(recovery_program(step), donate_argnums=0, out_shardings=(places, whole))
    return repair.lower(state, abstract_batch(rows, length, program.batch_sharding), failed)


@dataclass
class Losses:
    """What a run loses, and how it goes on. A step in which nothing is lost costs one draw on the host.

    Attributes:
      strategy: how lost stages come back.
      trace: which are lost when; iterations count those that are done again.
      repair: from `lower_repair`, compiled.
      again: the state of the newest checkpoint, or of the beginning.
      mesh: where the state lives.
      replayed: iterations that were lost or done again so far; the state's slot says the same.
    """

    strategy: Recovery
    trace: FailureTrace
    repair: Repair
    again: Callable[[], TrainState]
    mesh: jax.sharding.Mesh
    replayed: int = 0

    def before(self, step: int) -> np.ndarray:
        """bool [S]: what is lost when `step` steps are done, before the next one's gradients."""
        return self.trace.lost(step + self.replayed + 1)

    def mend(self, state: TrainState, batch: Batch, step: int, failed_S: np.ndarray) -> tuple[TrainState, int, Metrics]:
        """The mended state, the steps that are done in it, and what recovery tells. The old state is gone.

        The device is waited for only where the run goes back.
        """
        match self.strategy.rollback(failed_S):
            case "disk":
                return self._from_disk(state, step, failed_S)
            case "memory":
                state, metrics = self.repair(state, batch, self._everywhere(failed_S))
                self.replayed = int(state.slots[RECOVERY]["replayed"])
                return state, int(state.step), metrics
            case _:
                state, metrics = self.repair(state, batch, self._everywhere(failed_S))
                return state, step, metrics

    def _from_disk(self, state: TrainState, step: int, failed_S: np.ndarray) -> tuple[TrainState, int, Metrics]:
        failures = int(state.slots[RECOVERY]["failures"]) + int(failed_S.sum())
        jax.tree.map(lambda x: x.delete(), state)  # all stages go back: nothing of it is used
        state = self.again()
        to = int(state.step)
        self.replayed += step - to + 1
        slot = state.slots[RECOVERY]
        put = lambda value, like: jax.device_put(np.int32(value), like.sharding)
        counts = {"failures": put(failures, slot["failures"]), "replayed": put(self.replayed, slot["replayed"])}
        lost = float(failed_S.sum())
        told = {"lost": lost, "unrecovered": 0.0, "exact": lost, "steps_lost": float(step - to), "relative_error": 0.0}
        told["bytes_moved"] = float(sum(x.nbytes for x in jax.tree.leaves(state)))
        state = state.with_slot(RECOVERY, {**slot, **counts})
        return state, to, {f"{RECOVERY}/{name}": value for name, value in told.items()}

    def _everywhere(self, failed_S: np.ndarray) -> jax.Array:
        return jax.device_put(failed_S, NamedSharding(self.mesh, PartitionSpec()))

    def tell(self, step: int, failed_S: np.ndarray, values: dict[str, float]) -> str:
        """A line about a recovery: before step `step`."""
        got = {name.removeprefix(f"{RECOVERY}/"): value for name, value in values.items()}
        if where := self.strategy.rollback(failed_S):
            how = f"back to step {step - 1 - got['steps_lost']:.0f} from {where}"
        elif got["exact"] == got["lost"]:
            how = "brought back bitwise"
        else:
            how = f"made anew, {100 * got['relative_error']:.0f} % off"
        moved = f"{got['bytes_moved'] / 1e6:.2f} MB moved"
        return f"step {step}: lost {named(failed_S)} of {self.trace.stages}: {how} by {self.strategy.name}, {moved}"


def replayed(state: Any) -> int:
    """What a restored state says."""
    return int(state.slots[RECOVERY]["replayed"])
