"""Attention on a mesh: kernels, which the compiler cannot split over devices, run by hand on each device's rows and heads.

No row and no head needs another one, so a `shard_map` over all axes that are not manual yet costs no communication: the
batch's axes share rows, the tensor axis heads, and the others hold copies. A `shard_map` around it already (a pipeline's, or
of products by hand) must be manual over every axis: nested ones cannot be differentiated in JAX 0.10, which gives what is
kept for the backward pass shardings that its own compiler refuses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxpar.models.config import ModelConfig
from jaxpar.models.layers import kinds
from jaxpar.pallas_kernels.attention import ATTENTION, MaskSpec, attention
from jaxpar.pallas_kernels.attention.differentiable import Plan, attend
from jaxpar.pallas_kernels.attention.sinks import with_sinks
from jaxpar.pallas_kernels.dispatch import Implementation
from jaxpar.parallel.mesh import product
from jaxpar.parallel.rules import Rules
from jaxpar.parallel.sequence.choose import copies


@dataclass(frozen=True)
class Spread:
    """`attention` of arrays that lie on a mesh by rules: what a model calls in training.

    Attributes:
      mesh, rules: as in `jaxpar.program.Program`.
      interpret: as in `attention`, of a kernel that is named and run by hand here.
    """

    mesh: Mesh
    rules: Rules
    interpret: Any = False

    def __call__(
        self,
        q_BxTxHxK,
        k_BxSxGxK,
        v_BxSxGxK,
        *,
        mask: MaskSpec,
        implementation: str | None = None,
        q_start=0,
        k_start=0,
        sinks_H=None,
        lse_out=False,
        **call,
    ):
        """As `attention`. What is no kernel, the partitioner splits, and nothing is done here.

        Raises:
          ValueError: a named kernel, and rows or heads that do not divide over their devices.
        """
        context = jax.sharding.get_abstract_mesh()
        if self.mesh.size == 1 or not context.empty:
            more = dict(q_start=q_start, k_start=k_start, sinks_H=sinks_H, lse_out=lse_out)
            return attention(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask=mask, implementation=implementation, **more, **call)
        arrays, starts = (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK), (q_start, k_start)
        options = call | {"mask": mask, "q_start": q_start, "k_start": k_start}
        shares = self.shares(*arrays)
        kernel = self.kernel(implementation, shares, options | {"lse_out": lse_out or sinks_H is not None})
        if kernel is None:
            more = options | {"sinks_H": sinks_H, "lse_out": lse_out, "implementation": implementation}
            return attention(*arrays, **more)
        if (copied := shares[1].shape[2] * self.size("heads") // k_BxSxGxK.shape[2]) > 1:
            # Fewer key/value heads than devices: each has what its queries share, and the transpose sums gradients.
            arrays = (arrays[0], *(jnp.repeat(x, copied, axis=2) for x in arrays[1:]))
        with jax.sharding.use_abstract_mesh(alone(self.mesh)):
            plan = kernel.run(*shares, **options, interpret=self.interpret)
        out, lse = attend(Shared(plan, self), *arrays, mask, starts)
        if sinks_H is not None:
            out, lse = with_sinks(out, lse, sinks_H)
        return (out, lse) if lse_out else out

    def axes(self, axis: str) -> dict[str, int]:
        """The mesh axes that rows ("batch") or heads ("heads") lie on, and their sizes."""
        return {a: self.mesh.shape[a] for a in self.rules.mesh_axes(axis, "activations")}

    def size(self, axis: str) -> int:
        """Over how many devices."""
        return math.prod(self.axes(axis).values())

    def kernel(self, name: str | None, shares: tuple | str, options) -> Implementation | None:
        """The kernel that each device runs on its share: the named one, or what None chooses; None where it is none."""
        if name is not None and not ATTENTION.named(name).kernel:
            return None
        if isinstance(shares, str):
            if name is None:
                return None
            raise ValueError(f'attention with implementation="{name}" {shares}')
        interpret = self.interpret if name is not None else False
        with jax.sharding.use_abstract_mesh(alone(self.mesh)):
            found = ATTENTION.choose(name, *shares, interpret=interpret, **options).default
        return found if found.kernel else None

    def shares(self, q, k, v) -> tuple | str:
        """What a device has of q, k and v, shapes and dtypes; or why rows or heads cannot be shared out, as the end of a
        sentence."""
        over_rows, over_heads = self.size("batch"), self.size("heads")
        named = lambda axis: product(self.axes(axis))
        (B, _, H, _), G = q.shape, k.shape[2]
        if B % over_rows:
            return f"takes whole rows, and {B} do not divide over {named('batch')}; use a multiple of {over_rows}"
        if H % over_heads:
            near = max(n for n in range(1, over_heads) if H % n == 0)
            return (
                f"takes whole heads, and {H} query heads do not divide over {named('heads')}; use {near} instead of "
                f"{over_heads} devices there"
            )
        copied = G * copies(H, G, over_heads)
        cut = lambda x, n: jax.ShapeDtypeStruct((B // over_rows, x.shape[1], n // over_heads, x.shape[3]), x.dtype)
        return cut(q, H), cut(k, copied), cut(v, copied)


@dataclass(frozen=True)
class Shared:
    """A plan whose two passes run on each device's rows and heads.

    Attributes:
      plan: of a device's share.
      spread: where rows and heads lie.
    """

    plan: Plan
    spread: Spread

    def forward(self, q, k, v, mask, starts):
        array, row, _ = self.specs
        return self.run(self.plan.forward, (array,) * 3, (array, row), mask, starts, q, k, v)

    def backward(self, q, k, v, mask, starts, lse, drop, d_out):
        array, row, _ = self.specs
        places = (array, array, array, row, row, array)
        return self.run(self.plan.backward, places, (array,) * 3, mask, starts, q, k, v, lse, drop, d_out)

    @property
    def specs(self) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
        """Of arrays [B, T, heads, K], of [B, heads, T], and of [B, T]."""
        rows, heads = (tuple(self.spread.axes(axis)) or None for axis in ("batch", "heads"))
        return PartitionSpec(rows, None, heads), PartitionSpec(rows, heads), PartitionSpec(rows)

    def run(self, function: Callable, places, outs, mask, starts, *arrays):
        """`function(q, k, v, mask, starts, *rest)` on each device."""
        *_, labels = self.specs
        # `shard_map` takes arrays only.
        told = jax.tree.map(jnp.asarray, (mask, starts))
        # One row of labels may stand for all.
        place = lambda x: labels if x.ndim and x.shape[0] == arrays[0].shape[0] else PartitionSpec()

        def local(told, *arrays):
            return function(*arrays[:3], *told, *arrays[3:])

        return jax.shard_map(
            local,
            mesh=self.spread.mesh,
            in_specs=(jax.tree.map(place, told), *places),
            out_specs=outs,
            # The interpreter's loops do not keep account of what differs between devices.
            check_vma=not self.spread.interpret,
        )(told, *arrays)


def alone(mesh: Mesh) -> AbstractMesh:
    """One of the mesh's devices, to be asked what it runs."""
    return AbstractMesh((), (), abstract_device=mesh.abstract_mesh.abstract_device)


def check_attention(
    cfg: ModelConfig,
    mesh: Mesh,
    rules: Rules,
    rows: int | None,
    length: int | None,
    *,
    left: tuple[str, ...] = (),
    sequence: str = "ring",
) -> None:
    """Whether the implementation of attention that a model names can do what a program will ask of it. Nothing is traced.

    Args:
      rows, length: of the batch. None: one on each device, and the model's context.
      left: the axes that the partitioner has inside of the program's `shard_map`, see `jaxpar.programs.tensor.left`.
      sequence: the kind of attention where tokens lie on several devices.

    Raises:
      ValueError: an implementation that does not run on these devices or with these shapes, heads that do not divide over
        them; a kernel inside of a pipeline, or where tokens lie on several devices, with axes that are left to the compiler.
    """
    if (name := cfg.attention_implementation) is None:
        return
    sizes, spread = dict(mesh.shape), Spread(mesh, rules)
    B, T = spread.size("batch") if rows is None else rows, length or cfg.context
    shape = lambda heads: jax.ShapeDtypeStruct((B, T, heads, cfg.head_size), jnp.dtype(cfg.dtype))
    shares = shape(cfg.heads), shape(cfg.kv_heads), shape(cfg.kv_heads)
    if kernel := ATTENTION.named(name).kernel and mesh.size > 1:
        shares = spread.shares(*shares)
        if isinstance(shares, str):
            raise ValueError(f'model.attention_implementation: attention with implementation="{name}" {shares}')
    sliding = kinds(cfg)
    traced = jax.ShapeDtypeStruct((), jnp.int32)
    window = traced if len(sliding) > 1 else cfg.window if any(sliding) else None
    segments = jax.ShapeDtypeStruct(shares[0].shape[:2], jnp.int32)
    mask = MaskSpec(window=window, q_segments=segments, k_segments=segments)
    call = dict(mask=mask, scale=cfg.scale, cap=cfg.attention_cap, lse_out=sizes["sequence"] > 1)
    with jax.sharding.use_abstract_mesh(alone(mesh)):
        try:
            ATTENTION.choose(name, *shares, **call)
        except ValueError as error:
            raise ValueError(f"model.attention_implementation: {error}") from None
    if kernel and sizes["sequence"] > 1 and sequence == "rsa":
        raise ValueError(
            f'model.attention_implementation = "{name}" is a kernel, and sequence.attention = "rsa" holds whole rows of '
            f'scores; use "xla", or another kind'
        )
    if kernel and left:
        where = "where tokens lie on several devices" if sizes["sequence"] > 1 else "inside of a pipeline"
        fix = 'tensor.products = "gathered"' if "tensor" in left else f"a mesh without {' and '.join(left)}"
        raise ValueError(
            f'model.attention_implementation = "{name}" is a kernel, which the compiler cannot split over '
            f'{product({a: sizes[a] for a in left})} {where}; use "xla", or {fix}'
        )
