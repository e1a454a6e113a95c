"""Loss where every device holds a part of each row's tokens: by hand over `sequence`, GSPMD over the other axes.

Everything but attention works on each token alone, so the model runs as it is on a device's own tokens; attention is one
of `jaxpar.parallel.sequence`. Tokens are stored in the layout's order from here on: batches come in their own.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.pallas_kernels.varying import varying
from jaxpar.parallel.sequence.api import LOCAL, sequence_layout
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.parallel.sequence.layouts import Layout
from jaxpar.programs.whole import Loss
from jaxpar.step import Batch

AXIS = "sequence"
PER_ROW = ("sample_ids",)
"""The fields of a batch that have no dimension of tokens."""


def local_attention(config: SequenceConfig):
    """The attention function of a device that is inside a `shard_map` over `sequence` already."""
    run = LOCAL[config.attention]

    def attention(
        q, k, v, *, mask: MaskSpec, scale, cap=None, q_start=0, k_start=0, lse_out=False, implementation=None
    ):
        if (q_start, k_start) != (0, 0):
            raise ValueError(f"sequence attention has whole rows; q_start, k_start = {q_start}, {k_start} must be 0")
        options = dict(layout=config.layout, axis=AXIS, implementation=implementation)
        out, lse = run(q, k, v, mask=mask, scale=scale, cap=cap, **options)
        return (out, lse) if lse_out else out

    return attention


def arranged(layout: Layout, batch: Batch) -> Batch:
    """The batch with its tokens in stored order."""
    return replace(
        batch, **{f.name: layout.arrange(getattr(batch, f.name)) for f in fields(batch) if f.name not in PER_ROW}
    )


def batch_specs(rows: tuple[str, ...], tokens: str | None) -> Batch:
    """The `PartitionSpec` of each field, for a `shard_map`."""
    grid, row = PartitionSpec(rows or None, tokens), PartitionSpec(rows or None)
    return Batch(**{f.name: row if f.name in PER_ROW else grid for f in fields(Batch)})


def loss_fn(cfg: ModelConfig, mesh: Mesh, ops: Ops, config: SequenceConfig) -> Loss:
    """As `whole.loss_fn`. Differentiable from outside: gradients are summed over the axis once, at the end."""
    ops = replace(ops, attention=local_attention(config))

    def loss(params: Any, batch: Batch, key):
        layout = sequence_layout(mesh, batch.tokens.shape[1], layout=config.layout)
        places = jnp.asarray(layout.positions)

        def local(params, batch, places, key):
            params = jax.tree.map(lambda x: varying(x, {AXIS}), params)
            return jax.lax.psum(local_loss(cfg, ops, params, batch, places, key), AXIS)

        specs = (PartitionSpec(), batch_specs((), AXIS), PartitionSpec(AXIS), PartitionSpec())
        whole = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), axis_names={AXIS})
        return whole(params, arranged(layout, batch), places, key)

    return loss


def local_loss(cfg: ModelConfig, ops: Ops, params, batch: Batch, places, key):
    """The sums of a device's own tokens."""
    ctx = Context(batch.positions, batch.segments, key=key, sample_ids=batch.sample_ids, places=places, ops=ops)
    sums = decoder.loss(cfg, params, batch.tokens, batch.targets, batch.weights, ctx)
    return sums.loss_sum, sums.weight_sum
