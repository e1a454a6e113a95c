"""The decoder in three functions: `embed`, `blocks` over any contiguous slice of the stack of layers, and `head`.

    embed (cfg, params, tokens, ctx)                   -> state
    blocks(cfg, stacked, state, ctx, first_layer=0)    -> state, Aux
    head  (cfg, params, state, ctx, targets=None)      -> logits | LossSums
    apply = head ∘ blocks ∘ embed

Written for one device: what makes it parallel comes from outside, by shardings and by `ctx.ops`. A pipeline stage, a
streamed window of layers, an early exit and a zeroth-order pass call `blocks` on a slice and nothing else.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxpar.models import layers, reach
from jaxpar.models import spec as specs
from jaxpar.models.cache import Pages
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Cache, Context, Ops, dropout
from jaxpar.models.loss import cross_entropy
from jaxpar.models.residual import write_once
from jaxpar.models.residual.base import Behind
from jaxpar.models.route import Route
from jaxpar.models.routing import skip
from jaxpar.models.routing.record import Record
from jaxpar.models.shards import cut, join
from jaxpar.models.spec import Normal, ParamSpec
from jaxpar.pallas_kernels.varying import alike

Tree = Any


@struct.dataclass
class Aux:
    """What the blocks give besides the state.

    Attributes:
      cache: the cache after these layers' keys and values were written; None where none was given. `lens` is
        unchanged: the caller knows how many of the tokens were real.
      record: what was left out, where `ctx.skip` says so.
      tally: what a feed-forward layer with a router counted.
    """

    cache: Cache | None = None
    record: Record | None = None
    tally: Any = None


@struct.dataclass
class Output:
    """What a whole pass gives.

    Attributes:
      logits: float32 [B, T, V].
      aux: see `Aux`.
    """

    logits: jax.Array
    aux: Aux


@struct.dataclass
class LossSums:
    """Sums over tokens, float32: they add up over microbatches.

    Attributes:
      loss_sum: the weighted sum of token losses (nats); what training minimises.
      weight_sum: the sum of weights.
      exits: [n + 1], the weighted sums of token losses at n exits and, last, at the last layer, where exits are trained.
    """

    loss_sum: jax.Array
    weight_sum: jax.Array
    exits: jax.Array | None = None


def spec(cfg: ModelConfig) -> Tree:
    """Every parameter's `ParamSpec`, layers stacked."""
    embedding = {"tokens": ParamSpec((cfg.vocabulary, cfg.width), ("vocabulary", "embed"), Normal(cfg.init_std))}
    first = {"residual": residual} if (residual := cfg.residual.first_spec(cfg)) else {}
    head = {"norm": cfg.norm.spec(cfg.width)}
    if residual := cfg.residual.head_spec(cfg):
        head["residual"] = residual
    if exits := cfg.exits.spec(cfg):
        head["exits"] = exits
    if not cfg.tied_embeddings:
        head["unembed"] = {
            "kernel": ParamSpec((cfg.width, cfg.vocabulary), ("embed", "vocabulary"), Normal(cfg.init_std))
        }
    return {
        "embedding": {**embedding, **cfg.positions.spec(cfg), **first},
        "layers": specs.stack(layers.spec(cfg), cfg.layers),
        "head": head,
    }


def init(cfg: ModelConfig, key) -> Tree:
    """Initial parameters: bitwise equal on every mesh (jit it with `out_shardings` to make them where they belong)."""
    return specs.init(spec(cfg), key)


def embed(cfg: ModelConfig, params: Tree, tokens_BxT, ctx: Context):
    """Token (and learned position) embeddings -> the residual operator's state at the first layer.

    Where rows go through the layers in several parts, the state is a tuple of theirs.
    """
    chex.assert_rank(tokens_BxT, 2)
    shards = ctx.ops.shards
    if shards.parts > 1:
        return tuple(embed(cfg, params, *part) for part in zip(cut(tokens_BxT, shards.parts), ctx.cut(), strict=True))
    dtype = jnp.dtype(cfg.dtype)
    # Spread as an activation before the lookup: with its width still sharded, XLA's partitioner gives up on resharding
    # what was looked up, and replicates it ("involuntary full rematerialization").
    table_VxD = ctx.ops.constrain(params["embedding"]["tokens"], ("vocabulary", "embed"))

    def embedded(x_BxSxD, positions_BxS):
        x_BxSxD = x_BxSxD.astype(dtype)
        if cfg.embedding_scale is not None:
            x_BxSxD = x_BxSxD * jnp.asarray(cfg.embedding_scale, dtype)
        if "positions" in params["embedding"]:
            table_PxD = ctx.ops.constrain(params["embedding"]["positions"], (None, "embed"))
            x_BxSxD = x_BxSxD + table_PxD[positions_BxS].astype(dtype)
        return x_BxSxD

    positions_BxT = ctx.positions_of(tokens_BxT.shape)
    x_BxSxD = embedded(shards.lookup(table_VxD, tokens_BxT), shards.own(positions_BxT))
    x_BxSxD = ctx.ops.constrain(x_BxSxD, ("batch", "stream", "embed"))
    x_BxSxD = dropout(cfg, ctx, x_BxSxD, layer=0, site=0)
    if not cfg.residual.first_spec(cfg):
        return cfg.residual.init(cfg, x_BxSxD)
    n = cfg.residual.first_reach(cfg) - 1
    if ctx.cache is None:
        before = jnp.zeros((x_BxSxD.shape[0], n, cfg.width), dtype)
    else:
        slots_Bxn = jnp.maximum(reach.slots_before(ctx.cache.lens, n), 0)
        before = embedded(table_VxD[jnp.take_along_axis(ctx.cache.tokens, slots_Bxn, axis=1)], slots_Bxn)
    found = Behind(reach.extended(ctx, before, x_BxSxD), reach.documents(ctx, tokens_BxT.shape, n))
    first = lambda x, found: cfg.residual.init(cfg, x, params["embedding"]["residual"], found)
    return reach.by_run(first, found, x_BxSxD)


def blocks(
    cfg: ModelConfig, stacked: Tree, state, ctx: Context, first_layer=0, tally=None, divisor: int = 1
) -> tuple[Any, Aux]:
    """Run a slice of the stack: contiguous, or the layers of a route (`ctx.route`, see `through`).

    Args:
      stacked: the layers' parameters, each [n, ...]: all of `params["layers"]` or a slice of it.
      state: what `embed` or the layers before gave.
      ctx: `ctx.cache`, where given, holds these n layers.
      first_layer: the index of the first of them in the whole model; may be traced (a pipeline stage). Where
        `ctx.route` names n layers, they are those instead.
      tally: what the layers before counted, which is counted on from. None: from nothing.
      divisor: of `first_layer`, where that is traced.

    Returns:
      The state after the last of them, and `Aux`.
    """
    n = jax.tree.leaves(stacked)[0].shape[0]
    contexts = ctx.cut()
    states = (state,) if len(contexts) == 1 else state
    tables = [layers.tables(cfg, *part) for part in zip(states, contexts, strict=True)]
    route = Route() if ctx.route is None else ctx.route
    # NumPy where the numbers are known, so that what differs between layers is picked when traced.
    known = isinstance(first_layer, int | np.integer)
    layers_n = (np if known else jnp).arange(n) + first_layer if route.layers is None else route.layers
    kinds_n = layers.kinds_of(cfg, layers_n)
    pages = pages_of(cfg, ctx, tables, states, tally)

    def layer(kind, params, state, pages, number, i):
        state, pages = layers.side_by_side(cfg, params, state, pages, contexts, tables, number, i, kind)
        state = layers.committed(cfg, state, number, len(contexts))
        return state if ctx.steering is None else ctx.steering.add(state, number), pages

    def one(kind, params, state, pages, number, i, keep, scale):
        run = partial(layers.remat(cfg, partial(layer, kind)), params)
        new, new_pages = layers.perhaps(keep, run, state, pages, number, i)
        return layers.scaled(scale, state, new), new_pages

    cfg.residual.check_route(ctx.route)
    if cfg.residual.write_once and pages is None:
        states = write_once.loop(
            cfg, uncommitted(cfg), stacked, states, (contexts, tables), layers_n, int(first_layer) if known else divisor
        )
        return (states[0] if len(contexts) == 1 else states), Aux()
    if cfg.layer_loop == "unroll":
        at = lambda x, i: None if x is None else x[i]
        for i, params in enumerate(layers.unstack(stacked)):
            own = layers_n[i], i, at(route.keep, i), at(route.scale, i)
            state, pages = one(kinds_n[i], params, state, pages, *own)
    else:

        def body(carry, xs):
            params, kind, *own = xs
            return one(kind, params, *carry, *own), None

        xs = (stacked, jnp.asarray(kinds_n), jnp.asarray(layers_n), jnp.arange(n), route.keep, route.scale)
        (state, pages), _ = jax.lax.scan(body, (state, pages), xs)
    if pages is None:
        return state, Aux()
    cache = None if ctx.cache is None else ctx.cache.holding(pages)
    return state, Aux(cache, pages.record, pages.tally)


def pages_of(cfg: ModelConfig, ctx: Context, tables: list, states, tally=None) -> Pages | None:
    """What goes from layer to layer beside the state; None where nothing does."""
    shape = tables[0].positions.shape
    if ctx.cache is not None:
        pages = ctx.cache.pages()
    else:
        if tally is None:
            tally = cfg.feedforward.tally(cfg, ctx, shape[0] * len(tables))
        # What is counted differs between devices as the states do that are counted.
        pages = Pages(tally=tally if tally is None else alike(states, tally)[1])
    if ctx.skip is not None:
        skip.check(ctx.skip.policy, cfg)
        pages = pages.replace(record=Record.start(cfg, *shape))
    return pages if jax.tree.leaves(pages) else None


def uncommitted(cfg: ModelConfig):
    """A layer as `write_once.loop` takes it: it closes over no array."""

    def layer(given, params, states, number):
        contexts, tables = given
        kind = layers.kinds_of(cfg, np.asarray(number) if isinstance(number, int) else number)

        def run(params, states):
            state = states[0] if len(contexts) == 1 else states
            state, _ = layers.side_by_side(cfg, params, state, None, contexts, tables, number, None, kind)
            return (state,) if len(contexts) == 1 else state

        return layers.remat(cfg, run)(params, states)

    return layer


def through(cfg: ModelConfig, params: Tree, state, ctx: Context) -> tuple[Any, Aux]:
    """The whole stack, or the layers of the context's route, as `blocks`."""
    stacked = params["layers"]
    if ctx.route is not None and ctx.route.layers is not None:
        # Once for all of them, so that the gradient of the stack is written once too.
        stacked = jax.tree.map(lambda x: x[ctx.route.layers], stacked)
    return blocks(cfg, stacked, state, ctx)


def to_wire(cfg: ModelConfig, state, ctx: Context):
    """The state as what crosses a pipeline boundary, see `DepthMixer.to_wire`; of each of the parts that rows go in."""
    if ctx.ops.shards.parts == 1:
        return cfg.residual.to_wire(cfg, state)
    return tuple(cfg.residual.to_wire(cfg, part) for part in state)


def from_wire(cfg: ModelConfig, wire, ctx: Context):
    """The inverse of `to_wire`."""
    if ctx.ops.shards.parts == 1:
        return cfg.residual.from_wire(cfg, wire)
    return tuple(cfg.residual.from_wire(cfg, part) for part in wire)


def unembedding(cfg: ModelConfig, params: Tree):
    """The output projection, [V, D]."""
    return params["embedding"]["tokens"] if cfg.tied_embeddings else params["head"]["unembed"]["kernel"].T


def final_norm(cfg: ModelConfig, params: Tree, state, at: int | None = None, ops: Ops = Ops()):
    """What the output projection sees, [B, T, D], behind layer `at` (None: the last)."""
    x_BxTxD = cfg.residual.final(cfg, params["head"].get("residual", {}), state)
    if at is None:
        return cfg.norm(params["head"]["norm"], x_BxTxD)
    return cfg.exits.normed(cfg, params["head"], x_BxTxD, at, ops.matmul)


def logits_of(cfg: ModelConfig, params: Tree, x_BxTxD, ops: Ops):
    """The output projection (and its soft cap) of what `final_norm` gave: float32 [B, T, V].

    Where the vocabulary is spread by hand, these are the logits of the V at hand.
    """
    (logits,) = ops.of_head().columns(x_BxTxD, [unembedding(cfg, params).T])
    logits = logits.astype(jnp.float32)
    if cfg.logit_cap is not None:
        logits = cfg.logit_cap * jnp.tanh(logits / cfg.logit_cap)
    return ops.constrain(logits, ("batch", "length", "vocabulary"))


def head(cfg: ModelConfig, params: Tree, state, ctx: Context, targets=None, weights=None, at: int | None = None):
    """Final norm and output projection.

    Args:
      at: behind which layer: an exit's own head, where there is one. None: behind the last.
      targets: int32 [B, T]. None: return logits.
      weights: float32 [B, T], the loss weight of each target. None: 1.

    Returns:
      float32 logits [B, T, V], or `LossSums`, for which at most `cfg.loss_chunk` tokens of each row have
      logits at once. Where the stream's tokens lie over devices: the sums of this device's own.
    """
    if (parts := ctx.ops.shards.parts) > 1:
        rows = zip(state, ctx.cut(), *(cut(x, parts) for x in (targets, weights)), strict=True)
        found = [head(cfg, params, *part, at=at) for part in rows]
        return join(found) if targets is None else jax.tree.map(lambda *sums: sum(sums), *found)
    x_BxSxD = ctx.ops.constrain(final_norm(cfg, params, state, at, ctx.ops), ("batch", "length", "embed"))
    if targets is None:
        return logits_of(cfg, params, x_BxSxD, ctx.ops)
    weights = jnp.ones(targets.shape, jnp.float32) if weights is None else weights
    targets, weights = ctx.ops.shards.own((targets, weights))
    options = dict(chunk=cfg.loss_chunk, cap=cfg.logit_cap, ops=ctx.ops.of_head())
    return LossSums(*cross_entropy(x_BxSxD, unembedding(cfg, params), targets, weights, **options))


def apply(cfg: ModelConfig, params: Tree, tokens_BxT, ctx: Context | None = None) -> Output:
    """The whole decoder: int32 tokens [B, T] -> `Output`."""
    ctx = Context() if ctx is None else ctx
    state = embed(cfg, params, tokens_BxT, ctx)
    state, aux = through(cfg, params, state, ctx)
    return Output(head(cfg, params, state, ctx), aux)


def loss(cfg: ModelConfig, params: Tree, tokens_BxT, targets_BxT, weights_BxT=None, ctx: Context | None = None):
    """The summed next-token loss of a batch: `LossSums`.

    Where the model has exits and is being trained (`ctx.key` is given), their losses too; see `loss_at_exits`. Likewise
    what a feed-forward layer with routers adds for its budget: once, for all layers, whatever exits weigh.
    """
    ctx = Context() if ctx is None else ctx
    state = embed(cfg, params, tokens_BxT, ctx)
    if cfg.exits.at and ctx.key is not None:
        sums, tally = loss_at_exits(cfg, params, state, ctx, targets_BxT, weights_BxT)
    else:
        state, aux = through(cfg, params, state, ctx)
        sums, tally = head(cfg, params, state, ctx, targets_BxT, weights_BxT), aux.tally
    if tally is None or ctx.key is None:
        return sums
    weights = jnp.ones(tokens_BxT.shape, jnp.float32) if weights_BxT is None else weights_BxT
    return sums.replace(loss_sum=sums.loss_sum + cfg.feedforward.penalty(cfg, tally, ctx, weights))


def segments(cfg: ModelConfig, params: Tree, state, ctx: Context, at: tuple[int, ...]) -> tuple[list, Any]:
    """The states behind the layers `at` (rising, without the last) and behind the last, without a cache; and what routers
    counted over all of them (`Aux.tally`)."""
    # One split, whose gradient joins the parts: a slice of each would add up arrays of the size of the stack.
    parts = [jnp.split(leaf, at) for leaf in jax.tree.leaves(params["layers"])]
    tree, states, tally = jax.tree.structure(params["layers"]), [], None
    for i, (first, last) in enumerate(zip((0, *at), (*at, cfg.layers), strict=True)):
        own = ctx if ctx.route is None else ctx.replace(route=ctx.route.part(first, last))
        state, aux = blocks(cfg, jax.tree.unflatten(tree, [part[i] for part in parts]), state, own, first, tally)
        states.append(state)
        tally = aux.tally
    return states, tally


def loss_at_exits(cfg: ModelConfig, params: Tree, state, ctx: Context, targets, weights=None) -> tuple[LossSums, Any]:
    """The losses at all exits and at the last layer, joined as `cfg.exits.loss` says; and what routers counted, of whose
    budget nothing is in it.

    Args:
      state: what `embed` gave.
      ctx: `ctx.route.exits`, where given, are the weights of this step.

    Raises:
      ValueError: a route through other layers than the stack's.
    """
    scheme, at, route = cfg.exits.loss, cfg.exits.at, ctx.route
    if route is not None and route.layers is not None:
        raise ValueError(f"model.exits.at = {at} are places in the stack, and the route names its layers anew")
    states, tally = segments(cfg, params, state, ctx, at)
    heads = zip(states, (*at, None), strict=True)
    found = [head(cfg, params, state, ctx, targets, weights, at=layer) for state, layer in heads]
    sums = jnp.stack([one.loss_sum for one in found])
    each = scheme.weights(at, cfg.layers) if route is None or route.exits is None else route.exits
    total = jnp.sum(each.astype(sums.dtype) * sums)
    if scheme.distillation:
        teach = partial(distance, cfg, params, states[-1], ctx, weights)
        total += scheme.distillation * sum(teach(state, layer) for state, layer in zip(states[:-1], at, strict=True))
    return LossSums(total, found[-1].weight_sum, sums), tally


def distance(cfg: ModelConfig, params: Tree, last, ctx: Context, weights, state, at: int):
    """The weighted sum over tokens of the mean squared distance of what the output projection sees behind layer `at` from
    what it sees behind the last, which is not moved: float32."""
    if (parts := ctx.ops.shards.parts) > 1:
        rows = zip(last, ctx.cut(), cut(weights, parts), state, strict=True)
        return sum(distance(cfg, params, last, own, weights, state, at) for last, own, weights, state in rows)
    goal = jax.lax.stop_gradient(final_norm(cfg, params, last))
    apart = (final_norm(cfg, params, state, at, ctx.ops) - goal).astype(jnp.float32)
    apart_BxS = jnp.mean(jnp.square(apart), axis=-1)
    return jnp.sum(apart_BxS if weights is None else apart_BxS * ctx.ops.shards.own(weights))


def forward(cfg: ModelConfig, params: Tree, tokens_BxQ, cache: Cache, counts_B=None, ops: Ops = Ops(), last=False):
    """Q more tokens for each row behind what the cache holds: prefill, decoding and verification are this one path.

    Returns:
      What `advance` does without `Aux`.
    """
    return advance(cfg, params, tokens_BxQ, Context(cache=cache, ops=ops), counts_B, last)[:2]


def advance(cfg: ModelConfig, params: Tree, tokens_BxQ, ctx: Context, counts_B=None, last=False):
    """`forward` where more is said than the cache: what is skipped.

    Args:
      counts_B: int32 [B], how many of a row's Q tokens are real; the rest is padding at the end, written to slots that
        the next call overwrites. None: all.
      last: give the logits of each row's last real token only.

    Returns:
      float32 logits [B, Q, V] ([B, 1, V] with `last`), the cache, `lens` advanced by `counts_B`, and `Aux`.
    """
    counts_B = jnp.full(tokens_BxQ.shape[0], tokens_BxQ.shape[1], jnp.int32) if counts_B is None else counts_B
    state, aux = blocks(cfg, params["layers"], embed(cfg, params, tokens_BxQ, ctx), ctx)
    x_BxTxD = final_norm(cfg, params, state)
    if last:
        x_BxTxD = jnp.take_along_axis(x_BxTxD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)
    cache = reach.noted(aux.cache, tokens_BxQ).replace(lens=ctx.cache.lens + counts_B)
    return logits_of(cfg, params, x_BxTxD, ctx.ops), cache, aux
