"""Generation with a key/value cache: batches of unequal prompts, one compile for all lengths within a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.errors import UserError
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.models.positions import Learned
from jaxpar.models.routing.record import Skip
from jaxpar.models.routing.skip import Skipping, check
from jaxpar.models.steering import Steering
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
    """Continue each prompt: `continued` without what was left out."""
    return continued(
        cfg,
        params,
        prompts,
        new_tokens=new_tokens,
        sampler=sampler,
        stop=stop,
        key=key,
        vocabulary=vocabulary,
        ops=ops,
    ).rows


@dataclass(frozen=True)
class Continued:
    """What was generated, and what was left out meanwhile.

    Attributes:
      rows: the new tokens of each row.
      skipped: layers' parts that tokens left out, of all that they had: what masking simulates.
      spared: parts that did not run, of all: what is truly saved. With one row, `skipped`.
    """

    rows: list[list[int]]
    skipped: float = 0.0
    spared: float = 0.0


def continued(
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
    skip: Skipping | None = None,
    steering: Steering | None = None,
) -> Continued:
    """Continue each prompt.

    Args:
      prompts: token ids, rows of unequal length, none empty.
      new_tokens: the most tokens to add to each.
      stop: ids that end a row; the id itself is not returned.
      key: random key; row b's t-th token uses fold_in(fold_in(key, b), t), whatever else is in the batch.
      vocabulary: ids from here on are never chosen (rows that pad the embedding). None: all may be.
      skip: which parts of layers tokens leave out, see `jaxpar.models.routing.skip`. None: none.
      steering: what is added to the stream at each prompt's last token and at every new one (its `tokens` are not looked
        at), see `jaxpar.models.steering`. None: nothing.

    Returns:
      The new tokens of each row, and what was left out.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, or a length beyond the model's context.
      ValueError: skipping that does not suit the model.
    """
    prompts = [list(p) for p in prompts]
    check_prompts(cfg, prompts, new_tokens)
    if skip is not None:
        check(skip, cfg)
    longest = max(len(p) for p in prompts)
    width = bucket(longest)
    tokens_BxP = np.zeros((len(prompts), width), np.int32)
    for row, p in zip(tokens_BxP, prompts, strict=True):
        row[: len(p)] = p
    counts_B = np.array([len(p) for p in prompts], np.int32)
    stop_ids = np.array(sorted(set(stop)), np.int32)
    out, lengths, told = _run(
        cfg,
        sampler,
        # Room for the padding of the prefill too, whose slots lie behind the real ones until they are overwritten.
        bucket(width + new_tokens),
        bucket(new_tokens),
        vocabulary if vocabulary is not None else cfg.vocabulary,
        ops,
        skip,
        params,
        steering,
        tokens_BxP,
        counts_B,
        jnp.asarray(new_tokens, jnp.int32),
        stop_ids,
        jax.random.key(0) if key is None else key,
    )
    out, lengths, told = jax.device_get((out, lengths, told))
    passes, skipped, spared = told
    rows = [row[:n].tolist() for row, n in zip(out, lengths, strict=True)]
    parts = max(cfg.layers * int(passes), 1)
    return Continued(rows, float(skipped) / max(cfg.layers * int(lengths.sum()), 1), float(spared) / parts)


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


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5, 6))
def _run(
    cfg, sampler, capacity, room, vocabulary, ops, skip, params, steering, tokens_BxP, counts_B, limit, stop_ids, key
):
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

    cache = kv.empty(cfg, B, capacity, there=skip is not None and skip.keys == "mask", form=ops.cache)
    at_end = None
    if steering is not None:
        at_end = steering.replace(tokens=jnp.arange(tokens_BxP.shape[1])[None] == counts_B[:, None] - 1)
        steering = steering.replace(tokens=None)
    ctx = Context(cache=cache, steering=at_end, ops=ops)
    logits, cache, _ = decoder.advance(cfg, params, tokens_BxP, ctx, counts_B, last=True)
    first_B = choose(logits, 0)
    start = (
        0,
        first_B,
        ~stops(first_B),
        cache,
        jnp.zeros((B, room), jnp.int32),
        jnp.zeros(B, jnp.int32),
        jnp.zeros(2, jnp.int32),
    )

    def going(carry):
        t, _, alive_B, *_ = carry
        return (t < limit) & alive_B.any()

    def body(carry):
        t, token_B, alive_B, cache, out, lengths_B, left_out = carry
        out = out.at[:, t].set(jnp.where(alive_B, token_B, 0))
        lengths_B = lengths_B + alive_B
        # Rows that have stopped write to a slot that they never advance over.
        ctx = Context(cache=cache, steering=steering, ops=ops)
        if skip is not None:
            ctx = ctx.replace(skip=Skip(jnp.broadcast_to(t >= skip.warmup, (B, 1)), skip))
        logits, cache, aux = decoder.advance(cfg, params, token_B[:, None], ctx, alive_B.astype(jnp.int32))
        if skip is not None:
            left_out += jnp.stack([(aux.record.skipped * alive_B[:, None]).sum(), aux.record.spared])
        token_B = choose(logits, t + 1)
        return t + 1, token_B, alive_B & ~stops(token_B), cache, out, lengths_B, left_out

    steps, *_, out, lengths_B, left_out = jax.lax.while_loop(going, body, start)
    return out, lengths_B, (steps, *left_out)
