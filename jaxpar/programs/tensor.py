"""The tensor axis of a program: what its blocks call, and its loss where products are spread by hand.

By hand over `tensor`, and over `sequence` where tokens lie on several devices; GSPMD over the other axes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.models.route import Route
from jaxpar.pallas_kernels.varying import varying
from jaxpar.parallel.rules import Rules, constrain
from jaxpar.parallel.tensor.by_hand import ByHand
from jaxpar.parallel.tensor.config import TENSOR, TensorConfig
from jaxpar.programs.sequence import local_loss
from jaxpar.programs.whole import Loss
from jaxpar.step import Batch

Tree = Any


def training_ops(ops: Ops, config: TensorConfig, mesh: Mesh, rules: Rules) -> Ops:
    """What blocks call in training: generation, which has one token at a time, keeps `ops`."""
    sizes = dict(mesh.shape)
    if config.by_hand(sizes):
        return replace(ops, shards=ByHand(sizes[TENSOR], TENSOR, config.products == "ring", config.parts(sizes)))
    if config.products == "sharded":
        return replace(ops, constrain=constrain(mesh, rules.with_activations(length=(), stream=TENSOR)))
    return ops


def hand_specs(specs: Tree, rules: Rules, axes: tuple[str, ...]) -> Tree:
    """A `PartitionSpec` for each parameter over these axes alone, for a `shard_map` that is manual over them."""
    is_spec = lambda x: hasattr(x, "axes")
    return jax.tree.map(lambda s: only(rules.spec_for(s.axes, "params"), axes), specs, is_leaf=is_spec)


def only(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The same without the other axes."""
    rows = [(row,) if isinstance(row, str) else tuple(row or ()) for row in spec]
    return PartitionSpec(*(tuple(a for a in row if a in axes) or None for row in rows))


def loss_fn(cfg: ModelConfig, mesh: Mesh, ops: Ops, specs: Tree, rules: Rules) -> Loss:
    """As `whole.loss_fn`, by hand over the tensor axis.

    Differentiable from outside: gradients of what each device holds whole are summed over the axis once, at the end.
    """

    def loss(params: Tree, batch: Batch, key, route: Route | None = None):
        places = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)

        def local(params, batch, places, key, route):
            params = jax.tree.map(lambda x: varying(x, (TENSOR,)), params)
            return jax.lax.psum(local_loss(cfg, ops, params, batch, places, key, route), TENSOR)

        nowhere = PartitionSpec()
        inputs = (hand_specs(specs, rules, (TENSOR,)), nowhere, nowhere, nowhere, nowhere)
        run = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=nowhere, axis_names={TENSOR})
        return run(params, batch, places, key, route)

    return loss
