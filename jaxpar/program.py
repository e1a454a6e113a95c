"""Where models and parallelism are joined: a program makes gradients, and a step uses them.

`build` is the only place that knows both. Plain `jit` and GSPMD over data, fsdp and tensor axes differ only in here; a
step cannot tell which program is inside, and a program cannot tell which transforms are around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpar.models import decoder
from jaxpar.models import spec as specs
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.parallel.rules import Rules, batch_sharding, check, constrain, shardings
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
      ops: the functions that the blocks call, with this mesh's sharding constraints.
      grad_fn: `(params, batch, control, key) -> Gradients`, sums over the global batch.
      eval_fn: `(params, batch) -> (loss_sum, weight_sum)`, without dropout.
    """

    cfg: ModelConfig
    mesh: Mesh
    rules: Rules
    specs: Tree
    param_shardings: Tree
    batch_sharding: Any
    ops: Ops
    grad_fn: Callable[[Tree, Batch, Control, jax.Array], Gradients]
    eval_fn: Callable[[Tree, Batch], tuple[jax.Array, jax.Array]]

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


def build(cfg: ModelConfig, mesh: Mesh, rules: Rules | None = None, *, rows: int | None = None) -> Program:
    """Join a model and a mesh.

    Args:
      rows: the global batch size, checked against the mesh. None: not checked.

    Raises:
      ValueError: a dimension that its mesh axes do not divide, or rules that collide; nothing has been traced then.
    """
    rules = Rules() if rules is None else rules
    tree = decoder.spec(cfg)
    check(tree, dict(mesh.shape), rules, rows=rows)
    param_shardings = shardings(tree, mesh, rules)
    ops = Ops(constrain=constrain(mesh, rules))

    def context(batch: Batch, key) -> Context:
        return Context(batch.positions, batch.segments, key=key, sample_ids=batch.sample_ids, ops=ops)

    def loss(params, batch: Batch, key):
        sums = decoder.loss(cfg, params, batch.tokens, batch.targets, batch.weights, context(batch, key))
        return sums.loss_sum, sums.weight_sum

    def grad_fn(params, batch: Batch, control: Control, key) -> Gradients:
        (loss_sum, weight_sum), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        if mesh.size > 1:
            # Gradients live where their parameters do, so that a sum over fsdp becomes a reduce-scatter.
            grads = jax.lax.with_sharding_constraint(grads, param_shardings)
        return Gradients(loss_sum, weight_sum.astype(jnp.float32), grads)

    return Program(
        cfg=cfg,
        mesh=mesh,
        rules=rules,
        specs=tree,
        param_shardings=param_shardings,
        batch_sharding=batch_sharding(mesh, rules),
        ops=ops,
        grad_fn=grad_fn,
        eval_fn=lambda params, batch: loss(params, batch, None),
    )
