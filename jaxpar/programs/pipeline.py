"""Loss and gradients of a pipeline on a mesh: a table's actions around the model's three functions.

By hand over data, stage, fsdp and sequence; the partitioner has the tensor axis, unless a run's products are by hand too.
Each step: the layers are dealt out to
the stages, a stage's weights are gathered over fsdp once, the table runs, and gradients are summed over data and
sequence and scattered over fsdp once. Nothing but activations crosses a device's border inside the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.models.route import Route
from jaxpar.parallel.pipeline import autodiff, execute
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.pipeline.split import Split
from jaxpar.parallel.pipeline.table import Table
from jaxpar.parallel.pipeline.tasks import Placement
from jaxpar.parallel.rules import Rules
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.parallel.sequence.rows import SpreadRows
from jaxpar.parallel.tensor.config import TENSOR, TensorConfig
from jaxpar.programs.sequence import arranged, batch_specs, by_hand, layout_for, local_attention
from jaxpar.programs.stages import Places, parts_of
from jaxpar.programs.tensor import hand_specs
from jaxpar.step import Batch

Tree = Any
STAGE, SEQUENCE = "stage", "sequence"
LAYERS = "layers"


@dataclass(frozen=True)
class PipelineProgram:
    """A model in stages. `gradients` and `loss` are what a `jaxpar.program.Program` takes from it.

    Attributes:
      cfg, mesh, rules: as in `Program`.
      specs: every parameter's `ParamSpec`.
      ops: the functions that the blocks call; attention is a `jaxpar.programs.attention.Spread`, which is replaced where
        tokens lie on several devices.
      pipeline, sequence, tensor: what the run says.
    """

    cfg: ModelConfig
    mesh: Mesh
    rules: Rules
    specs: Tree
    ops: Ops
    pipeline: PipelineConfig
    sequence: SequenceConfig
    tensor: TensorConfig = TensorConfig()

    @cached_property
    def sizes(self) -> dict[str, int]:
        return dict(self.mesh.shape)

    @cached_property
    def inside(self) -> tuple[Mesh, tuple[str, ...]]:
        """The mesh of the `shard_map`, and its axes that tokens lie on."""
        return by_hand(self.mesh, self.sequence)

    @cached_property
    def by_hand(self) -> tuple[str, ...]:
        """The axes of the `shard_map`: of several devices, and stage. A gather or a sum over an axis of one device would
        be a copy of every parameter, in a layout of its own. Both of a hybrid's axes, though, which attention names."""
        hand = self.tensor.by_hand(self.sizes)
        named = self.inside[1] if self.sizes[SEQUENCE] > 1 else ()
        wanted = lambda axis, size: axis == STAGE or axis in named or (size > 1 and (hand or axis != TENSOR))
        return tuple(a for a, size in self.inside[0].shape.items() if wanted(a, size))

    @cached_property
    def manual(self) -> set[str]:
        """Those, and the axes of one device, over which nothing is gathered or summed: attention's kernels ask for all axes
        of the mesh."""
        return set(self.by_hand) | {a for a, size in self.inside[0].shape.items() if size == 1}

    @cached_property
    def spread(self) -> tuple[str, ...]:
        """The axes over which devices see other tokens."""
        return tuple(a for a in self.by_hand if a != STAGE)

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The axes of the batch's rows."""
        return self.rules.mesh_axes("batch", "activations")

    def table(self, batch: int) -> Table:
        """The schedule for a batch of so many rows; see `table_for`."""
        return table_for(self.pipeline, self.sizes, self.rules, batch, self.tensor)

    def split(self, placement: Placement) -> Split:
        return Split(self.cfg.layers, placement)

    # -- the two functions -----------------------------------------------------------------------------------------------

    def gradients(self, params: Tree, batch: Batch, key, route: Route | None = None) -> tuple:
        """`LossSums` and the gradient of loss_sum, placed as the parameters are.

        Args:
          route: what exits weigh in this step, and nothing else.

        Raises:
          ValueError: a route of layers: here the schedule says which stages a microbatch visits.
        """
        refuse(route)
        at, weights = self.cfg.exits.at, None if route is None else route.exits
        if at and weights is None and key is not None:
            weights = self.cfg.exits.loss.weights(at, self.cfg.layers)
        table = self.table(batch.tokens.shape[0])
        oracle = self.pipeline.executor == "autodiff"

        def run(parts, shared, layers, pieces, micros):
            if oracle:
                return autodiff.gradients(parts, shared, layers, pieces, micros, axes=self.by_hand)
            options = dict(axes=self.by_hand, executor=self.pipeline.executor)
            return execute.gradients(table, parts, shared, layers, pieces, micros, **options)

        def local(shared, layers, batch, places, key, weights):
            parts, pieces, micros = self.model(split, batch, places, key, table.order.microbatches, weights)
            loss, d_shared, d_layers = run(parts, *self.whole(shared, layers), pieces, micros)
            d_shared = jax.tree.map(lambda g: jax.lax.psum(g, STAGE), d_shared)
            d_layers = jax.tree.map(lambda g: g[None], d_layers)
            loss = jax.lax.psum(loss, self.by_hand)
            return loss, self.scatter(d_shared, shared_specs), self.scatter(d_layers, layer_specs)

        split = self.split(table.order.placement)
        shared_specs, layer_specs = self.param_specs()
        shared, layers = self.deal(params, split)
        outs = (PartitionSpec(), shared_specs, layer_specs)
        sums, d_shared, d_layers = self.mapped(local, outs)(shared, layers, *self.arrange(batch), key, weights)
        grads = {**d_shared, LAYERS: self.collect(d_layers, split)}
        loss, exits = (sums, None) if weights is None else (sums[0], sums[1:])
        return decoder.LossSums(loss, jnp.sum(batch.weights.astype(jnp.float32)), exits), grads

    def loss(self, params: Tree, batch: Batch, key, route: Route | None = None) -> decoder.LossSums:
        """The sums alone: forwards only, stage after stage."""
        refuse(route)
        split = self.split(straight(self.sizes[STAGE]))
        rows = batch.tokens.shape[0] // math.prod(self.sizes[a] for a in self.rows)
        m = microbatches(replace(self.pipeline, microbatches=None), self.tensor, self.sizes, rows)

        def local(shared, layers, batch, places, key, weights):
            parts, pieces, micros = self.model(split, batch, places, key, m, weights)
            found = autodiff.loss(parts, *self.whole(shared, layers), pieces, micros, axes=self.by_hand)
            return jax.lax.psum(found, self.by_hand)

        run = self.mapped(local, PartitionSpec())
        found = run(*self.deal(params, split), *self.arrange(batch), key, None)
        return decoder.LossSums(found, jnp.sum(batch.weights.astype(jnp.float32)))

    # -- what is around the table ---------------------------------------------------------------------------------------

    def mapped(self, local: Callable, out_specs):
        """`local` on every device, by hand over the axes of `by_hand`."""
        shared_specs, layer_specs = self.param_specs()
        mesh, tokens = self.inside
        rows, tokens = (tuple(a for a in axes if a in self.by_hand) for axes in (self.rows, tokens))
        batch = batch_specs(rows, tokens)
        in_specs = (shared_specs, layer_specs, batch, PartitionSpec(tokens), PartitionSpec(), PartitionSpec())
        # The interpreter's loops do not keep account of what differs between devices.
        options = dict(axis_names=self.manual, check_vma=not self.ops.attention.interpret)
        return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, **options)

    def arrange(self, batch: Batch) -> tuple[Batch, jax.Array]:
        """The batch with its tokens in stored order, and the place of each in its row."""
        if self.sizes[SEQUENCE] == 1:
            return batch, jnp.arange(batch.tokens.shape[1], dtype=jnp.int32)
        layout = layout_for(self.sequence, self.sizes, batch.tokens.shape[1])
        return arranged(layout, batch), jnp.asarray(layout.positions)

    def model(self, split: Split, batch: Batch, places, key, m: int, weights=None):
        """The model as parts (`weights`: see `parts_of`), what each chunk is told, and this device's rows as m
        microbatches."""
        cfg, ops = self.cfg, self.ops
        if self.sizes[SEQUENCE] > 1:
            tokens = self.inside[1]
            rows = SpreadRows(self.sequence.layout, tokens)
            ops = replace(ops, attention=local_attention(self.sequence, tokens, ops.attention.interpret), rows=rows)

        def context(micro: Batch) -> Context:
            return Context(
                micro.positions, micro.segments, key=key, sample_ids=micro.sample_ids, places=places, ops=ops
            )

        device = jax.lax.axis_index(STAGE)
        told = split.first, split.count, Places(() if weights is None else cfg.exits.at, split).which
        pieces = tuple(jnp.asarray(x)[device] for x in told)
        micros = jax.tree.map(lambda x: x.reshape(m, x.shape[0] // m, *x.shape[1:]), batch)
        return parts_of(cfg, split, context, weights), pieces, micros

    def param_specs(self) -> tuple[Tree, Tree]:
        """`PartitionSpec`s over the axes by hand: of the shared parameters, and of the layers as they are dealt out,
        [P, C, n, ...]."""
        shared = hand_specs({k: v for k, v in self.specs.items() if k != LAYERS}, self.rules, self.by_hand)
        layers = hand_specs(self.specs[LAYERS], self.rules, self.by_hand)
        return shared, jax.tree.map(lambda spec: PartitionSpec(STAGE, None, None, *tuple(spec)[1:]), layers)

    def deal(self, params: Tree, split: Split) -> tuple[Tree, Tree]:
        """The shared parameters, and the layers as [P, C, n, ...]. Where stages have their layers in the stack's order,
        as without several chunks, nothing moves."""
        P, C, n = split.dealt.shape

        def one(x, spec):
            x = x if split.in_order else jnp.take(x, split.dealt.ravel(), axis=0)
            return self.placed(x.reshape(P, C, n, *x.shape[1:]), spec, (STAGE, None, None))

        shared = {k: v for k, v in params.items() if k != LAYERS}
        return shared, jax.tree.map(one, params[LAYERS], self.specs[LAYERS])

    def collect(self, dealt: Tree, split: Split) -> Tree:
        """The inverse of `deal`, for gradients: [layers, ...]."""

        def one(x, spec):
            x = x.reshape(-1, *x.shape[3:])
            return x if split.in_order else jnp.take(x, split.place, axis=0)

        return jax.tree.map(one, dealt, self.specs[LAYERS])

    def placed(self, x, spec, leading: tuple):
        rest = tuple(self.rules.spec_for(spec.axes, "params"))[1:]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*leading, *rest)))

    def whole(self, shared: Tree, layers: Tree) -> tuple[Tree, Tree]:
        """This device's parameters as the table's actions read them: layers as [C, n, ...]."""
        shared_specs, layer_specs = self.param_specs()
        return self.gather(shared, shared_specs), jax.tree.map(lambda x: x[0], self.gather(layers, layer_specs))

    def gather(self, tree: Tree, specs: Tree) -> Tree:
        """Whole along every axis but stage (and tensor): once a step, not once a microbatch."""

        def one(x, spec):
            for dimension, axis in reversed(list(self.shared_axes(spec))):
                x = jax.lax.all_gather(x, axis, axis=dimension, tiled=True)
            return x

        return jax.tree.map(one, tree, specs)

    def scatter(self, grads: Tree, specs: Tree) -> Tree:
        """Summed over the axes that the tokens are spread over, each device keeping what is its own."""

        def one(g, spec):
            own = list(self.shared_axes(spec))
            for dimension, axis in own:
                g = jax.lax.psum_scatter(g, axis, scatter_dimension=dimension, tiled=True)
            apart = {a for row in spec for a in ((row,) if isinstance(row, str) else row or ())}
            return jax.lax.psum(g, tuple(a for a in self.spread if a not in apart))

        return jax.tree.map(one, grads, specs)

    def shared_axes(self, spec: PartitionSpec):
        """(dimension, axis) of a parameter's shards, outermost first; not those of stage and tensor, which stay apart."""
        for dimension, row in enumerate(spec):
            for axis in (row,) if isinstance(row, str) else row or ():
                if axis not in (STAGE, TENSOR):
                    yield dimension, axis


def refuse(route: Route | None) -> None:
    if route is not None and any(x is not None for x in (route.layers, route.keep, route.scale)):
        raise ValueError(
            "in a pipeline the schedule says which stages a microbatch visits, and here a route says it too; set "
            "pipeline.schedule to skippipe, checkfree+ or a .csv file, or build the program with staged=False, which runs "
            "stages one after the other"
        )


def table_for(
    pipeline: PipelineConfig,
    sizes: Mapping[str, int],
    rules: Rules,
    batch: int,
    tensor: TensorConfig = TensorConfig(),
) -> Table:
    """The schedule of a batch of so many rows on a mesh of these sizes.

    Raises:
      ValueError: see `PipelineConfig.table` and `TensorConfig.check`, and a batch that does not divide.
    """
    axes = rules.mesh_axes("batch", "activations")
    devices = math.prod(sizes[a] for a in axes)
    if batch % devices:
        raise ValueError(f"a batch of {batch} rows does not divide over {devices} devices along {' and '.join(axes)}")
    rows = batch // devices
    # Attention over the sequence axis and products in rings permute, which no branch may hold.
    mixed = sizes[SEQUENCE] == 1 and not tensor.permutes(sizes)
    return replace(pipeline, microbatches=microbatches(pipeline, tensor, sizes, rows)).table(
        sizes[STAGE], rows, mixed=mixed
    )


def microbatches(pipeline: PipelineConfig, tensor: TensorConfig, sizes: Mapping[str, int], rows: int) -> int:
    """Into how many microbatches a device's rows are cut; of a number that is not given, so that each has its parts.

    Raises:
      ValueError: see `PipelineConfig.count` and `TensorConfig.check`.
    """
    parts = tensor.parts(sizes)
    tensor.check(sizes, rows=rows)
    if pipeline.microbatches is None:
        return pipeline.count(rows // parts, sizes[STAGE])
    m = pipeline.count(rows, sizes[STAGE])
    if rows // m % parts:
        near = min((d for d in range(1, rows + 1) if rows % (d * parts) == 0), key=lambda d: (abs(d - m), -d))
        raise ValueError(
            f"pipeline.microbatches = {m} makes {rows // m} of the {rows} rows on each device a microbatch, and "
            f"tensor.products = 'weave' cuts it in two halves; nearest that works: {near}"
        )
    return m


def straight(stages: int) -> Placement:
    """One chunk a device, in order."""
    return Placement(tuple((s,) for s in range(stages)))
