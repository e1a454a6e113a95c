"""Sequence attention as a function of whole arrays, in place of `jaxpar.pallas_kernels.attention.attention`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.parallel.mesh import did_you_mean, mesh_sizes, product
from jaxpar.parallel.sequence.choose import KINDS, copies
from jaxpar.parallel.sequence.layouts import LAYOUTS, Layout, divides
from jaxpar.parallel.sequence.ring import ring_attention
from jaxpar.parallel.sequence.rsa import ring_self_attention
from jaxpar.parallel.sequence.tokenring import tokenring_attention
from jaxpar.parallel.sequence.ulysses import hybrid_attention, ulysses_attention

LOCAL: dict[str, Callable] = {
    "ring": ring_attention,
    "ring_bidirectional": partial(ring_attention, both_ways=True),
    "rsa": ring_self_attention,
    "tokenring": tokenring_attention,
    "ulysses": ulysses_attention,
    "hybrid": hybrid_attention,
}
"""Each kind on the shard of one device, for programs that are inside a `shard_map` already."""

Axis = str | tuple[str, str]


def sequence_layout(mesh: Any, length: int, *, layout: str = "contiguous", axis: Axis = "sequence") -> Layout:
    """How the tokens of a row must be stored for `sequence_attention` with these arguments.

    `arrange` puts tokens, targets, weights and segments in that order, once, where batches are made; `positions` are
    what a rotary or learned embedding reads (with packed documents: `arrange` the positions within documents).

    Args:
      mesh: a jax Mesh, a MeshConfig, or `{axis: size}`.
      axis: as in `sequence_attention`. Of a pair the outer one, the ring's, decides the layout.

    Raises:
      ValueError: an axis that the mesh lacks, or a length that does not divide.
    """
    sizes = mesh_sizes(mesh)
    axes = _axes(axis)
    _known(axes, sizes)
    divides(length, math.prod(sizes[a] for a in axes), f"the sequence axis {product({a: sizes[a] for a in axes})}")
    return Layout(layout, sizes[axes[0]], length)


def sequence_attention(
    mesh: jax.sharding.Mesh,
    *,
    kind: str = "ring",
    layout: str = "contiguous",
    axis: Axis = "sequence",
    heads: str = "tensor",
    batch: tuple[str, ...] = ("data", "fsdp"),
) -> Callable:
    """An attention function for a sequence that lies along a mesh axis.

    Args:
      mesh: rows lie on its `batch` axes, heads on its `heads` axis, tokens on `axis`; of these only `axis` must exist.
      kind: one of `choose.KINDS`; `choose.choose` says which suits.
      layout: one of `layouts.LAYOUTS`: the order in which tokens are stored (`sequence_layout`). Zigzag balances causal
        work in rings. For Ulysses it changes nothing but the cost of reordering.
      axis: the mesh axis of the tokens; for the hybrid a pair, (ring axis, Ulysses axis).

    Returns:
      A function with the signature of `jaxpar.pallas_kernels.attention.attention` but for T = S: q [B, T, H, K] and
      k, v [B, T, G, K] with tokens in stored order, and the mask's arrays too. Without indices in the mask, each token
      has its place in the whole sequence, whatever the layout. Differentiable in reverse mode, once; call it under
      `jit`. Key heads that do not divide over the `heads` axis are repeated until they do.

    Raises:
      ValueError: an unknown kind, layout or axis; the returned function: sizes that do not divide.
    """
    sizes = mesh_sizes(mesh)
    axes = _axes(axis)
    if kind not in KINDS:
        raise ValueError(
            f"unknown kind of sequence attention {kind!r}{did_you_mean(kind, KINDS)}; choose one of {', '.join(KINDS)}"
        )
    if layout not in LAYOUTS:
        raise ValueError(
            f"unknown layout {layout!r}{did_you_mean(layout, LAYOUTS)}; choose one of {', '.join(LAYOUTS)}"
        )
    if len(axes) != (2 if kind == "hybrid" else 1):
        wanted = "a pair of mesh axes, (ring, Ulysses)" if kind == "hybrid" else "one mesh axis"
        raise ValueError(f"sequence attention of kind {kind!r} needs {wanted}, got {axis!r}")
    _known(axes, sizes)
    rows = tuple(a for a in batch if a in sizes)
    heads_axis = heads if heads in sizes else None
    local = partial(LOCAL[kind], layout=layout, axis=axis)

    def attention(
        q_BxTxHxK,
        k_BxTxGxK,
        v_BxTxGxK,
        *,
        mask: MaskSpec,
        scale: float,
        cap: float | None = None,
        q_start=0,
        k_start=0,
        lse_out: bool = False,
        implementation: str | None = None,
    ):
        B, T, H, _ = q_BxTxHxK.shape
        S, G = k_BxTxGxK.shape[1:3]
        if S != T:
            raise ValueError(f"sequence attention needs as many keys as queries; got {S} keys and {T} queries")
        mask.check(B, T, S)
        order = sequence_layout(sizes, T, layout=layout, axis=axis)
        _rows_divide(B, {a: sizes[a] for a in rows})
        k, v = k_BxTxGxK, v_BxTxGxK
        if heads_axis is not None and (n := copies(H, G, sizes[heads_axis], f"mesh axis {heads_axis}")) > 1:
            k, v = (jnp.repeat(x, n, axis=2) for x in (k, v))
        mask = _with_indices(mask, order, q_start, k_start)
        arrays = {name: getattr(mask, name) for name in ("q_segments", "k_segments", "q_index", "k_index", "window")}
        arrays = {name: x for name, x in arrays.items() if x is not None and not isinstance(x, int)}

        def labels(name: str, x) -> PartitionSpec:
            if name == "window":
                return PartitionSpec()
            return PartitionSpec(rows if x.shape[0] == B else None, axes)

        def shard(q, k, v, arrays):
            options = dict(scale=scale, cap=cap, implementation=implementation)
            return local(q, k, v, mask=mask.replace(**arrays), **options)

        tokens = PartitionSpec(rows, axes, heads_axis)
        whole = jax.shard_map(
            shard,
            mesh=mesh,
            in_specs=(tokens, tokens, tokens, {name: labels(name, x) for name, x in arrays.items()}),
            out_specs=(tokens, PartitionSpec(rows, heads_axis, axes)),
        )
        out, lse = whole(q_BxTxHxK, k, v, arrays)
        return (out, lse) if lse_out else out

    return attention


def _axes(axis: Axis) -> tuple[str, ...]:
    return (axis,) if isinstance(axis, str) else tuple(axis)


def _known(axes: tuple[str, ...], sizes) -> None:
    for axis in axes:
        if axis not in sizes:
            raise ValueError(
                f"the mesh {product(sizes)} has no axis {axis!r}{did_you_mean(axis, sizes)} for sequence attention"
            )


def _rows_divide(batch: int, sizes) -> None:
    devices = math.prod(sizes.values())
    if batch % devices:
        nearest = max(1, (2 * batch + devices) // (2 * devices)) * devices
        raise ValueError(
            f"a batch of {batch} rows does not divide over the mesh axes {product(sizes)}; nearest that works: {nearest}"
        )


def _with_indices(mask: MaskSpec, order: Layout, q_start, k_start) -> MaskSpec:
    """The mask with indices of its own where the layout's do not do: given ones, or starts that may differ."""
    same = isinstance(q_start, int) and isinstance(k_start, int) and q_start == k_start
    if mask.q_index is None and mask.k_index is None and same:
        return mask  # only differences count
    places = jnp.asarray(order.positions)[None]
    q_index = places + q_start if mask.q_index is None else mask.q_index
    k_index = places + k_start if mask.k_index is None else mask.k_index
    return mask.replace(q_index=q_index, k_index=k_index)
