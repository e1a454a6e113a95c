"""Generation through a cache in pages, with continuous batching: any number of prompts, a few rows, one compiled program.

Prompts are requests, which wait in a queue in their order. Each turn of the loop reads some tokens of every row (scheduling by
iteration: Yu et al. 2022, Orca), and a request that ends gives its row and its pages (Kwon et al. 2023, PagedAttention) to
the next one. In a turn each row reads what it has not read yet, up to a chunk: a prompt in several turns, a row behind its
prompt the one token that it chose last. Rows of both kinds share a turn (chunked prefills: Agrawal et al. 2023, Sarathi);
where no row is in its prompt, the turn is one token wide.

A request is admitted when a row is idle and all of its prompt has pages, so a prompt that was begun is read to its end. A row
that needs a page for its next token and finds none waits, and pages that become free go to the request that was admitted first.
When nobody can go on, the one admitted last is evicted: it gives its pages back and waits in front of the queue, its tokens so far
being its prompt. Requests are admitted in the order of their numbers, and those evicted have the highest of those
running: so the number of a request is its age, and the queue is sorted by it at any time. The oldest is never evicted, and
fits alone: so all end.

Where this differs from the papers' systems: queue and turns are on the device, in loops of one program without a word to the
host; evicted requests are computed again and never copied out (of vLLM's two ways the simpler one); a chunk is as wide for each row
as for the others (shapes are static), where Sarathi counts the tokens of all rows against one budget; rows share no pages.

A request's tokens are those of `jaxpar.generation.generate` of it alone, whatever row it has and whoever else runs: its t-th
token is drawn with fold_in(fold_in(key, request), t). (As everywhere, up to float sums in another order: of two tokens that are
equally good to the last bit either may be taken.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxpar.generation import bucket, check_prompts
from jaxpar.models import decoder, paged
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.models.paged import PagedCache
from jaxpar.models.steering import Steering
from jaxpar.paging import Paged
from jaxpar.sampling import Sampler


@dataclass(frozen=True)
class Served:
    """What was generated, and what it took.

    Attributes:
      rows: the new tokens of each request.
      peak: the most pages that were taken at once.
      evictions: how often a request gave its pages back before its end.
    """

    rows: list[list[int]]
    peak: int
    evictions: int


def generate_paged(
    cfg: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    paging: Paged = Paged(),
    new_tokens: int,
    sampler: Sampler = Sampler(),
    stop: Sequence[int] = (),
    key=None,
    vocabulary: int | None = None,
    ops: Ops = Ops(),
    steering: Steering | None = None,
) -> Served:
    """Continue each prompt. What is not said here is as of `jaxpar.generation.continued`.

    Args:
      paging: how many rows and pages there are.
      key: random key; request n's t-th token uses fold_in(fold_in(key, n), t).

    Raises:
      UserError: as `continued`, and a prompt that takes more pages than there are.
      ValueError: a model whose layers keep more of a token than keys and values, see `paged.check`.
    """
    prompts = [list(p) for p in prompts]
    check_prompts(cfg, prompts, new_tokens)
    paging.check(prompts, new_tokens)
    paged.check(cfg)
    requests, width = bucket(len(prompts), 1), bucket(max(len(p) for p in prompts))
    text_NxW = np.zeros((requests, width + bucket(new_tokens)), np.int32)
    counts_N = np.zeros(requests, np.int32)
    for n, prompt in enumerate(prompts):
        text_NxW[n, : len(prompt)], counts_N[n] = prompt, len(prompt)
    static = cfg, sampler, paging, cfg.vocabulary if vocabulary is None else vocabulary, ops
    limit, stop_ids = jnp.asarray(new_tokens, jnp.int32), np.array(sorted(set(stop)), np.int32)
    key = jax.random.key(0) if key is None else key
    found = jax.device_get(_run(*static, params, steering, text_NxW, counts_N, limit, stop_ids, key))
    text_NxW, known_N, peak, evictions = found
    rows = [text_NxW[n, len(p) : known_N[n]].tolist() for n, p in enumerate(prompts)]
    return Served(rows, int(peak), int(evictions))


@struct.dataclass
class State:
    """Between two turns. B rows, N requests, W the longest text.

    Attributes:
      cache: of the rows' tokens that were read.
      request: int32 [B], whom each row serves; -1 for an idle one.
      left: int32 [B], how many known tokens of its request each row has yet to read.
      granted: bool [B], whether it has pages for them.
      waiting: bool [N], who is in the queue.
      text: int32 [N, W], prompts and the tokens chosen behind them.
      known: int32 [N], how many of these there are.
      peak, evictions: int32, as of `Served`.
    """

    cache: PagedCache
    request: jax.Array
    left: jax.Array
    granted: jax.Array
    waiting: jax.Array
    text: jax.Array
    known: jax.Array
    peak: jax.Array
    evictions: jax.Array

    @property
    def wide(self) -> jax.Array:
        """Whether a row that may go on is in its prompt."""
        return jnp.any(self.granted & (self.left > 1))

    @property
    def narrow(self) -> jax.Array:
        """Whether rows may go on, and all that may read one token."""
        return jnp.any(self.granted) & ~self.wide


def admit(state: State) -> State:
    """Idle rows take those that wait, in their order, and all rows what pages they need, the oldest request first. Twice in a
    row it changes nothing more."""
    N, idle_B = state.waiting.shape[0], state.request < 0
    in_order_N = jnp.argsort(~state.waiting, stable=True)
    nth_B = jnp.cumsum(idle_B) - 1
    next_B = jnp.where(nth_B < jnp.sum(state.waiting), in_order_N[jnp.clip(nth_B, 0, N - 1)], -1)
    request_B = jnp.where(idle_B, next_B, state.request).astype(jnp.int32)
    left_B = jnp.where(request_B < 0, 0, state.known[request_B] - state.cache.lens)
    by_age_B = jnp.argsort(jnp.where(request_B < 0, N, request_B))
    cache, granted_B = paged.reserve(state.cache, left_B, by_age_B)
    granted_B &= request_B >= 0
    # Who found no pages to begin with waits on, and holds none.
    request_B = jnp.where(idle_B & ~granted_B, -1, request_B)
    return state.replace(
        cache=cache,
        request=request_B,
        left=left_B,
        granted=granted_B,
        waiting=state.waiting.at[jnp.where(request_B < 0, N, request_B)].set(False, mode="drop"),
        peak=jnp.maximum(state.peak, jnp.sum(~cache.free)),
    )


def chosen(state: State, counts_N, limit, token_B, chose_B, stops_B) -> tuple[State, jax.Array]:
    """The state with the tokens of the rows that `chose_B` one, and who is at its end, bool [B]: by a stop token, which is not
    kept, or by `limit` tokens."""
    new_B, known_B = chose_B & ~stops_B, state.known[state.request]
    whose_B = jnp.where(new_B, state.request, state.known.shape[0])
    text = state.text.at[whose_B, known_B].set(token_B, mode="drop")
    known = state.known.at[whose_B].add(1, mode="drop")
    full_B = known_B + 1 - counts_N[state.request] >= limit
    return state.replace(text=text, known=known), chose_B & (stops_B | full_B)


def leave(state: State, gone_B) -> State:
    """The state without what these rows hold: they are idle."""
    return state.replace(cache=paged.release(state.cache, gone_B), request=jnp.where(gone_B, -1, state.request))


def unstuck(state: State) -> State:
    """The state where somebody can go on, unless all are at their end: where nobody can, the request that was admitted last gives
    back what it has, at least a page, and the oldest one, which needs no more, takes it."""
    evicted_B = ~jnp.any(state.granted) & (state.request >= 0) & (state.request == jnp.max(state.request))
    whose_B = jnp.where(evicted_B, state.request, state.waiting.shape[0])
    waiting, evictions = state.waiting.at[whose_B].set(True, mode="drop"), state.evictions + jnp.sum(evicted_B)
    return admit(leave(state, evicted_B).replace(waiting=waiting, evictions=evictions))


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _run(cfg, sampler, paging, vocabulary, ops, params, steering, text_NxW, counts_N, limit, stop_ids, key):
    """Turns until nobody runs or waits. Lengths, limit, the stop ids' values and the key are traced, and so is the number of
    requests within its bucket: those without tokens never wait.
    """
    N, W = text_NxW.shape
    B = min(paging.rows, N)
    allowed_V = jnp.arange(cfg.vocabulary) < vocabulary

    def read(state: State, width: int, count_B):
        """`count_B` more tokens of each row: float32 logits [B, V] behind the last of them, and the cache."""
        slots_BxT = state.cache.lens[:, None] + jnp.arange(width, dtype=jnp.int32)[None]
        tokens_BxT = state.text.at[state.request[:, None], slots_BxT].get(mode="clip")
        steered = steering
        if steering is not None:
            steered = steering.replace(tokens=slots_BxT >= counts_N[state.request][:, None] - 1)
        ctx = Context(cache=state.cache, steering=steered, ops=ops)
        logits_Bx1xV, cache, _ = decoder.advance(cfg, params, tokens_BxT, ctx, count_B, last=True)
        return logits_Bx1xV[:, 0], cache

    def choose(state: State, logits_BxV):
        new_B = state.known[state.request] - counts_N[state.request]
        of = lambda request, t: jax.random.fold_in(jax.random.fold_in(key, request), t)
        return sampler(jax.vmap(of)(state.request, new_B), jnp.where(allowed_V[None], logits_BxV, -jnp.inf))

    def turn(width: int, state: State) -> State:
        count_B = jnp.where(state.granted, jnp.minimum(state.left, width), 0)
        logits_BxV, cache = read(state, width, count_B)
        token_B = choose(state, logits_BxV)
        stops_B = (token_B[:, None] == stop_ids[None, :]).any(-1)
        chose_B = state.granted & (count_B == state.left)
        state, over_B = chosen(state.replace(cache=cache), counts_N, limit, token_B, chose_B, stops_B)
        return admit(leave(state, over_B))

    def turns(state: State) -> State:
        # Loops of each width and no condition in one loop: XLA copies a cache that goes through a condition.
        state = jax.lax.while_loop(lambda state: state.wide, partial(turn, paging.chunk), state)
        return unstuck(jax.lax.while_loop(lambda state: state.narrow, partial(turn, 1), state))

    # No row is longer than the longest text, and none that was let in takes more pages than there are.
    most = min(W, paging.pages * paging.page)
    cache = paged.empty(cfg, B, most, paging.pages, paging.page, form=ops.cache)
    zeros_B, none = jnp.zeros(B, jnp.int32), jnp.asarray(0, jnp.int32)
    start = State(cache, zeros_B - 1, zeros_B, zeros_B > 0, counts_N > 0, text_NxW, counts_N, none, none)
    state = jax.lax.while_loop(lambda state: jnp.any(state.granted), turns, admit(start))
    return state.text, state.known, state.peak, state.evictions
