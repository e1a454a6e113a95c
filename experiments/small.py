"""Small training runs for studies that compare many of them: the built-in text, one device, a whole stretch of steps in one
compiled loop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.data.config import DataConfig
from jaxpar.data.pipeline import Pipeline
from jaxpar.models.config import ModelConfig
from jaxpar.optimisers import make
from jaxpar.optimisers_config import AnyOptimiser
from jaxpar.parallel.mesh import MeshConfig, make_mesh
from jaxpar.program import Program, build
from jaxpar.quantise.training import Quantise
from jaxpar.recovery.transform import RECOVERY
from jaxpar.step import Batch, Control, Step, TrainState, chain
from jaxpar.steps.base import make_step

Tree = Any


@dataclass(frozen=True)
class Texts:
    """Batches in memory.

    Attributes:
      train: fields [n, B, T] and [n, B]: n batches, of which batch i mod n is the i-th.
      held_out: likewise.
      vocabulary: the model's.
    """

    train: Batch
    held_out: Batch
    vocabulary: int

    @property
    def rows(self) -> int:
        """B."""
        return self.train.tokens.shape[1]


def texts(length: int, rows: int, batches: int, held_out: int = 16, seed: int = 0) -> Texts:
    """The built-in text (the standard library's sources, bytes) as so many batches of rows of `length` tokens."""
    pipeline = Pipeline(DataConfig(length=length, batch=rows, seed=seed), lambda text: None)
    stack = lambda found: jax.tree.map(lambda *x: jnp.stack(x), *found)
    train = [Batch(**pipeline.rows(np.arange(i * rows, (i + 1) * rows))) for i in range(batches)]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return Texts(stack(train), stack(list(pipeline.validation(held_out, rows, sharding))), pipeline.vocabulary)


class Runs:
    """Runs of one model with one chain of transforms: compiled once, for any seed and any control.

    Attributes:
      program: the model on one device.
      step: the step with its transforms.
      goes_back: an iteration in which something is lost makes no step: its work is gone too.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        optimiser: AnyOptimiser,
        texts: Texts,
        steps: int,
        transforms=(),
        goes_back: bool = False,
        quantise: Quantise | None = None,
    ):
        self.program: Program = build(cfg, make_mesh(MeshConfig(), jax.devices()[:1]), quantise=quantise)
        tx = make(optimiser, self.program.specs, steps=steps)
        # A chain may need to know the parameters: a function of their specs then.
        parts = transforms(self.program) if callable(transforms) else transforms
        self.step: Step = chain(make_step(self.program.grad_fn, tx), *parts)
        self.texts = texts
        self.goes_back = goes_back

    def start(self, seed: int) -> TrainState:
        """A fresh state; runs with the same seed start alike whatever their transforms."""
        params = self.program.init(jax.random.fold_in(jax.random.key(seed), 0))
        return jax.jit(self.step.init)(params, jax.random.fold_in(jax.random.key(seed), 1))

    @cached_property
    def _stretch(self):
        n = self.texts.train.tokens.shape[0]

        def batch_at(state):
            number = state.data_position // self.texts.rows % n
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False), self.texts.train)

        def one(state, control):
            before = {}
            if control.failed is not None:
                failed = control.failed.any()
                state, before = self.step.prepare(state, batch_at(state), control)
                control = control.replace(failed=None)
            update = lambda state: self.step.update(state, batch_at(state), control)
            if before and self.goes_back:
                blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(update, state)[1])
                state, metrics = jax.lax.cond(failed, lambda state: (state, blank), update, state)
                counts = state.slots[RECOVERY]
                before |= {f"{RECOVERY}/{name}": counts[name] for name in ("failures", "replayed")}
            else:
                state, metrics = update(state)
            return state, {**metrics, **before, "step": state.step}

        return jax.jit(lambda state, controls: jax.lax.scan(one, state, controls), donate_argnums=0)

    def train(self, state: TrainState, controls: Control, every: int) -> Iterator[tuple[TrainState, dict]]:
        """Iterations in stretches of `every`: yields the state behind each and its metrics [every].

        Args:
          controls: fields [iterations, ...]; at least one field must be there, to tell how many there are.
        """
        total = jax.tree.leaves(controls)[0].shape[0]
        for start in range(0, total, every):
            part = jax.tree.map(lambda x, start=start: x[start : start + every], controls)
            state, metrics = self._stretch(state, part)
            yield state, jax.device_get(metrics)

    @cached_property
    def _loss(self):
        def loss(params, route):
            sums = jax.lax.map(lambda batch: self.program.eval_fn(params, batch, route), self.texts.held_out)
            return jnp.sum(sums[0]) / jnp.sum(sums[1])

        return jax.jit(loss)

    def held_out(self, params: Tree, route=None) -> float:
        """Held-out loss in nats a token, of the whole model or of a route's layers."""
        return float(self._loss(params, route))


def controls(iterations: int, rows: int) -> Control:
    """Nothing changes, for so many iterations."""
    return Control(sample_weights=jnp.ones((iterations, rows), jnp.float32))
