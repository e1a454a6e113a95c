"""Prompts as arrays of few shapes, the stack in parts with a cache each, and where a row ends: what both ways of decoding
through exits share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.errors import UserError
from jaxpar.generation import bucket, check_prompts
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.cache import KVCache
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.models.reach import noted

Tree = Any


@dataclass(frozen=True)
class Prompts:
    """B rows, padded to P tokens.

    Attributes:
      tokens: int32 [B, P].
      counts: int32 [B], how many of them are real.
      capacity: slots of the cache.
      room: tokens that a row's output has room for.
      stop: int32 [n], ids that end a row.
    """

    tokens: np.ndarray
    counts: np.ndarray
    capacity: int
    room: int
    stop: np.ndarray


def prepared(
    cfg: ModelConfig, prompts: Sequence[Sequence[int]], new_tokens: int, stop: Sequence[int], ahead: int
) -> Prompts:
    """Args:
      ahead: tokens that may be written behind a row's last one.

    Raises:
      UserError: see `check_prompts`; a model whose layers read sources that an exit would leave out.
    """
    prompts = [list(p) for p in prompts]
    check_prompts(cfg, prompts, new_tokens)
    if cfg.residual.write_once:
        raise UserError(
            f"model.residual = {type(cfg.residual).__name__} reads a source of every layer, and at an exit some are missing; "
            "generate without --decoding, or train Plain, HyperConnections, ManifoldHyperConnections or DeepDelta"
        )
    counts = np.array([len(p) for p in prompts], np.int32)
    tokens = np.zeros((len(prompts), bucket(int(counts.max()))), np.int32)
    for row, p in zip(tokens, prompts, strict=True):
        row[: len(p)] = p
    capacity = bucket(tokens.shape[1] + new_tokens + ahead)
    return Prompts(tokens, counts, capacity, bucket(new_tokens), np.array(sorted(set(stop)), np.int32))


@dataclass(frozen=True)
class Stack:
    """The layers in parts, cut behind some of them.

    Attributes:
      cfg: the model's.
      at: behind which layers it is cut, rising, without the last.
      ops: the functions that blocks call.
      vocabulary: ids from here on are never chosen.
    """

    cfg: ModelConfig
    at: tuple[int, ...]
    ops: Ops
    vocabulary: int

    @property
    def sizes(self) -> tuple[int, ...]:
        """Layers of each part."""
        return tuple(b - a for a, b in zip((0, *self.at), (*self.at, self.cfg.layers), strict=True))

    def cut(self, params: Tree) -> list[Tree]:
        """Each part's parameters."""
        bounds = zip((0, *self.at), (*self.at, self.cfg.layers), strict=True)
        return [jax.tree.map(lambda x, a=a, b=b: x[a:b], params["layers"]) for a, b in bounds]

    def caches(self, rows: int, capacity: int) -> list[KVCache]:
        """An empty cache for each part, with lengths of its own: a part may be behind the one before it."""
        whole = kv.empty(self.cfg, rows, capacity, form=self.ops.cache)
        bounds = zip((0, *self.at), (*self.at, self.cfg.layers), strict=True)
        part = lambda a, b: jax.tree.map(lambda x: x[a:b], (whole.k, whole.v, whole.there, whole.behind))
        parts = (part(a, b) for a, b in bounds)
        return [whole.replace(k=k, v=v, there=there, behind=behind) for k, v, there, behind in parts]

    def embed(self, params: Tree, tokens_BxQ, cache: KVCache):
        return decoder.embed(self.cfg, params, tokens_BxQ, Context(cache=cache, ops=self.ops))

    def run(self, part: Tree, number: int, state, cache: KVCache, counts_B):
        """Part `number` on Q tokens a row behind what its cache holds, of which `counts_B` are real."""
        first = (0, *self.at)[number]
        state, aux = decoder.blocks(self.cfg, part, state, Context(cache=cache, ops=self.ops), first)
        return state, aux.cache.replace(lens=cache.lens + counts_B)

    def normed(self, params: Tree, state, number: int):
        """What the output projection sees behind part `number`: [B, Q, D]."""
        at = (*self.at, None)[number]
        return decoder.final_norm(self.cfg, params, state, at, self.ops)

    def logits(self, params: Tree, x_BxQxD):
        """float32 [B, Q, V]; -inf for ids that are never chosen."""
        logits = decoder.logits_of(self.cfg, params, x_BxQxD, self.ops)
        allowed_V = jnp.arange(self.cfg.vocabulary) < self.vocabulary
        return jnp.where(allowed_V[None, None], logits, -jnp.inf)

    def prefill(self, params: Tree, parts: list[Tree], tokens_BxP, counts_B, caches: list[KVCache]):
        """The prompts through all parts: logits [B, V] behind each row's last token, and the caches."""
        state, filled = self.embed(params, tokens_BxP, caches[0]), []
        caches = [noted(caches[0], tokens_BxP), *caches[1:]]
        for number, (part, cache) in enumerate(zip(parts, caches, strict=True)):
            state, cache = self.run(part, number, state, cache, counts_B)
            filled.append(cache)
        x_BxPxD = self.normed(params, state, len(self.at))
        x_Bx1xD = jnp.take_along_axis(x_BxPxD, jnp.maximum(counts_B - 1, 0)[:, None, None], axis=1)
        return self.logits(params, x_Bx1xD)[:, 0], filled


def stops(token_B, stop_ids):
    """Whether a token ends its row: bool, in the tokens' shape."""
    return (token_B[..., None] == stop_ids.reshape((1,) * token_B.ndim + (-1,))).any(-1)
