"""A skipping strategy around a step."""

from __future__ import annotations

from dataclasses import replace

import jax

from jaxpar.models.spec import LAYERS
from jaxpar.skipping.base import Skipping
from jaxpar.step import Control, Gradients, Step, StepTransform, TrainState
from jaxpar.steps.base import scaled

SKIPPING = "skipping"


def skipping(strategy: Skipping, layers: int) -> StepTransform:
    """Each microbatch of a step runs the layers that the strategy says, by `Control.route`.

    Stands outside of accumulation, whose parts then take the same routes, and inside of clipping and of what judges
    gradients. Metric: `skipping/kept`, the share of the layers that were run.

    Args:
      strategy: see `jaxpar.skipping`.
      layers: L, of the model.
    """

    def transform(step: Step) -> Step:
        route_of = lambda state: strategy.route(state.step, state.key, layers)

        def gradients(state: TrainState, batch, control: Control | None) -> Gradients:
            control = Control() if control is None else control
            found = step.gradients(state, batch, control.replace(route=route_of(state)))
            if (scale_L := strategy.gradient_scale(layers)) is None:
                return found
            grads = {**found.grads, LAYERS: jax.tree.map(scaled(scale_L), found.grads[LAYERS])}
            return found.replace(grads=grads)

        def apply(state: TrainState, gradients: Gradients, control: Control | None):
            kept = strategy.kept(route_of(state), layers)
            state, metrics = step.apply(state, gradients, control)
            return state, {**metrics, f"{SKIPPING}/kept": kept}

        return replace(step, gradients=gradients, apply=apply)

    return transform
