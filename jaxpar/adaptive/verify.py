"""Drafts by the model with parts of its layers left out, verified by the whole model (Draft & Verify, Zhang et al. 2023).

The third remedy for keys and values of layers that tokens did not run, after propagating and masking: a round drafts K tokens with
parts left out, then the whole model runs all of them at once. Its choices say how many drafts stay, and its keys and values
take the place of the drafts'. So tokens and cache are those of plain greedy decoding, whatever is left out. The paper chooses
the layers to leave out by search; here the skipping policy says it, token by token if it likes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.adaptive.prompts import prepared, stops
from jaxpar.adaptive.speculate import Speculated, taken
from jaxpar.errors import UserError
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.models.routing.record import Skip
from jaxpar.models.routing.skip import Skipping, check


def verified(
    cfg: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    skip: Skipping,
    *,
    new_tokens: int,
    draft: int,
    stop: Sequence[int] = (),
    vocabulary: int | None = None,
    ops: Ops = Ops(),
) -> Speculated:
    """Continue each prompt greedily: token by token as `jaxpar.generation.generate` does without skipping.

    Args:
      skip: what drafts leave out.
      draft: K, drafts in a round.
      stop, vocabulary: as in `generate`.

    Raises:
      UserError: no draft, keys that are masked, or prompts that do not suit the model.
      ValueError: skipping that does not suit the model.
    """
    if draft < 1:
        raise UserError(f"draft = {draft} tokens a round must be at least 1")
    if skip.keys == "mask":
        raise UserError(
            "skip.keys = 'mask' hides a draft's token where it left a layer out, and the whole model's keys are put there a round "
            "later; with --decoding speculate take --skip.keys propagate"
        )
    check(skip, cfg)
    rows = prepared(cfg, prompts, new_tokens, stop, draft + 1)
    static = cfg, skip, draft, rows.capacity, rows.room, cfg.vocabulary if vocabulary is None else vocabulary, ops
    found = _run(*static, params, rows.tokens, rows.counts, jnp.asarray(new_tokens, jnp.int32), rows.stop)
    out, lengths, rounds, accepted = jax.device_get(found)
    texts = [row[:n].tolist() for row, n in zip(out, lengths, strict=True)]
    return Speculated(texts, np.asarray(rounds).tolist(), np.asarray(accepted).tolist(), draft)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _run(cfg, policy, K, capacity, room, vocabulary, ops, params, tokens_BxP, counts_B, limit, stop_ids):
    """Rounds until every row has stopped or has `limit` tokens: out [B, room], lengths, rounds and accepted drafts [B]."""
    B = tokens_BxP.shape[0]
    steps = jnp.arange(K, dtype=jnp.int32)

    def choice(logits):
        allowed_V = jnp.arange(cfg.vocabulary) < vocabulary
        return jnp.argmax(jnp.where(allowed_V, logits, -jnp.inf), axis=-1).astype(jnp.int32)

    cache = kv.empty(cfg, B, capacity, form=ops.cache)
    logits, cache, _ = decoder.advance(cfg, params, tokens_BxP, Context(cache=cache, ops=ops), counts_B, last=True)
    first_B = choice(logits[:, 0])

    def body(carry):
        token_B, alive_B, cache, out, lengths_B, rounds_B, accepted_B = carry

        def step(carry, i):
            token_B, cache = carry
            active_Bx1 = (lengths_B + i >= policy.warmup)[:, None]
            ctx = Context(cache=cache, skip=Skip(active_Bx1, policy), ops=ops)
            logits, cache, _ = decoder.advance(cfg, params, token_B[:, None], ctx)
            return (choice(logits[:, 0]), cache), token_B

        (last_B, drafted), tokens = jax.lax.scan(step, (token_B, cache), steps)
        tokens_BxN = jnp.concatenate([jnp.moveaxis(tokens, 0, 1), last_B[:, None]], axis=1)
        # From the same place again: every key and value is written over before it is seen.
        ctx = Context(cache=drafted.replace(lens=cache.lens), ops=ops)
        logits, whole, _ = decoder.advance(cfg, params, tokens_BxN, ctx)
        found = taken(tokens_BxN, choice(logits), alive_B, out, lengths_B, limit, stop_ids)
        next_B, going_B, out, lengths_B, right_B = found
        cache = whole.replace(lens=cache.lens + jnp.where(alive_B, right_B + 1, 0))
        accepted_B = accepted_B + jnp.where(alive_B, right_B, 0)
        return next_B, going_B, cache, out, lengths_B, rounds_B + alive_B, accepted_B

    zeros_B = jnp.zeros(B, jnp.int32)
    out = jnp.zeros((B, room), jnp.int32)
    start = (first_B, ~stops(first_B, stop_ids), cache, out, zeros_B, zeros_B, zeros_B)
    *_, out, lengths_B, rounds_B, accepted_B = jax.lax.while_loop(lambda carry: carry[1].any(), body, start)
    return out, lengths_B, rounds_B, accepted_B
