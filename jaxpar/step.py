"""A training step in three phases, and what may be wrapped around them.

    prepare   (state, batch, control)             -> (state, metrics)     what must happen to the state first
    gradients (state, batch, control)             -> Gradients            sums over the batch; updates nothing
    apply     (state, gradients, control)         -> (state, metrics)     the optimiser

`update` is the three in this order, and is not overridden: a transform replaces phases, and whatever the phases are
made of (plain `jit`, GSPMD, a pipeline table) it cannot tell. Zeroth-order and federated steps are other makers of
`gradients` and `apply`. `chain(step, t1, t2)` is `t2(t1(step))`: the last one is outermost, so it sees the batch first
in each phase, and on the way back it sees the result last.

Why phases and not one `update`: a check on the gradient must stand between gradients and optimiser ("before the
update"), and accumulation must wrap gradients alone; with one opaque `update` each of them would need the inside of
the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxpar.models.route import Route

Tree = Any
Metrics = dict[str, jax.Array]


@struct.dataclass
class Batch:
    """One global batch of packed sequences. B rows of T tokens.

    Attributes:
      tokens: int32 [B, T].
      targets: int32 [B, T], the token that follows each.
      weights: float32 [B, T], the loss weight of each target; 0 where there is none.
      positions: int32 [B, T], the position inside its document.
      segments: int32 [B, T], which document of the row a token belongs to, from 1; 0 is padding.
      sample_ids: int32 [B], the global example index of each row (keys of per-sample randomness fold it in).
    """

    tokens: jax.Array
    targets: jax.Array
    weights: jax.Array
    positions: jax.Array
    segments: jax.Array
    sample_ids: jax.Array


@struct.dataclass
class Control:
    """What changes from step to step *as data*, so that no change compiles again. None: not used.

    Attributes:
      sample_weights: float32 [B], multiplies the loss weights of each row.
      learning_rate_scale: float32 [L], multiplies the updates of each layer of the stack.
      route: leaves [M, ...]: the layers that each of M microbatches runs; row i of the batch belongs to microbatch i
        mod M (see `jaxpar.models.route`).
      failed: bool [S], the stages that are lost at the start of this step (see `jaxpar.recovery.transform`).
    """

    sample_weights: jax.Array | None = None
    learning_rate_scale: jax.Array | None = None
    route: Route | None = None
    failed: jax.Array | None = None


@struct.dataclass
class Gradients:
    """Sums over a batch: they add up over microbatches, and are divided once, by the sum of weights.

    Attributes:
      loss_sum: float32 [], the weighted sum of token losses, in nats.
      weight_sum: float32 [], the sum of the loss weights.
      grads: the gradient of `loss_sum`, a tree like the parameters.
      aux: further scalar metrics, also sums over tokens.
    """

    loss_sum: jax.Array
    weight_sum: jax.Array
    grads: Tree
    aux: Metrics = struct.field(default_factory=dict)

    def mean(self) -> Tree:
        """The gradient of the mean loss a token. Zero weight in the whole batch gives zero, not NaN."""
        scale = 1.0 / jnp.maximum(self.weight_sum, jnp.finfo(jnp.float32).tiny)
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), self.grads)


@struct.dataclass
class TrainState:
    """Everything a run needs to go on: one flat record with named slots.

    Attributes:
      step: int32 [], updates done so far.
      params: the parameters (float32).
      opt_state: the optimiser's state, one for each layer of the stack (see `jaxpar.optimisers`).
      key: the run's random key; each use folds in step, sample, layer.
      data_position: int32 [], the global index of the next example.
      slots: what step transforms keep, by their name.
    """

    step: jax.Array
    params: Tree
    opt_state: Tree
    key: jax.Array
    data_position: jax.Array
    slots: dict[str, Tree] = struct.field(default_factory=dict)

    def add_slot(self, name: str, value: Tree) -> TrainState:
        """A new state with one slot more; for a transform's `init`.

        Raises:
          ValueError: there is one of that name, because a transform stands in the chain twice.
        """
        if name in self.slots:
            raise ValueError(
                f"the step transform {name!r} stands in the chain twice and would share its slot; use it once"
            )
        return self.with_slot(name, value)

    def with_slot(self, name: str, value: Tree) -> TrainState:
        return self.replace(slots={**self.slots, name: value})


@dataclass(frozen=True)
class Step:
    """One training step. All functions are pure, jit-able, donation-safe and free of host syncs.

    Attributes:
      init: `(params, key) -> TrainState`.
      prepare, gradients, apply: the phases, see the module's text.
    """

    init: Callable[[Tree, jax.Array], TrainState]
    prepare: Callable[[TrainState, Batch, Control], tuple[TrainState, Metrics]]
    gradients: Callable[[TrainState, Batch, Control], Gradients]
    apply: Callable[[TrainState, Gradients, Control], tuple[TrainState, Metrics]]

    def update(self, state: TrainState, batch: Batch, control: Control | None = None) -> tuple[TrainState, Metrics]:
        """The whole step: `(state, batch, control) -> (state, metrics)`.

        `data_position` advances here, by the rows of the batch: a step that was skipped has still used its batch.
        """
        control = Control() if control is None else control
        state, before = self.prepare(state, batch, control)
        gradients = self.gradients(state, batch, control)
        state, after = self.apply(state, gradients, control)
        state = state.replace(data_position=state.data_position + batch.tokens.shape[0])
        return state, {**before, **after}


StepTransform = Callable[[Step], Step]


def chain(step: Step, *transforms: StepTransform) -> Step:
    """`chain(step, t1, t2)` is `t2(t1(step))`: the last transform is outermost."""
    for transform in transforms:
        step = transform(step)
    return step
