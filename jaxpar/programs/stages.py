"""The model as the parts of a pipeline: what enters, a stage's layers, the loss, and the exits that lie inside of stages.

What crosses a boundary is the residual operator's wire, and beside it what routers counted so far (`Tally`: two numbers a row),
for their budget is held over all layers and its loss is taken behind the last. Losses at exits send nothing, see
`jaxpar.parallel.pipeline.execute`. A distance of an exit's state from the last layer's (FREE's distillation) needs both in one
place: then the exit's wire travels beside the stream's to the last stage, zeros until the exit, and the gradient comes back by
the same way. As messages have one shape, every boundary carries it: twice the bytes of the wire, forwards and backwards
([B, T, D] more for a plain stream), and twice the buffer of a stage's inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.parallel.pipeline.execute import Parts
from jaxpar.parallel.pipeline.split import Split
from jaxpar.step import Batch

Tree = Any


@dataclass(frozen=True)
class Places:
    """Where exits lie inside of the stages of a split.

    Attributes:
      at: behind how many layers of the model each exit is.
    """

    at: tuple[int, ...]
    split: Split

    @cached_property
    def found(self) -> dict[int, tuple[int, int]]:
        """For each exit: the virtual stage, and behind how many of its layers."""
        stages = list(enumerate(self.split.of_stage))
        return {layer: (s, layer - r.start) for layer in self.at for s, r in stages if r.start < layer <= r.stop}

    @cached_property
    def cuts(self) -> tuple[int, ...]:
        """Behind how many layers of a stage there are exits in any of them, rising. All stages run one program."""
        return tuple(sorted({cut for _, cut in self.found.values()}))

    def of(self, cut: int) -> tuple[int, ...]:
        """The exits there."""
        return tuple(layer for layer in self.at if self.found[layer][1] == cut)

    @cached_property
    def which(self) -> np.ndarray:
        """int32 [P, C, cuts]: which exit of a place each chunk has, from 1; 0: none."""
        number = {(s, cut): 1 + self.of(cut).index(layer) for layer, (s, cut) in self.found.items()}
        grid = self.split.placement.grid
        return np.array([[[number.get((s, c), 0) for c in self.cuts] for s in device] for device in grid], np.int32)


def parts_of(cfg: ModelConfig, split: Split, context: Callable[[Batch], Context], weights=None) -> Parts:
    """The model in the stages of `split`.

    Args:
      context: (microbatch) -> what its calls bring.
      weights: float32 [exits + 1], what the losses at the exits and at the last layer weigh. None: the last one's alone.

    Returns:
      `Parts`. `middle` is told (first layer, number of layers, which exits). Where weights are given, `last` gives the
      objective, the n exits' losses and the last layer's; else the loss.
    """
    places = Places(() if weights is None else cfg.exits.at, split)
    divisor = math.gcd(*(layers.start for layers in split.of_stage), *places.cuts)
    distillation = cfg.exits.loss.distillation if places.at else 0.0

    def start(shared, micro):
        ctx = context(micro)
        wire = decoder.to_wire(cfg, decoder.embed(cfg, shared, micro.tokens, ctx), ctx)
        kept = jax.tree.map(jnp.zeros_like, wire) if distillation else None
        return wire, cfg.feedforward.tally(cfg, ctx, micro.tokens.shape[0]), kept

    def middle(layers, message, piece, micro):
        (first, count, which), ctx = piece, context(micro)
        wire, tally, kept = message
        state, at_exits, begin = decoder.from_wire(cfg, wire, ctx), [], 0
        for cut, some in sliced(layers, places.cuts, split.largest):
            state, tally = run(some, state, tally, ctx, first + begin, count - begin)
            begin = cut
            if cut in places.cuts:
                here = decoder.to_wire(cfg, state, ctx)
                if distillation:
                    kept = jax.tree.map(partial(jnp.where, which[len(at_exits)] > 0), here, kept)
                at_exits.append(here)
        out = decoder.to_wire(cfg, state, ctx), tally, kept
        return (out, at_exits) if places.at else out

    def run(layers, state, tally, ctx, first, count):
        if split.even:
            state, aux = decoder.blocks(cfg, layers, state, ctx, first, tally, divisor)
            return state, aux.tally
        return some_layers(cfg, layers, state, tally, ctx, first, count)

    def loss(number: int, at: int | None, shared, wire, micro):
        ctx = context(micro)
        state = decoder.from_wire(cfg, wire, ctx)
        found = decoder.head(cfg, shared, state, ctx, micro.targets, micro.weights, at=at).loss_sum
        if weights is None:
            return found
        return found * jnp.append(weights[number], np.eye(len(places.at) + 1, dtype=np.float32)[number])

    def end(shared, message, micro):
        (wire, tally, kept), ctx = message, context(micro)
        found, more = loss(len(places.at), None, shared, wire, micro), jnp.zeros((), jnp.float32)
        if distillation:
            last, shown = (decoder.from_wire(cfg, x, ctx) for x in (wire, kept))
            more += distillation * decoder.distance(cfg, shared, last, ctx, micro.weights, shown, places.at[0])
        if tally is not None and ctx.key is not None:
            more += cfg.feedforward.penalty(cfg, tally, ctx, micro.weights)
        return found + more if weights is None else found.at[0].add(more)

    exit_at = lambda layer: partial(loss, places.at.index(layer), layer)
    return Parts(
        first=start,
        middle=middle,
        last=end,
        exits=tuple(tuple(map(exit_at, places.of(cut))) for cut in places.cuts),
        which=lambda piece: piece[2],
    )


def sliced(layers: Tree, cuts: tuple[int, ...], n: int) -> list[tuple[int, Tree]]:
    """The layers up to each cut, and the rest of n: (where it ends, those)."""
    ends = sorted({*cuts, n})
    if len(ends) == 1:
        return [(n, layers)]
    leaves, tree = jax.tree.flatten(layers)
    # One split, whose gradient joins the parts.
    parts = zip(*(jnp.split(leaf, ends[:-1]) for leaf in leaves), strict=True)
    return [(end, jax.tree.unflatten(tree, part)) for end, part in zip(ends, parts, strict=True)]


def some_layers(cfg: ModelConfig, layers: Tree, state, tally, ctx: Context, first, count):
    """The first `count` of n layers, `count` traced: the others run too, on copies, and are thrown away."""
    n = jax.tree.leaves(layers)[0].shape[0]

    def one(carry, xs):
        layer, j = xs
        state, tally = carry
        own = jax.tree.map(lambda x: x[None], layer)
        run, aux = decoder.blocks(cfg, own, state, ctx, first + jnp.minimum(j, count - 1), tally)
        return jax.tree.map(partial(jnp.where, j < count), (run, aux.tally), carry), None

    carry = state, tally
    if cfg.layer_loop == "unroll":
        for j in range(n):
            carry, _ = one(carry, (jax.tree.map(lambda x, j=j: x[j], layers), jnp.int32(j)))
        return carry
    return jax.lax.scan(one, carry, (layers, jnp.arange(n)))[0]
