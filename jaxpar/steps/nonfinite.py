"""What happens to a step whose loss or gradient is not finite: the run stops there, or the step is skipped.

Checked on every step, before the update, on the device. The two are different policies, and stopping is the default: a
NaN is a bug or a divergence more often than bad luck.
"""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from jaxpar.errors import UserError
from jaxpar.step import Step, StepTransform
from jaxpar.steps.guard import all_finite, finite_gradients, select

STOP, SKIP = "stop_on_nonfinite", "skip_nonfinite"


def stop_on_nonfinite() -> StepTransform:
    """Keep the state from before the first step that is not finite, and say so from then on.

    The loss, every gradient and every new parameter are looked at. The state, its `step` included, stays bitwise what it
    was (but for `data_position`, which counts the batches that were looked at), and all further updates do nothing: the
    loop reads the metric one step later and ends the run, and no checkpoint can hold a broken state.

    Slot: whether it has stopped (bool). Metrics: `stop_on_nonfinite/stopped`, 0 or 1.
    """

    def transform(step: Step) -> Step:
        def init(params, key):
            return step.init(params, key).add_slot(STOP, jnp.asarray(False))

        def apply(state, gradients, control):
            new, metrics = step.apply(state, gradients, control)
            stopped = state.slots[STOP] | ~(finite_gradients(gradients) & all_finite(new.params))
            new = select(~stopped, new, state).with_slot(STOP, stopped)
            return new, {**metrics, f"{STOP}/stopped": stopped.astype(jnp.float32)}

        return replace(step, init=init, apply=apply)

    return transform


def skip_nonfinite(max_consecutive: int = 10) -> StepTransform:
    """Leave out updates that are not finite; stop after too many in a row.

    Parameters, optimiser state and inner slots stay bitwise what they were; `step` counts on (the learning rate follows
    the optimiser's own count, which does not).

    Slot: {total, consecutive} int32. Metrics: `skip_nonfinite/skipped` (this step), `/total`, `/stopped` (more than
    `max_consecutive` in a row).
    """
    if max_consecutive < 0:
        raise UserError(f"skip_nonfinite's max_consecutive = {max_consecutive} must be at least 0")

    def transform(step: Step) -> Step:
        def init(params, key):
            zero = lambda: jnp.zeros((), jnp.int32)
            return step.init(params, key).add_slot(SKIP, {"total": zero(), "consecutive": zero()})

        def apply(state, gradients, control):
            new, metrics = step.apply(state, gradients, control)
            bad = ~(finite_gradients(gradients) & all_finite(new.params))
            slot = state.slots[SKIP]
            slot = {
                "total": slot["total"] + bad,
                "consecutive": jnp.where(bad, slot["consecutive"] + 1, 0),
            }
            new = select(~bad, new, state).replace(step=state.step + 1).with_slot(SKIP, slot)
            return new, {
                **metrics,
                f"{SKIP}/skipped": bad.astype(jnp.float32),
                f"{SKIP}/total": slot["total"].astype(jnp.float32),
                f"{SKIP}/stopped": (slot["consecutive"] > max_consecutive).astype(jnp.float32),
            }

        return replace(step, init=init, apply=apply)

    return transform
