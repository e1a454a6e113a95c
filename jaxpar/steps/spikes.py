"""Skipping steps whose loss or gradient norm stands out of the last ones (OLMo 2's SkipStep)."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import optax

from jaxpar.errors import UserError
from jaxpar.step import Step, StepTransform
from jaxpar.steps.guard import select

SPIKES = "skip_spikes"


def skip_spikes(sigma: float = 6.0, window: int = 128, max_consecutive: int = 10) -> StepTransform:
    """Leave out updates whose loss or gradient norm is more than `sigma` standard deviations *above the mean*.

    Mean and deviation are over the last `window` steps that were not skipped: a spike does not widen the band that it is
    judged by. Nothing is skipped until half the window is filled. NaN is none of this transform's business (see
    `nonfinite`); an infinite norm (of finite gradients, it overflows) stands out like any other. Neither ever enters the
    window.

    After `max_consecutive` skips in a row the next step is taken, whatever it is, and enters the window: a lasting change
    of level is no spike, and a run must not stand still for ever.

    Slot: {losses, norms: float32 [window], count, total, consecutive: int32}. Metrics: `skip_spikes/skipped`, `/total`.

    Raises:
      UserError: options that cannot be.
    """
    if not sigma > 0:
        raise UserError(f"skip_spikes' sigma = {sigma} must be above 0")
    if window < 4:
        raise UserError(f"skip_spikes' window = {window} must be at least 4 steps; 128 is usual")
    if max_consecutive < 1:
        raise UserError(f"skip_spikes' max_consecutive = {max_consecutive} must be at least 1")

    def spikes(values_W, count, value):
        filled = jnp.arange(window) < count
        n = jnp.maximum(count, 1)
        mean = jnp.sum(jnp.where(filled, values_W, 0.0)) / n
        variance = jnp.sum(jnp.where(filled, jnp.square(values_W - mean), 0.0)) / n
        return value > mean + sigma * jnp.sqrt(variance)

    def transform(step: Step) -> Step:
        def init(params, key):
            slot = {name: jnp.zeros(window, jnp.float32) for name in ("losses", "norms")}
            slot |= {name: jnp.zeros((), jnp.int32) for name in ("count", "total", "consecutive")}
            return step.init(params, key).add_slot(SPIKES, slot)

        def apply(state, gradients, control):
            slot = state.slots[SPIKES]
            weight = jnp.maximum(gradients.weight_sum, jnp.finfo(jnp.float32).tiny)
            loss, norm = gradients.loss_sum / weight, optax.tree.norm(gradients.grads) / weight
            seen = jnp.minimum(slot["count"], window)
            warm = 2 * seen >= window
            high = spikes(slot["losses"], seen, loss) | spikes(slot["norms"], seen, norm)
            skip = warm & high & (slot["consecutive"] < max_consecutive)
            enters = ~skip & jnp.isfinite(loss) & jnp.isfinite(norm)
            place = slot["count"] % window
            put = lambda values, value: values.at[place].set(jnp.where(enters, value, values[place]))
            slot = {
                "losses": put(slot["losses"], loss),
                "norms": put(slot["norms"], norm),
                "count": slot["count"] + enters,
                "total": slot["total"] + skip,
                "consecutive": jnp.where(skip, slot["consecutive"] + 1, 0),
            }
            new, metrics = step.apply(state, gradients, control)
            new = select(~skip, new, state).replace(step=state.step + 1)
            return new.with_slot(SPIKES, slot), {
                **metrics,
                f"{SPIKES}/skipped": skip.astype(jnp.float32),
                f"{SPIKES}/total": slot["total"].astype(jnp.float32),
            }

        return replace(step, init=init, apply=apply)

    return transform
