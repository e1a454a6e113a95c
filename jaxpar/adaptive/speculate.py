"""Self-speculative decoding: an exit drafts, the rest of the stack verifies (LayerSkip, Elhoushi et al. 2024, §4.3).

A round of a row that holds n tokens and has chosen t, the next:

    draft    t, d_1 ... d_K one by one through the first E layers and the exit's head
    verify   the K + 1 states behind layer E through the other layers at once: the whole model's choice behind each token
    accept   the longest run of drafts that are those choices, and the choice behind the last of them

So a round gives 1 to K + 1 tokens, all of them the ones of plain greedy decoding, whatever the exit says: it decides how many
rounds there are, and nothing else. Layers below E run once for both (their keys and values are the draft's).

Rows accept unequal numbers of drafts, and nothing is realigned: each has a length of its own in the cache, what was written
behind it is overwritten before anybody sees it, and shapes stay (Zhang et al. 2025 realign instead). The last draft goes
through the first layers too, so that it is in their cache when all are accepted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.adaptive.prompts import Stack, prepared, stops
from jaxpar.errors import UserError
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.models.reach import noted


@dataclass(frozen=True)
class Speculated:
    """What was generated, and how.

    Attributes:
      rows: the new tokens of each row.
      rounds: of each row: how often the whole model was asked.
      accepted: of each row: drafts that were the whole model's choice.
      draft: K.
    """

    rows: list[list[int]]
    rounds: list[int]
    accepted: list[int]
    draft: int

    @property
    def acceptance(self) -> float:
        """The share of drafts that were accepted."""
        return sum(self.accepted) / max(self.draft * sum(self.rounds), 1)

    @property
    def tokens_per_round(self) -> float:
        """Tokens for each call of the whole model; plain decoding has 1."""
        return sum(map(len, self.rows)) / max(sum(self.rounds), 1)


def speculate(
    cfg: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    layer: int,
    draft: int,
    stop: Sequence[int] = (),
    vocabulary: int | None = None,
    ops: Ops = Ops(),
) -> Speculated:
    """Continue each prompt greedily: token by token as `jaxpar.generation.generate` does.

    Args:
      layer: E, behind which drafts are made: an exit of the model, or any other layer, read by the last layer's head.
      draft: K, drafts in a round.
      stop, vocabulary: as in `generate`.

    Raises:
      UserError: a layer that is none or the last, no draft, or prompts that do not suit the model.
    """
    check(cfg, layer, draft)
    rows = prepared(cfg, prompts, new_tokens, stop, draft + 1)
    stack = Stack(cfg, (layer,), ops, cfg.vocabulary if vocabulary is None else vocabulary)
    limit = jnp.asarray(new_tokens, jnp.int32)
    out, lengths, rounds, accepted = jax.device_get(
        _run(stack, draft, rows.capacity, rows.room, params, rows.tokens, rows.counts, limit, rows.stop)
    )
    texts = [row[:n].tolist() for row, n in zip(out, lengths, strict=True)]
    return Speculated(texts, np.asarray(rounds).tolist(), np.asarray(accepted).tolist(), draft)


def check(cfg: ModelConfig, layer: int, draft: int) -> None:
    """Raises UserError where this model cannot draft so."""
    if not 1 <= layer < cfg.layers:
        raise UserError(
            f"drafts behind layer {layer} of a model with {cfg.layers} layers: choose 1 to {cfg.layers - 1}"
            + (f", best one of its exits, {', '.join(map(str, cfg.exits.at))}" if cfg.exits.at else "")
        )
    if draft < 1:
        raise UserError(f"draft = {draft} tokens a round must be at least 1")


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _run(stack: Stack, K: int, capacity: int, room: int, params, tokens_BxP, counts_B, limit, stop_ids):
    """Rounds until every row has stopped or has `limit` tokens: out [B, room], lengths, rounds and accepted drafts [B]."""
    B = tokens_BxP.shape[0]
    shallow, deep = stack.cut(params)
    logits, caches = stack.prefill(params, [shallow, deep], tokens_BxP, counts_B, stack.caches(B, capacity))
    first_B = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    one_B, steps = jnp.ones(B, jnp.int32), jnp.arange(K + 1, dtype=jnp.int32)

    def drafted(token_B, cache):
        """t, d_1 ... d_K and their states behind layer E, [B, K + 1, ...], and the first layers' cache with all of them."""

        def step(carry, i):
            token_B, cache = carry
            state = stack.embed(params, token_B[:, None], cache)
            cache = noted(cache, token_B[:, None])
            state, cache = stack.run(shallow, 0, state, cache, one_B)

            def next_token(state):
                logits = stack.logits(params, stack.normed(params, state, 0))
                return jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)

            # The last draft has nothing to say: it is there to be in the cache.
            new_B = jax.lax.cond(i < K, next_token, lambda state: token_B, state)
            return (new_B, cache), (token_B, jax.tree.map(lambda x: x[:, 0], state))

        (_, cache), (tokens, states) = jax.lax.scan(step, (token_B, cache), steps)
        rows_first = lambda x: jnp.moveaxis(x, 0, 1)
        return rows_first(tokens), jax.tree.map(rows_first, states), cache

    def going(carry):
        return carry[1].any()

    def body(carry):
        token_B, alive_B, caches, out, lengths_B, rounds_B, accepted_B = carry
        tokens_BxN, states, shallow_cache = drafted(token_B, caches[0])
        state, deep_cache = stack.run(deep, 1, states, caches[1], jnp.zeros(B, jnp.int32))
        chosen_BxN = jnp.argmax(stack.logits(params, stack.normed(params, state, 1)), axis=-1).astype(jnp.int32)
        found = taken(tokens_BxN, chosen_BxN, alive_B, out, lengths_B, limit, stop_ids)
        next_B, going_B, out, lengths_B, accepted = found
        # Behind this length lie drafts that were not accepted: the next round writes over them.
        lens_B = caches[0].lens + jnp.where(alive_B, accepted + 1, 0)
        caches = [cache.replace(lens=lens_B) for cache in (shallow_cache, deep_cache)]
        rounds_B = rounds_B + alive_B
        accepted_B = accepted_B + jnp.where(alive_B, accepted, 0)
        return next_B, going_B, caches, out, lengths_B, rounds_B, accepted_B

    zeros_B = jnp.zeros(B, jnp.int32)
    start = (first_B, ~stops(first_B, stop_ids), caches, jnp.zeros((B, room), jnp.int32), zeros_B, zeros_B, zeros_B)
    *_, out, lengths_B, rounds_B, accepted_B = jax.lax.while_loop(going, body, start)
    return out, lengths_B, rounds_B, accepted_B


def taken(tokens_BxN, chosen_BxN, alive_B, out, lengths_B, limit, stop_ids):
    """What a round gives: the longest run of drafts that the whole model would have chosen.

    Args:
      tokens_BxN: t, d_1 ... d_K of each row.
      chosen_BxN: the whole model's choice behind each.
      out: [B, room], what rows have so far, `lengths_B` of it.

    Returns:
      next_B, alive_B, out, lengths_B, and how many drafts were right [B].
    """
    steps, room = jnp.arange(tokens_BxN.shape[1], dtype=jnp.int32), out.shape[1]
    right_BxK = tokens_BxN[:, 1:] == chosen_BxN[:, :-1]
    right_B = jnp.cumprod(right_BxK.astype(jnp.int32), axis=1).sum(axis=1)
    next_B = jnp.take_along_axis(chosen_BxN, right_B[:, None], axis=1)[:, 0]
    # A stop among the accepted drafts ends the row in front of it, as it does when it is chosen next.
    ends_BxN = stops(tokens_BxN, stop_ids) & (steps[None] <= right_B[:, None])
    given = jnp.where(ends_BxN.any(1), jnp.argmax(ends_BxN, axis=1), right_B + 1)
    given = jnp.where(alive_B, jnp.minimum(given, limit - lengths_B), 0)
    place_BxN = jnp.where(steps[None] < given[:, None], lengths_B[:, None] + steps[None], room)
    out = out.at[jnp.arange(out.shape[0])[:, None], place_BxN].set(tokens_BxN, mode="drop")
    lengths_B = lengths_B + given
    alive_B = alive_B & ~ends_BxN.any(1) & ~stops(next_B, stop_ids) & (lengths_B < limit)
    return next_B, alive_B, out, lengths_B, right_B
