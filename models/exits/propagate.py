"""Keys and values of layers that a token did not run, from the state that it left with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.models import layers, reach
from jaxpar.models.cache import KVCache
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops

Tree = Any


def keys_from(cfg: ModelConfig, stacked: Tree, state, cache: KVCache, ops: Ops, first_layer: int) -> KVCache:
    """The cache with what these n layers' key and value projections make of `state`, as if no layer had added anything to it
    (CALM, Schuster et al. 2022, §3.3), and with what a residual operator keeps of it for later tokens. Nothing else of the
    layers runs. `lens` is unchanged.

    A layer that picks its tokens (mixture of depths) is asked whether it would pick these, of this very state: where not, they
    have no keys and values there, as in a full pass.
    """
    ctx = Context(cache=cache, ops=ops)
    tables = layers.tables(cfg, state, ctx)
    n = jax.tree.leaves(stacked)[0].shape[0]
    numbers = np.arange(n) + first_layer

    remembered = cfg.residual.memory(cfg)

    def one(pages, xs):
        params, kind, number, i = xs
        mixer, own, before = params.get("residual", {}), params["attention"], ()
        for site in remembered:
            kept = cfg.residual.kept(cfg, mixer, state, site)
            found, pages = reach.behind(cfg, ctx, tables, pages, kept, site, i)
            before = (found,) if site == "attention" else before
        x, _ = cfg.residual.read(cfg, mixer, state, number, "attention", *before)
        x = cfg.norm(own["norm"], x) if "norm" in own else x
        there = ctx.replace(present=cfg.depth.present(params, state, number))
        _, pages = layers.attention_branch(cfg, own, x, pages, there, tables, i, kind, keys_only=True)
        return pages, None

    xs = (stacked, jnp.asarray(layers.kinds_of(cfg, numbers)), jnp.asarray(numbers), jnp.arange(n))
    pages, _ = jax.lax.scan(one, cache.pages(), xs)
    return cache.holding(pages)
