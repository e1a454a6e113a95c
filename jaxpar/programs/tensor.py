"""The tensor axis of a program: what its blocks call, and its loss where products are spread by hand.

By hand over `tensor` then, over the batch's axes, and over `sequence` where tokens lie on several devices: were the batch
left to the partitioner, it would gather all rows for each gather and scatter of their tokens. Where tokens lie on several
devices and `tensor` has one, it is the same by hand: attention's kernels ask for all axes of the mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.models.route import Route
from jaxpar.models.spec import path_name
from jaxpar.pallas_kernels.varying import varying
from jaxpar.parallel.rules import Rules, constrain
from jaxpar.parallel.tensor import gathered
from jaxpar.parallel.tensor.by_hand import ByHand
from jaxpar.parallel.tensor.config import TENSOR, TensorConfig
from jaxpar.programs.sequence import AXIS as SEQUENCE
from jaxpar.programs.sequence import batch_specs, local_loss
from jaxpar.programs.whole import Loss
from jaxpar.step import Batch

Tree = Any


def training_ops(ops: Ops, config: TensorConfig, mesh: Mesh, rules: Rules) -> Ops:
    """What blocks call in training: generation, which has one token at a time, keeps `ops`."""
    sizes = dict(mesh.shape)
    if config.by_hand(sizes):
        return replace(ops, shards=shards_of(config, sizes))
    if config.products == "sharded":
        return replace(ops, constrain=constrain(mesh, rules.with_activations(length=(), stream=TENSOR)))
    return ops


def shards_of(config: TensorConfig, sizes: Mapping[str, int]) -> ByHand:
    """A device's share of the products."""
    return ByHand(sizes[TENSOR], TENSOR, config.permutes(sizes), config.parts(sizes))


def hand_specs(specs: Tree, rules: Rules, axes: tuple[str, ...]) -> Tree:
    """A `PartitionSpec` for each parameter over these axes alone, for a `shard_map` that is manual over them."""
    is_spec = lambda x: hasattr(x, "axes")
    return jax.tree.map(lambda s: only(rules.spec_for(s.axes, "params"), axes), specs, is_leaf=is_spec)


def only(spec: PartitionSpec, axes: tuple[str, ...]) -> PartitionSpec:
    """The same without the other axes."""
    rows = [(row,) if isinstance(row, str) else tuple(row or ()) for row in spec]
    return PartitionSpec(*(tuple(a for a in row if a in axes) or None for row in rows))


@dataclass(frozen=True)
class Hand:
    """The axes by hand besides that of the tokens, and how parameters lie on them.

    Attributes:
      rows: the batch's axes of more than one device.
      shards: of the products.
      specs: every parameter's `ParamSpec`.
      rules: as in `jaxpar.program.Program`.
    """

    rows: tuple[str, ...]
    shards: ByHand
    specs: Tree
    rules: Rules

    @property
    def axes(self) -> tuple[str, ...]:
        """Those of several devices."""
        return (*self.rows, TENSOR) if self.shards.shards > 1 else self.rows

    @property
    def params(self) -> Tree:
        """A `PartitionSpec` for each parameter."""
        return hand_specs(self.specs, self.rules, self.axes)

    def ops(self, ops: Ops) -> Ops:
        """With products that gather their kernels themselves."""
        return replace(ops, shards=replace(self.shards, over=self.over("embed")))

    def gather(self, params: Tree) -> Tree:
        """Whole along the batch's axes, but for what products gather: the width of layers' kernels."""

        def one(path, x, spec):
            kernel = path_name(path).startswith("layers/") and path_name(path).endswith("/kernel")
            for dimension, axis in enumerate(spec.axes):
                if not (kernel and axis == "embed"):
                    x = gathered.whole(x, dimension, self.over(axis))
            return x

        return jax.tree_util.tree_map_with_path(one, params, self.specs)

    def over(self, axis: str | None) -> tuple[str, ...]:
        """The batch's axes that a dimension of parameters lies on."""
        return tuple(a for a in self.rules.mesh_axes(axis) if a in self.rows)


def hand_for(config: TensorConfig, sizes: Mapping[str, int], specs: Tree, rules: Rules) -> Hand | None:
    """None: the partitioner has the batch's axes and the tensor axis, or rows and products are whole."""
    if not config.by_hand(sizes) and (sizes[SEQUENCE] == 1 or sizes[TENSOR] > 1):
        return None
    rows = tuple(a for a in rules.mesh_axes("batch", "activations") if sizes[a] > 1)
    return Hand(rows, shards_of(config, sizes), specs, rules)


def left(sizes: Mapping[str, int], hand: Hand | None, staged: bool) -> tuple[str, ...]:
    """The axes of several devices that the partitioner has inside of the `shard_map` of a pipeline, or of tokens that lie on
    several devices."""
    if not staged and sizes[SEQUENCE] == 1:
        return ()
    ours = set(sizes) - {TENSOR} if staged else {SEQUENCE}
    ours.update(() if hand is None else hand.axes)
    return tuple(a for a, size in sizes.items() if size > 1 and a not in ours)


def loss_fn(cfg: ModelConfig, mesh: Mesh, ops: Ops, hand: Hand) -> Loss:
    """As `whole.loss_fn`, by hand over the tensor axis and the batch's.

    Differentiable from outside: gradients of what each device holds whole are summed over the axes once, at the end.
    """
    ops = hand.ops(ops)

    def loss(params: Tree, batch: Batch, key, route: Route | None = None):
        places = jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)

        def local(params, batch, places, key, route):
            params = hand.gather(jax.tree.map(lambda x: varying(x, hand.axes), params))
            return jax.lax.psum(local_loss(cfg, ops, params, batch, places, key, route), hand.axes)

        nowhere = PartitionSpec()
        inputs = (hand.params, batch_specs(hand.rows, ()), nowhere, nowhere, nowhere)
        # Manual over the axes of one device too: attention's kernels ask for all axes of the mesh.
        run = jax.shard_map(local, mesh=mesh, in_specs=inputs, out_specs=nowhere)
        return run(params, batch, places, key, route)

    return loss
