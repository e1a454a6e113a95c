"""Oracles over the routes of a model with several feed-forward modules a layer: the best that a choice could do, knowing the token
that comes next.

Duo-LLM's stage 2 (Alizadeh et al. 2024) enumerates routes and takes, token by token, the one of the lowest loss. The paper does
not say whose keys and values the other tokens have. Two readings:

    uniform      each route runs on the whole text; a token takes the lowest of its losses over the routes. Its past is then that
                 of its own route, and differs from the other tokens'.
    sequential   one token after the other; all routes see the keys and values of the routes that earlier tokens took.

An oracle selects: the lowest of many noisy losses is low by chance too. `perturbed` is the null control: as many models as there are
routes, the all-big one with noise on its feed-forward weights, so much that a token's losses differ as much between them as
between the routes (`spread`). What the lowest of *their* losses gains on their mean is what selection alone gives.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.feedforward.duo import BIG, SKIP, SMALL

Tree = Any


def routes(layers: int, big: int | None = None, *, skip: bool = False) -> np.ndarray:
    """Every route of so many layers: int32 [R, layers], module numbers.

    Args:
      big: only those with so many big modules. None: all.
      skip: whether a layer may have no module: R = 3^layers, or C(layers, big) · 2^(layers - big), in place of 2^layers and
        C(layers, big).

    Raises:
      ValueError: more big modules than layers.
    """
    if big is not None and not 0 <= big <= layers:
        raise ValueError(f"a budget of {big} big modules is outside 0 to the model's {layers} layers")
    choices = (SMALL, BIG, SKIP) if skip else (SMALL, BIG)
    found = itertools.product(choices, repeat=layers)
    return np.array([r for r in found if big is None or r.count(BIG) == big], np.int32)


def token_losses(logits_BxTxV, targets_BxT):
    """Nats, [B, T]."""
    right = jnp.take_along_axis(logits_BxTxV, targets_BxT[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxTxV, axis=-1) - right


def losses_of(cfg: ModelConfig, params: Tree, tokens_BxT, targets_BxT, routes_RxL) -> jax.Array:
    """Each token's loss on each route, where every token takes the same one: [R, B, T]. One route after the other: a layer's
    other module does not run."""

    def one(route_L):
        return token_losses(decoder.apply(cfg, params, tokens_BxT, Context(modules=route_L)).logits, targets_BxT)

    return jax.lax.map(one, jnp.asarray(routes_RxL))


def sequential(cfg: ModelConfig, params: Tree, tokens_BxT, targets_BxT, routes_RxL) -> tuple[jax.Array, jax.Array]:
    """The sequential oracle: losses [B, T] of the routes that it takes, and their numbers among `routes_RxL`, int32 [B, T]."""
    routes_RxL = jnp.asarray(routes_RxL)

    def step(cache, x):
        token_B, target_B = x
        forward = lambda modules: decoder.advance(cfg, params, token_B[:, None], Context(cache=cache, modules=modules))
        losses_RxB = jax.vmap(lambda r: token_losses(forward(r)[0], target_B[:, None])[:, 0])(routes_RxL)
        best_B = jnp.argmin(losses_RxB, axis=0)
        # Again, for the keys and values of the route that each row took.
        _, cache, _ = forward(routes_RxL[best_B].T[:, :, None])
        return cache, (losses_RxB.min(0), best_B)

    cache = kv.empty(cfg, *tokens_BxT.shape)
    _, (losses_TxB, best_TxB) = jax.lax.scan(step, cache, (tokens_BxT.T, targets_BxT.T))
    return losses_TxB.T, best_TxB.T


def perturbed(cfg: ModelConfig, params: Tree, tokens_BxT, targets_BxT, sigma, key, models: int) -> jax.Array:
    """Each token's loss under each of so many noisy copies of the all-big model: [models, B, T].

    Each weight of the big modules' kernels is multiplied by 1 + sigma · a standard normal draw.
    """

    def noisy(key):
        big = params["layers"]["feedforward"]["big"]
        leaves, tree = jax.tree.flatten(big)
        keys = jax.random.split(key, len(leaves))
        leaves = [x * (1 + sigma * jax.random.normal(k, x.shape)) for k, x in zip(keys, leaves, strict=True)]
        feedforward = {**params["layers"]["feedforward"], "big": jax.tree.unflatten(tree, leaves)}
        return {**params, "layers": {**params["layers"], "feedforward": feedforward}}

    def one(i):
        ctx = Context(modules=jnp.full(cfg.layers, BIG))
        return token_losses(decoder.apply(cfg, noisy(jax.random.fold_in(key, i)), tokens_BxT, ctx).logits, targets_BxT)

    return jax.lax.map(one, jnp.arange(models))


def spread(losses_RxBxT) -> float:
    """How far a token's losses lie apart between models: their standard deviation, on average over tokens."""
    return float(np.asarray(losses_RxBxT, np.float64).std(0).mean())


def matched(measure: Callable[[float], float], wanted: float, *, high: float = 1.0, turns: int = 20) -> float:
    """The sigma from 0 to `high` at which a measure that rises with it is `wanted`, by bisection; `high` where it is not.

    Args:
      measure: sigma -> a number, for example the spread of the copies.
    """
    if measure(high) <= wanted:
        return high
    low = 0.0
    for _ in range(turns):
        middle = (low + high) / 2
        low, high = (middle, high) if measure(middle) < wanted else (low, middle)
    return (low + high) / 2


def difficulty(losses_small_BxT, losses_oracle_BxT):
    """How much a token gains by the oracle's route over small modules alone, [B, T]: the paper's token difficulty. Not the loss
    itself: a token that no route predicts is not worth a big module."""
    return losses_small_BxT - losses_oracle_BxT


def count(layers: int, big: int | None, *, skip: bool = False) -> int:
    """How many routes `routes` gives."""
    if big is None:
        return (3 if skip else 2) ** layers
    return math.comb(layers, big) * (2 ** (layers - big) if skip else 1)
