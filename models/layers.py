"""One layer of the decoder: attention and feed-forward branches around the residual operator."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxpar.models import cache as kv
from jaxpar.models import reach
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, dropout
from jaxpar.models.positions import Rope, rotate, turns
from jaxpar.models.residual.base import Streams
from jaxpar.models.routing import skip
from jaxpar.models.shards import cut, join
from jaxpar.models.spec import Constant, Normal, ParamSpec
from jaxpar.pallas_kernels.attention import ATTENTION_LSE, ATTENTION_OUT, MaskSpec
from jaxpar.pallas_kernels.decode import MOST_QUERIES

Tree = Any
FULL = 2**30
"""The window of a layer that sees everything, where layers of both kinds are scanned together."""


def spec(cfg: ModelConfig) -> Tree:
    """One layer's parameters."""
    D, H, G, K = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_size
    pre = cfg.norm_placement in ("pre", "pre_post")
    post = cfg.norm_placement in ("post", "pre_post")

    def projection(shape, axes, std, bias):
        entry = {"kernel": ParamSpec(shape, axes, Normal(std))}
        if bias is not None:
            entry["bias"] = ParamSpec(*bias, Constant(0.0), decay=False)
        return entry

    heads = ((H, K), ("heads", "head_size")) if cfg.qkv_bias else None
    groups = ((G, K), ("kv_heads", "head_size")) if cfg.qkv_bias else None
    attention = {
        "query": projection((D, H, K), ("embed", "heads", "head_size"), cfg.init_std, heads),
        "key": projection((D, G, K), ("embed", "kv_heads", "head_size"), cfg.init_std, groups),
        "value": projection((D, G, K), ("embed", "kv_heads", "head_size"), cfg.init_std, groups),
        "out": projection(
            (H, K, D),
            ("heads", "head_size", "embed"),
            cfg.init_std / (2 * cfg.layers) ** 0.5,
            ((D,), ("norm",)) if cfg.attention_out_bias else None,
        ),
    }
    if cfg.qk_norm:
        attention |= {"query_norm": cfg.norm.spec(K), "key_norm": cfg.norm.spec(K)}
    feedforward = cfg.feedforward.spec(cfg)
    for branch in (attention, feedforward):
        if pre:
            branch["norm"] = cfg.norm.spec(D)
        if post:
            branch["post_norm"] = cfg.norm.spec(D)
    layer = {"attention": attention, "feedforward": feedforward}
    if residual := cfg.residual.spec(cfg):
        layer["residual"] = residual
    return layer | cfg.depth.spec(cfg)


def kinds(cfg: ModelConfig) -> list[bool]:
    """The distinct kinds of layers, by whether they slide, in order of first appearance."""
    return list(dict.fromkeys(cfg.slides(layer) for layer in range(cfg.layers)))


def kinds_of(cfg: ModelConfig, layers_n):
    """The kind of each of n layers: NumPy where their numbers are, traced where those are."""
    distinct = kinds(cfg)
    all_L = np.array([distinct.index(cfg.slides(layer)) for layer in range(cfg.layers)], np.int32)
    return all_L[layers_n] if isinstance(layers_n, np.ndarray) else jnp.asarray(all_L)[layers_n]


@struct.dataclass
class Tables:
    """What layers of one kind share, made once for all layers. U kinds.

    Attributes:
      cos, sin: of each kind float32 [B, T, 1, 2R], see `positions.turns`, where positions are rotary. Apart, and with the
        heads' axis, so that a layer multiplies by these arrays themselves, and keeps no row of them for its backward pass.
      positions: int32 [B, T], of each token in its document.
      slots: int32 [B, T], the cache slots of the new tokens, where there is a cache.
      table: int32 [B, M], the pages that hold a row's slots, where the cache lies in pages.
      windows: the attention span of each kind, or None where no layer slides (static).
      index: int32 [B, T], the place in its row of each token, where they are some of a row's. None: 0, 1, 2, ...
      documents: int32 [B · runs, n + L], see `reach.documents`, where the residual operator reaches n tokens back.
    """

    cos: tuple[jax.Array, ...] | None
    sin: tuple[jax.Array, ...] | None
    positions: jax.Array
    slots: jax.Array | None
    windows: tuple[int, ...] | None = struct.field(pytree_node=False)
    index: jax.Array | None = None
    documents: jax.Array | None = None
    table: jax.Array | None = None


def tables(cfg: ModelConfig, state, ctx: Context) -> Tables:
    """See `Tables`. Positions come from the context, or count from the cache's lengths."""
    B, S = cfg.residual.tokens(state)
    T = S * ctx.ops.shards.shards
    positions_BxT = ctx.positions_of((B, T))
    distinct = kinds(cfg)
    cos = sin = slots = windows = table = None
    if isinstance(cfg.positions, Rope):
        pairs = []
        for local in distinct:
            frequencies, scale = cfg.positions.frequencies(cfg.head_size, local)
            angles_BxTxR = positions_BxT[:, :, None] * jnp.asarray(frequencies, jnp.float32)[None, None, :]
            pairs.append(turns(angles_BxTxR, scale))
        cos, sin = zip(*pairs, strict=True)
    if ctx.cache is not None:
        slots = ctx.cache.lens[:, None] + jnp.arange(T, dtype=jnp.int32)[None, :]
        table = ctx.cache.table
    if any(distinct):
        windows = tuple(cfg.window if local else FULL for local in distinct)
    back = cfg.residual.reach(cfg) - 1
    documents = reach.documents(ctx, (B, T), back) if back else None
    return Tables(cos, sin, positions_BxT, slots, windows, documents=documents, table=table)


def _pick(rows, kind):
    """Row `kind` of a small table. Where there is one kind only, no gather is traced."""
    if isinstance(kind, int | np.integer):
        return rows[int(kind)]
    if len(rows) == 1:
        return rows[0]
    return (jnp.asarray(rows) if isinstance(rows, tuple) else rows)[kind]


def attention_branch(
    cfg: ModelConfig, params: Tree, x_BxSxD, pages, ctx: Context, tables: Tables, i, kind, keys_only: bool = False
):
    """Queries, keys, values, positions, cache, attention and output projection. x may be `Streams`, one for each of the
    three.

    Args:
      keys_only: write keys and values, and do nothing else.

    Returns [B, S, D] (None with `keys_only`) and the cache pages with these tokens' keys and values at layer i.
    """
    ops = ctx.ops

    def finished(name, axis, y):
        if "bias" in params[name]:
            y = y + params[name]["bias"].astype(y.dtype)[None, None]
        if f"{name}_norm" in params:
            y = cfg.norm(params[f"{name}_norm"], y)
        return ops.constrain(y, ("batch", "length", axis, "head_size"))

    def projected(out):
        y = ops.row(out, params["out"]["kernel"], contract=2)
        return y + params["out"]["bias"].astype(y.dtype)[None, None] if "bias" in params["out"] else y

    axes = {"query": "heads", "key": "kv_heads", "value": "kv_heads"}
    if keys_only:
        del axes["query"]
    kernels = [params[name]["kernel"] for name in axes]
    if isinstance(x_BxSxD, Streams):
        products = [y for x, kernel in zip(x_BxSxD[:3], kernels, strict=True) for y in ops.columns(x, [kernel])]
    else:
        products = ops.columns(x_BxSxD, kernels)
    *q, k, v = (finished(name, axis, y) for (name, axis), y in zip(axes.items(), products, strict=True))
    if tables.cos is not None:
        cos, sin = _pick(tables.cos, kind), _pick(tables.sin, kind)
        q, k = [rotate(x, cos, sin) for x in q], rotate(k, cos, sin)

    window = None if tables.windows is None else _pick(tables.windows, kind)
    call = dict(scale=cfg.scale, cap=cfg.attention_cap, implementation=cfg.attention_implementation)
    if isinstance(window, int) and window >= FULL:
        window = None
    if pages is None or pages.k is None:
        mask = MaskSpec(window=window, q_segments=ctx.segments, k_segments=ctx.segments)
        if tables.index is not None:
            mask = mask.replace(q_index=tables.index, k_index=tables.index)
        if ctx.present is not None:
            index_BxT = tables.index
            if index_BxT is None:
                index_BxT = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32)[None], k.shape[:2])
            mask = mask.replace(q_index=index_BxT, k_index=jnp.where(ctx.present, index_BxT, FULL))
    else:
        pages = cached(pages, k, v, ctx, i, tables)
        # A cache's rows have indices of their own, which not every implementation takes.
        call["implementation"] = "xla" if cfg.attention_implementation == "xla" else None
        if pages.there is None and k.shape[1] <= MOST_QUERIES and not keys_only:
            lens_B = tables.slots[:, -1] + 1
            call |= dict(window=window, layer=i, table_BxP=tables.table)
            return projected(ops.decode(q[0], pages.k, pages.v, lens_B, **call)), pages
        k, v = (kv.read(page, i, k.dtype, tables.table) for page in (pages.k, pages.v))
        index_BxS = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32)[None], k.shape[:2])
        if pages.there is not None:
            # Behind every query: whoever has no keys here is not seen.
            index_BxS = jnp.where(pages.there[i], index_BxS, FULL)
        mask = MaskSpec(window=window, q_index=tables.slots, k_index=index_BxS)
    if keys_only:
        return None, pages

    (q,) = q
    return projected(ops.attention(q, k, v, mask=mask, **call)), pages


def cached(pages: kv.Pages, k, v, ctx: Context, i, tables: Tables) -> kv.Pages:
    """The pages with new keys and values at layer i, and whose they are."""
    if pages.there is None:
        if ctx.present is not None:
            raise ValueError("tokens that leave a layer out need a cache that knows it: make it with `there=True`")
        new = {"k": k, "v": v}
    else:
        new = {"k": k, "v": v, "there": jnp.ones(tables.slots.shape, bool) if ctx.present is None else ctx.present}
    where = i, tables.slots, tables.table
    return pages.replace(**{name: kv.write(getattr(pages, name), x, *where) for name, x in new.items()})


def block(cfg: ModelConfig, params: Tree, state, pages, ctx: Context, tables: Tables, layer, i, kind):
    """`whole`, for the tokens that run in this layer."""
    run = lambda state, pages, ctx, tables: whole(cfg, params, state, pages, ctx, tables, layer, i, kind)
    if not cfg.depth.sparse:
        return run(state, pages, ctx, tables)
    return cfg.depth.around(cfg, params, state, pages, ctx, tables, layer, i, run)


def whole(cfg: ModelConfig, params: Tree, state, pages, ctx: Context, tables: Tables, layer, i, kind):
    """Layer `layer` of the model, the i-th of the slice at hand: `(state, pages) -> (state, pages)`. The state is not
    committed."""
    mixer = params.get("residual", {})
    remembered = cfg.residual.memory(cfg)

    def behind(name, state, pages):
        """What the residual operator asks for of earlier tokens, nothing or one `Behind`; the pages with these tokens in."""
        if name not in remembered:
            return (), pages
        kept = cfg.residual.kept(cfg, mixer, state, name)
        found, pages = reach.behind(cfg, ctx, tables, pages, kept, name, i)
        return (found,), pages

    def normed(own, x):
        x = cfg.norm(own["norm"], x) if "norm" in own else x
        return ctx.ops.constrain(x, ("batch", "length", "embed"))

    def branch(name, site, run, state, *before):
        own = params[name]
        read = lambda state, *before: cfg.residual.read(cfg, mixer, state, layer, name, *before)
        x, told = reach.by_run(read, *before, state) if before else read(state)
        if isinstance(x, Streams):
            norms = [own if norm is None else {"norm": norm} for norm in (None, *(x.norms or (None, None)))]
            x = Streams(*map(normed, norms, x[:3]))
        else:
            x = normed(own, x)
        y, rest = run(own, x)
        y = ctx.ops.constrain(y, ("batch", "stream", "embed"))
        y = cfg.norm(own["post_norm"], y) if "post_norm" in own else y
        y = dropout(cfg, ctx, y, layer, site)
        return cfg.residual.write(cfg, mixer, state, told, y, layer, name), rest

    def attend(ctx, state, pages):
        before, pages = behind("attention", state, pages)
        run = lambda p, x: attention_branch(cfg, p, x, pages, ctx, tables, i, kind)
        return branch("attention", 1, run, state, *before)

    def transform(state, tally=None, before=()):
        def run(p, x):
            if cfg.feedforward.routed:
                return cfg.feedforward.routed_apply(cfg, p, x, ctx, layer, tally)
            return cfg.feedforward.apply(cfg, p, x, ctx.ops), None

        return branch("feedforward", 2, run, state, *before)

    if ctx.skip is not None:

        def keys_only(ctx, state, pages):
            own = params["attention"]
            if pages.k is None:
                return pages
            if ctx.present is not None:
                return pages.replace(there=kv.write(pages.there, ctx.present, i, tables.slots))
            return attention_branch(cfg, own, normed(own, state), pages, ctx, tables, i, kind, keys_only=True)[1]

        return skip.around(cfg, ctx, state, pages, layer, tables.positions, attend, transform, keys_only)
    state, pages = attend(ctx, state, pages)
    before, pages = behind("feedforward", state, pages)
    state, tally = transform(state, None if pages is None else pages.tally, before)
    return state, pages if tally is None else pages.replace(tally=tally)


def side_by_side(cfg: ModelConfig, params: Tree, state, pages, contexts: list[Context], tables: list, layer, i, kind):
    """`block` on each of the parts that rows go in: no part waits for what another sends. Of pages they have what is counted
    alone."""
    if (parts := len(contexts)) == 1:
        return block(cfg, params, state, pages, contexts[0], tables[0], layer, i, kind)
    own = [None] * parts if pages is None else cut(pages, parts)
    run = lambda *part: block(cfg, params, *part, layer, i, kind)
    states, own = zip(*(run(*part) for part in zip(state, own, contexts, tables, strict=True)), strict=True)
    return states, pages if pages is None else jax.tree.map(lambda *rows: join(rows), *own)


def committed(cfg: ModelConfig, state, layer, parts: int = 1):
    """The state behind a layer, or the tuple of its parts."""
    if parts == 1:
        return cfg.residual.commit(cfg, state, layer)
    return tuple(cfg.residual.commit(cfg, part, layer) for part in state)


def perhaps(keep, run, state, pages, *args):
    """`run(state, pages, *args)` where `keep` holds (or is None), else state and pages as they are, at no cost."""
    if keep is None:
        return run(state, pages, *args)
    return jax.lax.cond(keep, lambda state, pages: run(state, pages, *args), lambda *same: same, state, pages)


def scaled(scale, state, new):
    """The state with what a layer added times `scale`. None: as it is."""
    if scale is None:
        return new
    return jax.tree.map(lambda a, b: a + (scale * (b - a)).astype(a.dtype), state, new)


def remat(cfg: ModelConfig, run):
    """`run(params, state, ...)` under the named policy of what the backward pass recomputes."""
    policies = {
        "full": jax.checkpoint_policies.nothing_saveable,
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT, ATTENTION_LSE),
        ),
    }
    if cfg.remat not in policies:
        return run
    # Inside a scan the loop itself keeps the compiler from undoing the recomputation.
    return jax.checkpoint(run, policy=policies[cfg.remat], prevent_cse=cfg.layer_loop == "unroll")


@jax.custom_vjp
def _unstack(p):
    return tuple(p[i] for i in range(p.shape[0]))


# Indexing's own transpose adds L arrays of the size of the whole stack; stacking writes each layer once.
_unstack.defvjp(lambda p: (_unstack(p), None), lambda _, g: (jnp.stack(g),))


def unstack(stacked: Tree) -> list[Tree]:
    """The layers of a stack, each a tree without the leading dimension."""
    leaves, tree = jax.tree.flatten(stacked)
    return [jax.tree.unflatten(tree, layer) for layer in zip(*map(_unstack, leaves), strict=True)]
