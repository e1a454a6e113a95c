"""Loss where every device holds a part of each row's tokens: by hand over `sequence` and the batch's axes. Where the tensor
axis has several devices and products are not by hand, GSPMD has it, and the batch's axes with it.

Nearly everything but attention works on each token alone, so the model runs as it is on a device's own tokens; attention is
one of `jaxpar.parallel.sequence`, and a residual operator that looks at earlier tokens gets those of other devices by
`jaxpar.models.reach`. Tokens are stored in the layout's order from here on: batches come in their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxpar.flops import peak
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.models.route import Route
from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.pallas_kernels.varying import varying
from jaxpar.parallel.rules import itemsize
from jaxpar.parallel.sequence.api import LOCAL, sequence_layout
from jaxpar.parallel.sequence.choose import Workload
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.parallel.sequence.layouts import Layout
from jaxpar.parallel.sequence.links import links_of
from jaxpar.parallel.sequence.rows import SpreadRows
from jaxpar.programs.whole import Loss
from jaxpar.step import Batch

if TYPE_CHECKING:
    from jaxpar.programs.tensor import Hand

AXIS = "sequence"
RING, EXCHANGE = "ring", "exchange"
"""The two axes that a hybrid makes of it."""
PER_ROW = ("sample_ids",)
"""The fields of a batch that have no dimension of tokens."""


def settled(
    config: SequenceConfig,
    cfg: ModelConfig,
    sizes: Mapping[str, int],
    device_kind: str,
    on_host: int,
    *,
    rows: int | None,
    length: int | None,
) -> tuple[SequenceConfig, str]:
    """The kind of attention of a run: the one that is named, or what the rule picks for these heads and links.

    Args:
      sizes: of the mesh.
      on_host: devices of one host, of which the tensor axis takes the nearest.
      rows: of a whole batch, of which each device of `data` and `fsdp` has a part. None: one row each.

    Returns:
      The configuration, and what was chosen and why, in a sentence (none where a kind is named, or one device has
      whole rows).

    Raises:
      ValueError: `auto` without the length of a row.
    """
    devices = sizes[AXIS]
    if config.attention != "auto":
        return config, ""
    if devices == 1:
        return replace(config, attention="ring"), ""
    if length is None:
        raise ValueError(
            "sequence.attention = 'auto' picks a kind by the length of a row: give `length`, or name a kind"
        )
    tensor = sizes["tensor"]
    work = Workload(
        length,
        cfg.heads // tensor,
        max(1, cfg.kv_heads // tensor),
        cfg.head_size,
        devices,
        itemsize=itemsize(cfg.dtype),
        batch=max(1, (rows or 1) // (sizes["data"] * sizes["fsdp"])),
    )
    inner = min(devices, max(1, on_host // tensor))
    found, why = config.settled(work, links_of(device_kind, inner, devices, peak(device_kind)))
    return found, f"sequence.attention = auto: {found.attention} ({why})"


def by_hand(mesh: Mesh, config: SequenceConfig) -> tuple[Mesh, tuple[str, ...]]:
    """The mesh of the `shard_map` and its axes that tokens lie on: a hybrid has two in place of one, the same devices in
    the same order."""
    devices = dict(mesh.shape)[AXIS]
    if config.attention != "hybrid":
        return mesh, (AXIS,)
    inner = config.exchanging(devices)
    shape, names = [], []
    for name, size in mesh.shape.items():
        shape += [size // inner, inner] if name == AXIS else [size]
        names += [RING, EXCHANGE] if name == AXIS else [name]
    types = (AxisType.Auto,) * len(names)
    return Mesh(mesh.devices.reshape(shape), tuple(names), axis_types=types), (RING, EXCHANGE)


def layout_for(config: SequenceConfig, sizes: Mapping[str, int], length: int) -> Layout:
    """How the tokens of a row lie on a mesh of these sizes.

    Raises:
      ValueError: a length that does not divide.
    """
    if config.attention != "hybrid":
        return sequence_layout(sizes, length, layout=config.layout)
    inner = config.exchanging(sizes[AXIS])
    return sequence_layout(
        {RING: sizes[AXIS] // inner, EXCHANGE: inner}, length, layout=config.layout, axis=(RING, EXCHANGE)
    )


def local_attention(config: SequenceConfig, axes: tuple[str, ...], interpret=False):
    """The attention function of a device that is inside a `shard_map` over these axes of the tokens already. `interpret`: as
    in `attention`, of a ring's kernels."""
    run = partial(LOCAL[config.attention], **({"interpret": interpret} if interpret else {}))

    def attention(
        q, k, v, *, mask: MaskSpec, scale, cap=None, q_start=0, k_start=0, lse_out=False, implementation=None
    ):
        if (q_start, k_start) != (0, 0):
            raise ValueError(f"sequence attention has whole rows; q_start, k_start = {q_start}, {k_start} must be 0")
        axis = axes if len(axes) > 1 else axes[0]
        options = dict(layout=config.layout, axis=axis, implementation=implementation)
        out, lse = run(q, k, v, mask=mask, scale=scale, cap=cap, **options)
        return (out, lse) if lse_out else out

    return attention


def arranged(layout: Layout, batch: Batch) -> Batch:
    """The batch with its tokens in stored order."""
    return replace(
        batch, **{f.name: layout.arrange(getattr(batch, f.name)) for f in fields(batch) if f.name not in PER_ROW}
    )


def batch_specs(rows: tuple[str, ...], tokens: tuple[str, ...]) -> Batch:
    """The `PartitionSpec` of each field, for a `shard_map`."""
    grid, row = PartitionSpec(rows or None, tokens or None), PartitionSpec(rows or None)
    return Batch(**{f.name: row if f.name in PER_ROW else grid for f in fields(Batch)})


def loss_fn(cfg: ModelConfig, mesh: Mesh, ops: Ops, config: SequenceConfig, hand: Hand | None = None) -> Loss:
    """As `whole.loss_fn`. Differentiable from outside: gradients are summed over the axis once, at the end.

    Args:
      ops: attention is a `jaxpar.programs.attention.Spread`.
      hand: further axes to be manual over, and how parameters lie on them. None: GSPMD has the batch's and tensor's.
    """
    inside, tokens = by_hand(mesh, config)
    interpret = ops.attention.interpret
    ops = replace(ops, attention=local_attention(config, tokens, interpret), rows=SpreadRows(config.layout, tokens))
    axes, rows, param_specs, gather = tokens, (), PartitionSpec(), lambda params: params
    if hand is not None:
        axes, rows, param_specs, gather = (*tokens, *hand.axes), hand.rows, hand.params, hand.gather
        ops = hand.ops(ops)
    # The axes of one device too: attention's kernels ask for all axes of the mesh.
    manual = set(axes) | {a for a, size in inside.shape.items() if size == 1}

    def loss(params: Any, batch: Batch, key, route: Route | None = None):
        layout = layout_for(config, dict(mesh.shape), batch.tokens.shape[1])
        places = jnp.asarray(layout.positions)

        def local(params, batch, places, key, route):
            params = gather(jax.tree.map(lambda x: varying(x, axes), params))
            return jax.lax.psum(local_loss(cfg, ops, params, batch, places, key, route), axes)

        specs = (param_specs, batch_specs(rows, tokens), PartitionSpec(tokens), PartitionSpec(), PartitionSpec())
        options = dict(axis_names=manual, check_vma=not interpret)
        whole = jax.shard_map(local, mesh=inside, in_specs=specs, out_specs=PartitionSpec(), **options)
        return whole(params, arranged(layout, batch), places, key, route)

    return loss


def local_loss(cfg: ModelConfig, ops: Ops, params, batch: Batch, places, key, route: Route | None = None):
    """The sums of a device's own tokens: `LossSums`."""
    tokens = dict(positions=batch.positions, segments=batch.segments, sample_ids=batch.sample_ids, places=places)
    ctx = Context(**tokens, key=key, route=route, ops=ops)
    return decoder.loss(cfg, params, batch.tokens, batch.targets, batch.weights, ctx)
