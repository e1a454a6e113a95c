"""Generation with a key/value cache: batches of unequal prompts, one compile for all lengths within a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.errors import UserError
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.models.positions import Learned
from jaxpar.sampling import Sampler


def bucket(length: int, smallest: int = 32) -> int:
    """The next power of two: shapes are rounded up to it, so that few programs are compiled."""
    return max(smallest, 1 << max(length - 1, 0).bit_length())


def generate(
    cfg: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    sampler: Sampler = Sampler(),
    stop: Sequence[int] = (),
    key=None,
    vocabulary: int | None = None,
    ops: Ops = Ops(),
) -> list[list[int]]:
    """Continue each prompt.

    Args:
      prompts: token ids, rows of unequal length, none empty.
      new_tokens: the most tokens to add to each.
      stop: ids that end a row; the id itself is not returned.
      key: random key; row b's t-th token uses fold_in(fold_in(key, b), t), whatever else is in the batch.
      vocabulary: ids from here on are never chosen (rows that pad the embedding). None: all may be.

    Returns:
      The new tokens of each row.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, or a length beyond the model's context.
    """
    prompts = [list(p) for p in prompts]
    check_prompts(cfg, prompts, new_tokens)
    longest = max(len(p) for p in prompts)
    width = bucket(longest)
    tokens_BxP = np.zeros((len(prompts), width), np.int32)
    for row, p in zip(tokens_BxP, prompts, strict=True):
        row[: len(p)] = p
    counts_B = np.array([len(p) for p in prompts], np.int32)
    stop_ids = np.array(sorted(set(stop)), np.int32)
    out, lengths = _run(
        cfg,
        sampler,
        # Room for the padding of the prefill too, whose slots lie behind the real ones until they are overwritten.
        bucket(width + new_tokens),
        bucket(new_tokens),
        vocabulary if vocabulary is not None else cfg.vocabulary,
        ops,
        params,
        tokens_BxP,
        counts_B,
        jnp.asarray(new_tokens, jnp.int32),
        stop_ids,
        jax.random.key(0) if key is None else key,
    )
    out, lengths = np.asarray(out), np.asarray(lengths)
    return [row[:n].tolist() for row, n in zip(out, lengths, strict=True)]


def check_prompts(cfg: ModelConfig, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    """Raises UserError where these prompts cannot be continued by `new_tokens` tokens."""
    if not prompts:
        raise UserError("there is no prompt to continue; give at least one")
    if new_tokens < 1:
        raise UserError(f"new_tokens = {new_tokens} must be at least 1")
    for i, p in enumerate(prompts):
        if not p:
            raise UserError(
                f"prompt {i} is empty; give at least one token (the end-of-document token starts a new text)"
            )
        if bad := [t for t in p if not 0 <= t < cfg.vocabulary]:
            raise UserError(
                f"prompt {i} holds token id {bad[0]}, but the model's vocabulary has {cfg.vocabulary} ids; "
                "was it made with another tokenizer?"
            )
        if len(p) >= cfg.context or (isinstance(cfg.positions, Learned) and len(p) + new_tokens > cfg.context):
            raise UserError(
                f"prompt {i} has {len(p)} tokens and {new_tokens} new ones were asked for, but the model's context is "
                f"{cfg.context} tokens; shorten the prompt or ask for at most {max(cfg.context - len(p), 0)}"
            )


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _run(cfg, sampler, capacity, room, vocabulary, ops, params, tokens_BxP, counts_B, limit, stop_ids, key):
    """Prefill, then one token at a time until every row has stopped or has `limit` tokens.

    Everything that changes from call to call within a bucket (lengths, limit, stop ids' values, key) is traced.
    """
    B = tokens_BxP.shape[0]
    row_keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B))
    allowed_V = jnp.arange(cfg.vocabulary) < vocabulary

    def choose(logits_Bx1xV, t):
        logits_BxV = jnp.where(allowed_V[None], logits_Bx1xV[:, 0], -jnp.inf)
        keys_B = jax.vmap(lambda k: jax.random.fold_in(k, t))(row_keys_B)
        return sampler(keys_B, logits_BxV)

    def stops(token_B):
        return (token_B[:, None] == stop_ids[None, :]).any(-1)

    cache = kv.empty(cfg, B, capacity)
    logits, cache = decoder.forward(cfg, params, tokens_BxP, cache, counts_B, ops, last=True)
    first_B = choose(logits, 0)
    start = (0, first_B, ~stops(first_B), cache, jnp.zeros((B, room), jnp.int32), jnp.zeros(B, jnp.int32))

    def going(carry):
        t, _, alive_B, *_ = carry
        return (t < limit) & alive_B.any()

    def body(carry):
        t, token_B, alive_B, cache, out, lengths_B = carry
        out = out.at[:, t].set(jnp.where(alive_B, token_B, 0))
        lengths_B = lengths_B + alive_B
        # Rows that have stopped write to a slot that they never advance over.
        logits, cache = decoder.forward(cfg, params, token_B[:, None], cache, alive_B.astype(jnp.int32), ops)
        token_B = choose(logits, t + 1)
        return t + 1, token_B, alive_B & ~stops(token_B), cache, out, lengths_B

    *_, out, lengths_B = jax.lax.while_loop(going, body, start)
    return out, lengths_B
