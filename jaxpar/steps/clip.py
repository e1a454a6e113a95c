"""Clipping by the norm of the mean gradient, over the whole model or stage by stage."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpar.errors import UserError
from jaxpar.models.spec import LAYERS
from jaxpar.step import Step, StepTransform


def _check(name: str, limit: float) -> None:
    if not 0 < limit < float("inf"):
        raise UserError(f"{name} needs a finite norm above 0, got {limit}")


def _factor(norm, limit: float):
    """Exactly 1 below the limit, so that nothing changes there."""
    return jnp.where(norm > limit, limit / norm, 1.0)


def _mean_scale(gradients):
    """What divides the summed gradients, as in `Gradients.mean`."""
    return jnp.maximum(gradients.weight_sum, jnp.finfo(jnp.float32).tiny)


def clip_global(limit: float) -> StepTransform:
    """Scale the gradient so that the norm of its mean over tokens is at most `limit` (Pascanu et al. 2013).

    Metrics: `clip_global/norm` before clipping (`grad_norm` is what the optimiser sees), `clip_global/factor`, 1 where
    nothing was clipped.
    """
    _check("clip_global", limit)

    def transform(step: Step) -> Step:
        def apply(state, gradients, control):
            norm = optax.tree.norm(gradients.grads) / _mean_scale(gradients)
            factor = _factor(norm, limit)
            grads = jax.tree.map(lambda g: g * factor.astype(g.dtype), gradients.grads)
            state, metrics = step.apply(state, gradients.replace(grads=grads), control)
            return state, {**metrics, "clip_global/factor": factor, "clip_global/norm": norm}

        return replace(step, apply=apply)

    return transform


def clip_per_stage(limit: float, stages: int) -> StepTransform:
    """Clip each stage of the stack alone, and what is outside the stack (embedding, head) as one more group.

    A stage that explodes or is lost does not shrink the others' gradients, and no stage needs another's norm.

    Args:
      limit: the largest norm of a group's mean gradient.
      stages: contiguous groups of layers, as equal as possible; the first take the remainder.

    Metrics: `clip_per_stage/smallest_factor`.

    Raises:
      UserError: a limit that is no norm, fewer than one stage; when traced, more stages than layers.
    """
    _check("clip_per_stage", limit)
    if stages < 1:
        raise UserError(f"clip_per_stage needs at least 1 stage, got {stages}")

    def transform(step: Step) -> Step:
        def apply(state, gradients, control):
            scale = _mean_scale(gradients)
            stacked = gradients.grads[LAYERS]
            rest = {name: g for name, g in gradients.grads.items() if name != LAYERS}
            layers = jax.tree.leaves(stacked)[0].shape[0]
            if stages > layers:
                raise UserError(f"clip_per_stage has {stages} stages, but the model has {layers} layers")
            of_L = stage_of(layers, stages)
            squares_L = sum(
                jnp.sum(jnp.square(g.astype(jnp.float32)), axis=tuple(range(1, g.ndim)))
                for g in jax.tree.leaves(stacked)
            )
            norm_S = jnp.sqrt(jax.ops.segment_sum(squares_L, of_L, num_segments=stages)) / scale
            factor_S = _factor(norm_S, limit)
            factor = _factor(optax.tree.norm(rest) / scale, limit)
            factor_L = factor_S[of_L]
            clip_L = lambda g: g * factor_L.reshape(-1, *(1,) * (g.ndim - 1)).astype(g.dtype)
            grads = {
                LAYERS: jax.tree.map(clip_L, stacked),
                **jax.tree.map(lambda g: g * factor.astype(g.dtype), rest),
            }
            state, metrics = step.apply(state, gradients.replace(grads=grads), control)
            return state, {**metrics, "clip_per_stage/smallest_factor": jnp.minimum(factor_S.min(), factor)}

        return replace(step, apply=apply)

    return transform


def stage_of(layers: int, stages: int) -> np.ndarray:
    """The stage of each layer: contiguous groups, the first ones larger by one where it does not divide."""
    sizes = [layers // stages + (s < layers % stages) for s in range(stages)]
    return np.repeat(np.arange(stages), sizes)
