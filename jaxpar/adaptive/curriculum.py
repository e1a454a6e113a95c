"""What exits weigh in training where that changes from step to step."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp

from jaxpar.models.exits.config import Exits
from jaxpar.models.route import Route
from jaxpar.step import Batch, Control, Gradients, Step, StepTransform, TrainState


def exit_weights(exits: Exits, layers: int) -> StepTransform:
    """The weights of `exits.loss` at each step, by `Control.route`; nothing where they do not change.

    Stands outside of accumulation, whose parts then have the same weights, and inside of skipping, whose routes it joins.

    Args:
      layers: L, of the model.
    """

    def transform(step: Step) -> Step:
        if not exits.at or not exits.loss.changes:
            return step

        def gradients(state: TrainState, batch: Batch, control: Control | None) -> Gradients:
            control = Control() if control is None else control
            route = Route() if control.route is None else control.route
            weights = exits.loss.weights(exits.at, layers, state.step)
            parts = next((x.shape[0] for x in jax.tree.leaves(route)), 1)
            route = route.replace(exits=jnp.broadcast_to(weights, (parts, *weights.shape)))
            return step.gradients(state, batch, control.replace(route=route))

        return replace(step, gradients=gradients)

    return transform
