"""Decoding that stops a token at the exit that is sure of it, under static shapes, and truly leaves the rest out.

Behind each exit a branch (`lax.cond`) either ends the token or runs the next part of the stack: what is not taken costs
nothing. All rows of a batch leave by the same exit, when the least sure of those that are not finished is sure (CALM's rule for
batches, Schuster et al. 2022): at batch 1 this is each token's own depth.

A token that left has no keys and values in the layers above, where later tokens look for them, nor what a residual operator
that looks at earlier tokens keeps there (`jaxpar.models.reach`). Remedies, for both alike:

    Propagate   the exit's state goes through the upper layers' key and value projections (CALM, §3.3): cheap, approximate.
                An operator keeps of it in each of them what it keeps of a layer's state
    Recompute   tokens that left wait; the next token that goes on takes them along (EE-LLM, Chen et al. 2023, §5.2): every key
                and value is the one of a full pass, exactly. Only the parts that they have not run are run

The third, to verify drafts, is `jaxpar.adaptive.speculate`, whose tokens are those of plain decoding as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.adaptive.policy import ExitEarly, Propagate
from jaxpar.adaptive.prompts import Stack, prepared, stops
from jaxpar.errors import UserError
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.models.exits.propagate import keys_from
from jaxpar.models.reach import noted
from jaxpar.sampling import Sampler


@dataclass(frozen=True)
class Exited:
    """What was generated, and how deep.

    Attributes:
      rows: the new tokens of each row.
      exits: how many steps left by each exit and, last, by the last layer. The first token comes from the prompt's own pass.
      layers_run: layers that a row ran for its new tokens, those that waited included; a full pass has `layers` for each.
    """

    rows: list[list[int]]
    exits: list[int]
    layers_run: int
    layers: int

    @property
    def depth(self) -> float:
        """Layers a token, on average."""
        return self.layers_run / max(sum(self.exits), 1)


def exit_early(
    cfg: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    policy: ExitEarly,
    *,
    new_tokens: int,
    sampler: Sampler = Sampler(),
    stop: Sequence[int] = (),
    key=None,
    vocabulary: int | None = None,
    ops: Ops = Ops(),
    own: Any = None,
) -> Exited:
    """Continue each prompt, each token through as many layers as the policy asks for.

    Args:
      own: the exits' learned parameters, leaves [n, ...], where the policy's confidence has some.

    Other arguments are those of `jaxpar.generation.generate`.

    Raises:
      UserError: a model without exits (or with others), or prompts that do not suit the model.
    """
    at = policy.exits(cfg)
    if policy.learns and own is None:
        raise UserError(
            "the confidence Learned has parameters: fit them (jaxpar.adaptive.confidence.fit) and give them as `own`"
        )
    rows = prepared(cfg, prompts, new_tokens, stop, policy.remedy.window + 1)
    stack = Stack(cfg, at, ops, cfg.vocabulary if vocabulary is None else vocabulary)
    value, fixed = jnp.float32(policy.threshold.value), replace(policy, threshold=replace(policy.threshold, value=0.5))
    limit = jnp.asarray(new_tokens, jnp.int32)
    key = jax.random.key(0) if key is None else key
    out, lengths, left, ran, _ = _run(
        stack,
        fixed,
        sampler,
        rows.capacity,
        rows.room,
        params,
        own,
        rows.tokens,
        rows.counts,
        value,
        limit,
        rows.stop,
        key,
    )
    out, lengths, left, ran = jax.device_get((out, lengths, left, ran))
    return Exited([row[:n].tolist() for row, n in zip(out, lengths, strict=True)], left.tolist(), int(ran), cfg.layers)


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(stack, policy, sampler, capacity, room, params, own, tokens_BxP, counts_B, value, limit, stop_ids, key):
    """out [B, room], lengths [B], steps by exit [n + 1], layers run by a row, and the parts' caches."""
    B, n = tokens_BxP.shape[0], len(stack.at)
    parts, sizes = stack.cut(params), stack.sizes
    remedy = policy.remedy
    waits = not isinstance(remedy, Propagate)
    W = remedy.window
    row_keys_B = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B))

    def choose(logits_BxV, t):
        return sampler(jax.vmap(lambda k: jax.random.fold_in(k, t))(row_keys_B), logits_BxV)

    logits, caches = stack.prefill(params, parts, tokens_BxP, counts_B, stack.caches(B, capacity))
    first_B = choose(logits, 0)
    state = jax.eval_shape(lambda: stack.embed(params, tokens_BxP[:, :1], caches[0]))
    # States of tokens that wait behind each exit, by their place in the row.
    slot = lambda s: jnp.zeros((B, capacity, *s.shape[2:]), s.dtype)
    waiting = tuple(jax.tree.map(slot, state) for _ in range(n)) if waits else ()
    rows_Bx1 = jnp.arange(B)[:, None]

    def put(buffer, state, slots_BxQ):
        return jax.tree.map(lambda b, s: b.at[rows_Bx1, slots_BxQ].set(s, mode="drop"), buffer, state)

    def step(token_B, alive_B, t, caches, waiting):
        """One token: logits [B, V], caches, waiting, the exit it left by, layers run by a row."""
        counts_B = alive_B.astype(jnp.int32)
        here_Bx1 = caches[0].lens[:, None]
        goal = policy.threshold.scaled(value, t, limit)
        state = stack.embed(params, token_B[:, None], caches[0])
        start = stack.normed(params, state, 0)
        state, first = stack.run(parts[0], 0, state, noted(caches[0], token_B[:, None]), counts_B)

        def behind(number, state, before, caches, waiting):
            """Behind part `number`, whose layers have run: leave, or go on."""
            x = stack.normed(params, state, number)
            if number == n:
                return stack.logits(params, x)[:, 0], caches, waiting, jnp.int32(n), jnp.int32(0)
            logits = stack.logits(params, x)[:, 0] if policy.confidence.asks_logits else None
            learned = jax.tree.map(lambda p: p[number], own)
            sure_B = policy.confidence(logits, x[:, 0], before[:, 0], learned) > goal
            leave = (sure_B | ~alive_B).all()
            if waits:
                waiting = (*waiting[:number], put(waiting[number], state, here_Bx1), *waiting[number + 1 :])
                behind_B = lambda cache: jnp.where(alive_B, here_Bx1[:, 0] - cache.lens, 0)
                lag = jnp.max(behind_B(caches[number + 1]))
                # The last part is furthest behind.
                leave &= jnp.max(behind_B(caches[n])) < W

            def left(state, caches, waiting):
                if not waits:
                    above = range(number + 1, n + 1)
                    firsts = (0, *stack.at)
                    filled = [keys_from(stack.cfg, parts[i], state, caches[i], stack.ops, firsts[i]) for i in above]
                    filled = [cache.replace(lens=cache.lens + counts_B) for cache in filled]
                    caches = (*caches[: number + 1], *filled)
                said = stack.logits(params, x)[:, 0] if logits is None else logits
                return said, caches, waiting, jnp.int32(number), jnp.int32(0)

            def narrow(state, caches, waiting):
                new, cache = stack.run(parts[number + 1], number + 1, state, caches[number + 1], counts_B)
                return new, (*caches[: number + 1], cache, *caches[number + 2 :]), waiting, jnp.int32(1)

            def wide(state, caches, waiting):
                # Everyone that waits here and the token itself; what is behind it is padding, and is written over later.
                cache = caches[number + 1]
                slots_BxQ = cache.lens[:, None] + jnp.arange(W + 1, dtype=jnp.int32)[None]
                own_BxQ = jax.tree.map(lambda b: b.at[rows_Bx1, slots_BxQ].get(mode="clip"), waiting[number])
                lag_B = here_Bx1[:, 0] - cache.lens
                new, cache = stack.run(parts[number + 1], number + 1, own_BxQ, cache, lag_B + counts_B)
                if number + 1 < n:
                    later = put(waiting[number + 1], new, slots_BxQ)
                    waiting = (*waiting[: number + 1], later, *waiting[number + 2 :])
                last = lambda s: jnp.take_along_axis(s, lag_B.reshape(B, *(1,) * (s.ndim - 1)), axis=1)
                caches = (*caches[: number + 1], cache, *caches[number + 2 :])
                return jax.tree.map(last, new), caches, waiting, jnp.int32(W + 1)

            def on(state, caches, waiting):
                if waits:
                    new, caches, waiting, width = jax.lax.cond(lag > 0, wide, narrow, state, caches, waiting)
                else:
                    new, caches, waiting, width = narrow(state, caches, waiting)
                *rest, ran = behind(number + 1, new, x, caches, waiting)
                return *rest, ran + width * sizes[number + 1]

            return jax.lax.cond(leave, left, on, state, caches, waiting)

        *rest, ran = behind(0, state, start, (first, *caches[1:]), waiting)
        return *rest, ran + sizes[0]

    def going(carry):
        t, _, alive_B, *_ = carry
        return (t < limit) & alive_B.any()

    def body(carry):
        t, token_B, alive_B, caches, waiting, out, lengths_B, left, ran = carry
        out = out.at[:, t].set(jnp.where(alive_B, token_B, 0))
        lengths_B = lengths_B + alive_B
        logits, caches, waiting, number, layers = step(token_B, alive_B, t, caches, waiting)
        token_B = choose(logits, t + 1)
        alive_B = alive_B & ~stops(token_B, stop_ids)
        return t + 1, token_B, alive_B, caches, waiting, out, lengths_B, left.at[number].add(1), ran + layers

    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    alive_B = ~stops(first_B, stop_ids)
    start = (0, first_B, alive_B, tuple(caches), waiting, zeros(B, room), zeros(B), zeros(n + 1), zeros())
    *_, caches, _, out, lengths_B, left, ran = jax.lax.while_loop(going, body, start)
    return out, lengths_B, left, ran, caches
