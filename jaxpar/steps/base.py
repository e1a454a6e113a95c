"""The plain step: gradients from a program, one update by an optimiser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxpar.models.spec import LAYERS
from jaxpar.step import Batch, Control, Gradients, Metrics, Step, TrainState

Tree = Any
GradFn = Callable[[Tree, Batch, Control, jax.Array], Gradients]


def make_step(grad_fn: GradFn, tx: optax.GradientTransformation) -> Step:
    """A step without transforms.

    Args:
      grad_fn: `(params, batch, control, key) -> Gradients`. The key is new in every step; per-sample randomness folds in
        `batch.sample_ids`, so that it depends neither on the mesh nor on microbatches.
      tx: the optimiser, see `jaxpar.optimisers.make`.

    Metrics: `loss` (mean nats per token), `tokens` (sum of loss weights), `grad_norm` (of the mean gradient), and
    the means of `Gradients.aux`.
    """

    def init(params: Tree, key: jax.Array) -> TrainState:
        # Two arrays: one that stands twice in a state could not be donated.
        step, position = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
        return TrainState(step, params, tx.init(params), key, position)

    def prepare(state: TrainState, batch: Batch, control: Control) -> tuple[TrainState, Metrics]:
        return state, {}

    def gradients(state: TrainState, batch: Batch, control: Control | None) -> Gradients:
        control = Control() if control is None else control
        if control.sample_weights is not None:
            batch = batch.replace(weights=batch.weights * control.sample_weights[:, None])
        return grad_fn(state.params, batch, control, jax.random.fold_in(state.key, state.step))

    def apply(state: TrainState, gradients: Gradients, control: Control | None) -> tuple[TrainState, Metrics]:
        mean = gradients.mean()
        updates, opt_state = tx.update(mean, state.opt_state, state.params)
        if control is not None and control.learning_rate_scale is not None:
            updates = {**updates, LAYERS: jax.tree.map(scaled(control.learning_rate_scale), updates[LAYERS])}
        params = optax.apply_updates(state.params, updates)
        weight = jnp.maximum(gradients.weight_sum, jnp.finfo(jnp.float32).tiny)
        metrics = {
            "loss": gradients.loss_sum / weight,
            "tokens": gradients.weight_sum,
            "grad_norm": optax.tree.norm(mean),
            **{name: total / weight for name, total in gradients.aux.items()},
        }
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    return Step(init, prepare, gradients, apply)


def scaled(scale_L):
    """x [L, ...] -> x times each layer's scale."""
    return lambda u: u * scale_L.reshape(-1, *(1,) * (u.ndim - 1)).astype(u.dtype)
