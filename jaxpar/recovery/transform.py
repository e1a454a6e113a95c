"""Recovery as a step transform: what `control.failed` says is destroyed and mended before the step's gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxpar.errors import UserError
from jaxpar.models.spec import LAYERS
from jaxpar.parallel.rules import shardings
from jaxpar.recovery.base import Recovered, Recovery, Report, Stages
from jaxpar.recovery.replica_peer import ReplicaPeer
from jaxpar.state import state_specs
from jaxpar.step import Batch, Control, Metrics, Step, StepTransform, TrainState

RECOVERY = "recovery"


def recovering(strategy: Recovery, stages: Stages) -> StepTransform:
    """Destroy the stages of `control.failed` (bool [S]) at the start of a step, and mend the state.

    Without `control.failed` the step has no trace of it but what the strategy observes (CheckFree: S norms) and the
    learning rates that it raised. Failures are data: no step compiles again.

    Put it outside all other transforms, so that what it keeps is what they left; CheckFree's `norm_point` post-clip is the
    place inside clipping (see `placed`).

    Slot: {failures, replayed: int32, of: what the strategy keeps}: stages lost so far, and iterations that were lost or
    done again: the trace of failures is read at step + replayed + 1. Metrics: `recovery/failures` (so far), `/replayed`;
    of a step with `control.failed`: `/lost`, `/unrecovered`, `/exact`, `/steps_lost`, `/bytes_moved`, `/relative_error` (the
    largest of a stage).

    Raises:
      UserError: too few stages, a replica that has no peer; when traced, another number of stages than `control.failed` has.
    """
    strategy.check(stages.count)
    if isinstance(strategy, ReplicaPeer):
        strategy.check_mesh(stages)

    def transform(step: Step) -> Step:
        here = replace(stages, init=lambda params: step.init(params, jax.random.key(0)))

        def init(params, key):
            state = step.init(params, key)
            zero = lambda: jnp.zeros((), jnp.int32)
            kept = strategy.persistent(state, here)
            return state.add_slot(RECOVERY, {"failures": zero(), "replayed": zero(), "of": kept})

        def prepare(state: TrainState, batch: Batch, control: Control) -> tuple[TrainState, Metrics]:
            state, metrics = step.prepare(state, batch, control)
            bare, slot = _apart(state)
            state = state.with_slot(RECOVERY, {**slot, "of": strategy.begin(slot["of"], bare, here)})
            if control.failed is None:
                return state, metrics
            if control.failed.shape != (stages.count,):
                raise UserError(
                    f"control.failed has the shape {control.failed.shape}, but there are {stages.count} stages"
                )
            # Replicated: devices that took different branches would wait for each other's collectives for ever.
            failed_S = _everywhere(control.failed, here)
            state, report = jax.lax.cond(
                jnp.any(failed_S),
                lambda: repair(strategy, here, state, failed_S),
                lambda: (state, _nothing(stages.count)),
            )
            return state, {**metrics, **_metrics(report)}

        def apply(state, gradients, control):
            rec = state.slots[RECOVERY]["of"]
            norms_S = here.norms(gradients.mean()[LAYERS]) if strategy.needs_norms else None
            scale_S = strategy.rate_scale(rec)
            if scale_S is not None:
                control = Control() if control is None else control
                given, own = control.learning_rate_scale, here.spread(scale_S)
                control = control.replace(learning_rate_scale=own if given is None else given * own)
            new, metrics = step.apply(state, gradients, control)
            bare, slot = _apart(new)
            kept = strategy.observe(slot["of"], bare, norms_S, _held(metrics), here)
            new = new.with_slot(RECOVERY, {**slot, "of": kept})
            counts = {f"{RECOVERY}/{name}": slot[name].astype(jnp.float32) for name in ("failures", "replayed")}
            return new, {**metrics, **counts}

        return replace(step, init=init, prepare=prepare, apply=apply)

    return transform


def repair(strategy: Recovery, stages: Stages, state: TrainState, failed_S) -> tuple[TrainState, Report]:
    """Destroy stages and mend the state, with a `Report` of it. For a state of a step with `recovering`."""
    bare, slot = _apart(state)
    truth = bare.params[LAYERS]
    rec = strategy.damage(slot["of"], failed_S, stages)
    found: Recovered = strategy.recover(rec, strategy.destroy(bare, failed_S, stages), failed_S, stages)
    bare = _placed(found.state, stages)
    rec = strategy.settle(rec, bare, failed_S, found.recovered, stages)
    slot = {
        "failures": slot["failures"] + jnp.sum(failed_S),
        "replayed": slot["replayed"] + jnp.where(found.rolled, found.steps_lost + 1, 0),
        "of": rec,
    }
    distance = stages.norms(jax.tree.map(lambda a, b: a.astype(jnp.float32) - b, bare.params[LAYERS], truth))
    size = jnp.maximum(stages.norms(truth), jnp.finfo(jnp.float32).tiny)
    error_S = jnp.where(failed_S & ~found.rolled, distance / size, 0.0)
    report = Report(failed_S, found.recovered, found.exact, found.steps_lost, found.bytes_moved, error_S)
    return bare.with_slot(RECOVERY, slot), report


def recovery_program(step: Step) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """(state, batch, failed bool [S]) -> (state, metrics): the recovery alone, called where something was lost.

    The loop's way: steps without failures are compiled without recovery, and a strategy that goes back can be given the
    batch that its state asks for. (The batch is there for other transforms' `prepare`.)
    """
    return lambda state, batch, failed_S: step.prepare(state, batch, Control(failed=failed_S))


def placed(transforms: tuple[StepTransform, ...], strategy: Recovery, stages: Stages) -> tuple[StepTransform, ...]:
    """A chain's transforms with recovery where the strategy wants it: outside all, or for post-clip norms inside all.

    Raises:
      UserError: inside all others it would not see what it must copy; and as `recovering`.
    """
    inside = getattr(strategy, "norm_point", "pre-clip") == "post-clip"
    if inside and (strategy.copies == "state" or (strategy.copies and stages.ema_decay is not None)):
        what = "the whole state" if strategy.copies == "state" else "the average of the parameters (step.ema) too"
        raise UserError(
            f"{strategy.name} with norm_point post-clip stands inside all other transforms, where it cannot copy {what}; "
            "choose norm_point pre-clip"
        )
    own = recovering(strategy, stages)
    return (own, *transforms) if inside else (*transforms, own)


def kept_bytes(state: TrainState) -> int:
    """Bytes that the strategy keeps beside the model, over all devices once."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.slots[RECOVERY]["of"]))


def _apart(state: TrainState) -> tuple[TrainState, Any]:
    """The state without this transform's slot, and the slot."""
    slots = dict(state.slots)
    slot = slots.pop(RECOVERY)
    return state.replace(slots=slots), slot


def _held(metrics: Metrics) -> jax.Array:
    """Whether a guard inside has left the state as it was."""
    flags = [value > 0 for name, value in metrics.items() if name.endswith(("/skipped", "/stopped"))]
    return jnp.any(jnp.stack(flags)) if flags else jnp.asarray(False)


def _everywhere(x, stages: Stages):
    if stages.mesh is None or stages.mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(stages.mesh, PartitionSpec()))


def _placed(state: TrainState, stages: Stages) -> TrainState:
    """Each leaf where the state's leaves lie, so that no branch decides otherwise."""
    if stages.mesh is None or stages.mesh.size == 1:
        return state
    tree = {"params": state.params, "opt_state": state.opt_state, "slots": state.slots}
    places = shardings(state_specs(tree, stages.specs), stages.mesh, stages.rules)
    return state.replace(**jax.lax.with_sharding_constraint(tree, places))


def _nothing(count: int) -> Report:
    none = jnp.zeros(count, bool)
    return Report(none, none, none, jnp.zeros((), jnp.int32), jnp.float32(0), jnp.zeros(count, jnp.float32))


def _metrics(report: Report) -> Metrics:
    values = {
        "lost": jnp.sum(report.failed),
        "unrecovered": jnp.sum(report.failed & ~report.recovered),
        "exact": jnp.sum(report.exact),
        "steps_lost": report.steps_lost,
        "bytes_moved": report.bytes_moved,
        "relative_error": jnp.max(jnp.where(report.recovered, report.relative_error, 0.0)),
    }
    return {f"{RECOVERY}/{name}": value.astype(jnp.float32) for name, value in values.items()}
