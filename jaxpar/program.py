"""Where models and parallelism are joined: a program makes gradients, and a step uses them.

`build` is the only place that knows both. What differs between meshes stands in `jaxpar.programs`; a step cannot tell
which program is inside, and a program cannot tell which transforms are around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpar.models import decoder
from jaxpar.models import spec as specs
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.parallel.mesh import mesh_sizes
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.pipeline.split import Split
from jaxpar.parallel.rules import Rules, batch_sharding, check, constrain, shardings
from jaxpar.parallel.sequence.choose import copies
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.parallel.tensor.config import TensorConfig
from jaxpar.programs.attention import Spread, check_attention
from jaxpar.programs.pipeline import PipelineProgram, straight, table_for
from jaxpar.programs.routes import over_routes
from jaxpar.programs.sequence import layout_for, settled
from jaxpar.programs.sequence import loss_fn as sequence_loss
from jaxpar.programs.tensor import hand_for, left, training_ops
from jaxpar.programs.tensor import loss_fn as tensor_loss
from jaxpar.programs.whole import Loss
from jaxpar.programs.whole import loss_fn as whole_loss
from jaxpar.quantise.training import Quantise
from jaxpar.step import Batch, Control, Gradients

Tree = Any


@dataclass(frozen=True)
class Program:
    """A model on a mesh.

    Attributes:
      cfg, mesh, rules: what it was built from.
      specs: every parameter's `ParamSpec`.
      param_shardings: a `NamedSharding` for each parameter.
      batch_sharding: of arrays [B, T] and [B] of a batch.
      ops: the functions that the blocks call in generation, with this mesh's sharding constraints.
      grad_fn: `(params, batch, control, key) -> Gradients`, sums over the global batch.
      eval_fn: `(params, batch, route=None) -> (loss_sum, weight_sum)`, without dropout: the whole model in order, or the
        layers of a route.
      notes: what was chosen for the run, a sentence each.
    """

    cfg: ModelConfig
    mesh: Mesh
    rules: Rules
    specs: Tree
    param_shardings: Tree
    batch_sharding: Any
    ops: Ops
    grad_fn: Callable[[Tree, Batch, Control, jax.Array], Gradients]
    eval_fn: Callable[..., tuple[jax.Array, jax.Array]]
    notes: tuple[str, ...] = ()

    def init(self, key) -> Tree:
        """Initial parameters, each shard made where it belongs; bitwise the same on every mesh."""
        return self.init_fn(key)

    @cached_property
    def init_fn(self):
        """`init` as a jitted function, which can be lowered before it is needed."""
        # It runs once: on a CPU, LLVM's full effort at the generators of random numbers takes three times as long to
        # compile and saves nothing.
        on_cpu = self.mesh.devices.flat[0].platform == "cpu"
        options = {"xla_backend_optimization_level": 1} if on_cpu else None
        fresh = partial(specs.init, self.specs)
        return jax.jit(fresh, out_shardings=self.param_shardings, compiler_options=options)


def build(
    cfg: ModelConfig,
    mesh: Mesh,
    rules: Rules | None = None,
    *,
    rows: int | None = None,
    length: int | None = None,
    pipeline: PipelineConfig | None = None,
    sequence: SequenceConfig | None = None,
    tensor: TensorConfig | None = None,
    quantise: Quantise | None = None,
    staged: bool | None = None,
) -> Program:
    """Join a model and a mesh.

    Args:
      rows: the global batch size, checked against the mesh. None: not checked.
      length: tokens of a row, checked likewise.
      pipeline: how microbatches pass through the stages, where the mesh has a stage axis larger than 1.
      sequence: how attention works, where the mesh has a sequence axis larger than 1.
      tensor: how products work, where the mesh has a tensor axis larger than 1.
      quantise: the number formats of layers' products in training and evaluation. None: the compute dtype.
      staged: build the pipeline's program. None: where there is more than one stage.

    Raises:
      ValueError: a dimension that its mesh axes do not divide, rules that collide, a schedule that these numbers do not
        allow; nothing has been traced then.
    """
    sequence = SequenceConfig() if sequence is None else sequence
    pipeline = PipelineConfig() if pipeline is None else pipeline
    tensor = TensorConfig() if tensor is None else tensor
    sizes = mesh_sizes(mesh)
    staged = sizes["stage"] > 1 if staged is None else staged
    first = mesh.devices.flat[0]
    on_host = sum(d.process_index == first.process_index for d in mesh.devices.flat)
    sequence, note = settled(sequence, cfg, sizes, first.device_kind, on_host, rows=rows, length=length)
    used = dict(pipeline=pipeline if staged else None, sequence=sequence, tensor=tensor, quantise=quantise)
    tree, rules = checked(cfg, sizes, rules, rows=rows, length=length, **used)
    hand = hand_for(tensor, sizes, tree, rules)
    check_attention(cfg, mesh, rules, rows, length, left=left(sizes, hand, staged), sequence=sequence.attention)
    param_shardings = shardings(tree, mesh, rules)
    # Tokens are spread by hand where they are spread at all; generation, which knows one token at a time, has them whole.
    ops = Ops(constrain=constrain(mesh, rules.with_activations(length=(), stream=())))
    training = training_ops(replace(ops, attention=Spread(mesh, rules)), tensor, mesh, rules)
    training = training if quantise is None else quantise.ops(training)
    if staged:
        pipes = PipelineProgram(cfg, mesh, rules, tree, training, pipeline, sequence, tensor)
        loss, gradients = pipes.loss, pipes.gradients
    elif sizes["sequence"] > 1:
        loss = sequence_loss(cfg, mesh, training, sequence, hand)
        gradients = differentiated(loss)
    elif hand is not None:
        loss = tensor_loss(cfg, mesh, training, hand)
        gradients = differentiated(loss)
    else:
        loss = whole_loss(cfg, training)
        gradients = differentiated(loss)

    def grad_fn(params, batch: Batch, control: Control, key) -> Gradients:
        if control is not None and control.route is not None:
            sums, grads = over_routes(gradients, params, batch, key, control.route)
        else:
            sums, grads = gradients(params, batch, key)
        if mesh.size > 1:
            # Gradients live where their parameters do, so that a sum over fsdp becomes a reduce-scatter.
            grads = jax.lax.with_sharding_constraint(grads, param_shardings)
        aux = {}
        if sums.exits is not None:
            aux = {f"exits/{layer}": sums.exits[i] for i, layer in enumerate((*cfg.exits.at, cfg.layers))}
        return Gradients(sums.loss_sum, sums.weight_sum.astype(jnp.float32), grads, aux)

    def eval_fn(params, batch: Batch, route=None):
        sums = loss(params, batch, None, route)
        return sums.loss_sum, sums.weight_sum

    return Program(
        cfg=cfg,
        mesh=mesh,
        rules=rules,
        specs=tree,
        param_shardings=param_shardings,
        batch_sharding=batch_sharding(mesh, rules),
        ops=ops,
        grad_fn=grad_fn,
        eval_fn=eval_fn,
        notes=(note,) if note else (),
    )


def checked(
    cfg: ModelConfig,
    mesh,
    rules: Rules | None = None,
    *,
    rows: int | None = None,
    length: int | None = None,
    pipeline: PipelineConfig | None = None,
    sequence: SequenceConfig = SequenceConfig(),
    tensor: TensorConfig = TensorConfig(),
    quantise: Quantise | None = None,
) -> tuple[Tree, Rules]:
    """Every parameter's `ParamSpec`, and the rules that hold on this mesh, once all that `build` is given fits together.

    No device is needed. Arguments as for `build`; `pipeline=None`: there is none.

    Raises:
      ValueError: as `build`.
    """
    sizes = mesh_sizes(mesh)
    tree = decoder.spec(cfg)
    rules = stage_rules(Rules() if rules is None else rules, cfg.layers, sizes)
    check(tree, sizes, rules, rows=rows, activations={} if length is None else {"length": length})
    if length is not None and sizes["sequence"] > 1:
        layout_for(sequence, sizes, length)
    copies(cfg.heads, cfg.kv_heads, sequence.exchanging(sizes["sequence"]), "mesh axis sequence")
    over = math.prod(sizes[a] for a in rules.mesh_axes("batch", "activations"))
    at_a_time = rows // over if rows is not None and pipeline is None else None
    tensor.check(sizes, rows=at_a_time, over=over, length=length)
    if quantise is not None:
        quantise.check(cfg, sizes, tensor, length)
    cfg.depth.check_spread(sizes["sequence"], tensor.permutes(sizes))
    if pipeline is not None:
        placement = straight(sizes["stage"])
        if cfg.depth.sparse and pipeline.executor == "autodiff":
            raise ValueError(
                "pipeline.executor = 'autodiff' differentiates what waiting stages compute too, and mixture of depths puts the "
                "gradient of its predictors in where each layer is; leave the executor at auto"
            )
        if rows is not None:
            order = table_for(pipeline, sizes, rules, rows, tensor).order
            placement = order.placement
            if any(list(path) != list(range(placement.stages)) for path in order.paths):
                cfg.residual.check_route(order.paths)
                cfg.exits.check_paths(order.paths, placement.stages)
        Split(cfg.layers, placement)
    return tree, rules


def differentiated(loss: Loss):
    """(params, batch, key, route=None) -> `LossSums` and the gradient of loss_sum, by JAX."""

    def total(*args):
        sums = loss(*args)
        return sums.loss_sum, sums

    def gradients(params: Tree, batch: Batch, key, route=None):
        (_, sums), grads = jax.value_and_grad(total, has_aux=True)(params, batch, key, route)
        return sums, grads

    return gradients


def stage_rules(rules: Rules, layers: int, mesh) -> Rules:
    """The rules for a stack that does not divide over the stages: it is stored whole on each of them, and dealt out
    unevenly when a step runs."""
    stages = math.prod(mesh_sizes(mesh)[axis] for axis in rules.mesh_axes("layers"))
    return rules.with_params(layers=()) if layers % stages else rules
