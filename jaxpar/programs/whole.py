"""Loss and gradients where no axis needs a hand: the partitioner spreads one program over data, fsdp and tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.models.route import Route
from jaxpar.step import Batch

Tree = Any
Loss = Callable[..., decoder.LossSums]
"""(params, batch, key or None, route=None) -> sums over the batch's tokens."""


def loss_fn(cfg: ModelConfig, ops: Ops) -> Loss:
    """The loss of a whole batch."""

    def loss(params: Tree, batch: Batch, key, route: Route | None = None):
        ctx = Context(batch.positions, batch.segments, key=key, sample_ids=batch.sample_ids, route=route, ops=ops)
        return decoder.loss(cfg, params, batch.tokens, batch.targets, batch.weights, ctx)

    return loss
