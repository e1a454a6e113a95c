"""An exponential moving average of the parameters, for evaluation (Polyak & Juditsky 1992)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.errors import UserError
from jaxpar.step import Step, StepTransform, TrainState

EMA = "ema"


def ema(decay: float = 0.999) -> StepTransform:
    """`average ← decay·average + (1 - decay)·params` after each update, corrected for its start (see `averaged`).

    A step that an inner transform left out moves no parameter, and does not enter the average: parameters that are
    bitwise the same as before are how that shows.

    Slot: {average: like the parameters (float32), count: int32}. Metrics: `ema/count`.

    Raises:
      UserError: a decay outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise UserError(f"ema's decay = {decay} is outside [0, 1)")

    def transform(step: Step) -> Step:
        def init(params, key):
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
            return step.init(params, key).add_slot(EMA, {"average": zeros, "count": jnp.zeros((), jnp.int32)})

        def apply(state, gradients, control):
            new, metrics = step.apply(state, gradients, control)
            pairs = zip(jax.tree.leaves(new.params), jax.tree.leaves(state.params), strict=True)
            moved = jnp.any(jnp.stack([jnp.any((a != b) & ~(jnp.isnan(a) & jnp.isnan(b))) for a, b in pairs]))
            slot = state.slots[EMA]
            blend = lambda m, p: jnp.where(moved, decay * m + (1 - decay) * p.astype(jnp.float32), m)
            count = slot["count"] + moved
            slot = {"average": jax.tree.map(blend, slot["average"], new.params), "count": count}
            return new.with_slot(EMA, slot), {**metrics, f"{EMA}/count": count.astype(jnp.float32)}

        return replace(step, init=init, apply=apply)

    return transform


def averaged(state: TrainState, decay: float) -> Any:
    """The averaged parameters of a state; before the first update: the parameters themselves."""
    return corrected(state.slots[EMA], state.params, decay)


def corrected(slot: Any, params: Any, decay: float) -> Any:
    """The average divided by `1 - decay^count`, so that the first average is the first parameters.

    Args:
      slot: see `ema`.
      params: taken as they are where nothing was averaged yet; their dtypes are kept.
    """
    weight = 1.0 - jnp.power(jnp.float32(decay), slot["count"].astype(jnp.float32))
    fresh = slot["count"] == 0
    safe = jnp.where(fresh, 1.0, weight)
    return jax.tree.map(lambda m, p: jnp.where(fresh, p, (m / safe).astype(p.dtype)), slot["average"], params)
