"""The loop over layers in blocks, for mixers whose sources do not change while a block of layers runs.

Sources are looked at once a block, for all branches of its layers, in place of once a branch: forwards the buffer is read once,
and backwards its gradient, which is as large, is added to once (algorithm 1 of Attention Residuals, arXiv 2603.15031, here
in training). Between, layers hand on the sum of what the block's branches gave so far. Where layers need again what their
block saw, as with rematerialisation, the backward pass computes it from the last buffer, as
`jaxpar.models.residual.write_once` does for single layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.models.residual.base import Stack, StackMixer, number_of, slot
from jaxpar.models.residual.turns import Pulls, pick, put, table, turns
from jaxpar.pallas_kernels.varying import varies_over, varying

Tree = Any


def loop(cfg, layer: Callable, stacked: Tree, state: tuple[Stack, ...], given: Tree, first, k: int):
    """Run n layers, k at a time; the first begins a block, and the last block may be shorter.

    Args:
      layer, stacked, state, given: as in `write_once.loop`.
      first: the first layer's number; may be traced.

    Returns:
      The states, as `write_once.loop` gives them.
    """
    n = jax.tree.leaves(stacked)[0].shape[0]
    first = number_of(first)
    whole = n // k * k
    for start, stop, size in ((0, whole, k), (whole, n, n - whole)):
        if start == stop:
            continue
        some = stacked if stop - start == n else jax.tree.map(lambda x, a=start, b=stop: x[a:b], stacked)
        slots = _blocks(cfg, layer, some, tuple(s.slots for s in state), given, first + start, stop - start, size)
        # A block that is cut short goes on behind these layers.
        open_at = cfg.residual.places(cfg, first + n - 1)[-1] if size < k else None
        state = tuple(Stack(s, jnp.zeros_like(s[0]) if open_at is None else slot(s, open_at)) for s in slots)
    return state


def _blocks(cfg, layer, stacked, slots, given, first, n, k):
    """The slots behind n layers, whole blocks of k, from `first` on; of each part of the rows.

    What layers keep for the backward pass, and their gradients, lie in tables of n rows that both loops carry.
    """
    mixer: StackMixer = cfg.residual
    unroll = cfg.layer_loop == "unroll"
    # Known where each layer has a program of its own.
    over = range if unroll else np.arange
    blocks = over(n // k)
    pulls = Pulls()
    # A number that is known stays so; one that is traced goes through the passes as they are given it.
    start = lambda given: first if isinstance(first, int) else given

    def look(params, slots, number):
        """What the block's layers see of the slots, for each part, and what is kept of it."""
        return zip(*(mixer.ahead(cfg, params, s, number) for s in slots), strict=True)

    def look_back(params, slots, number, *rest):
        """The gradients of the block's parameters, and those of the slots with what the block saw of them."""
        each = [mixer.ahead_back(cfg, params, s, number, *of_s) for s, *of_s in zip(slots, *rest, strict=True)]
        d_params, g_slots = zip(*each, strict=True)
        return jax.tree.map(lambda *parts: sum(parts), *d_params), g_slots

    def own(stacked, row):
        """The parameters of the k layers from `row` on, as `ahead` has them."""
        cut = lambda x: x[row : row + k] if unroll else jax.lax.dynamic_slice_in_dim(x, row, k)
        return jax.tree.map(cut, stacked["residual"])

    # Branch by branch: cut out of the layer's part later, each would be copied for its backward pass, or kept.
    at = lambda x, j, i: (0, 0, j, i, *(0,) * (x.ndim - 4))
    cut = lambda x, j, i: jax.lax.dynamic_slice(x, at(x, j, i), (*x.shape[:2], 1, 1, *x.shape[4:]))[:, :, 0, 0]
    put_in = lambda x, new, j, i: jax.lax.dynamic_update_slice(x, new[:, :, None, None], at(x, j, i))
    branches = lambda seen, j: tuple(jax.tree.map(lambda x, i=i: cut(x, j, i), seen) for i in range(2))
    share = lambda seen, j: tuple(branches(part, j) for part in seen)
    nothing = lambda tree: jax.tree.map(lambda x: varying(jnp.zeros_like(x), varies_over(x)), tree)
    none = lambda slots: nothing(tuple(s[0] for s in slots))

    def forward(params, carry, told, given, number):
        after = layer(given, params, tuple(Stack(None, c, ahead=t) for c, t in zip(carry, told, strict=True)), number)
        return tuple(s.carry for s in after)

    def commit(slots, sums, number):
        place = mixer.places(cfg, number)[-1]
        set_at = jax.lax.dynamic_update_index_in_dim
        return tuple(set_at(s, new, place, 0) for s, new in zip(slots, sums, strict=True))

    def pulled(stacked, carry, seen, given, number, row, j):
        """A layer's sums, and what its backward pass needs besides what will be at hand."""
        params, told = pick(stacked, row), share(seen, j)
        out, pull = jax.vjp(lambda *args: forward(*args, given, number), params, carry, told)
        return out, pulls.cut(row if unroll else None, pull, (params, told, given))

    @jax.custom_vjp
    def run(stacked, slots, given, first):
        def block(slots, b):
            number = start(first) + b * k
            seen, _ = look(own(stacked, b * k), slots, number)

            def one(carry, j):
                return forward(pick(stacked, b * k + j), carry, share(seen, j), given, number + j), None

            sums, _ = turns(one, none(slots), over(k), n=k, unroll=unroll)
            return commit(slots, sums, number), None

        return turns(block, slots, blocks, n=n // k, unroll=unroll)[0]

    def keep(stacked, slots, given, first):
        def block(c, b):
            slots, kept = c
            number = start(first) + b * k
            seen, of_look = look(own(stacked, b * k), slots, number)

            def one(c, j):
                sums, new = pulled(stacked, c[0], seen, given, number + j, b * k + j, j)
                return (sums, put(c[1], b * k + j, new)), None

            (sums, kept), _ = turns(one, (none(slots), kept), over(k), n=k, unroll=unroll)
            return (commit(slots, sums, number), kept), of_look

        like = None
        if not unroll:
            # Traced once for the shapes alone.
            def rows_of(stacked, slots, given, first, j):
                nonlocal like
                seen, _ = look(own(stacked, j), slots, first)
                like = jax.tree.map(jax.typeof, pulled(stacked, none(slots), seen, given, first + j, j, j)[1])

            jax.eval_shape(rows_of, stacked, slots, given, first, jnp.int32(0))
        (slots, kept), of_looks = turns(block, (slots, table(like, n, unroll)), blocks, n=n // k, unroll=unroll)
        return slots, (stacked, slots, given, first, kept, of_looks)

    def back(saved, g_slots):
        stacked, last, given, first, kept, of_looks = saved

        def block(c, b):
            g_slots, d_stacked = c
            number = start(first) + b * k
            taken = tuple(slot(g, mixer.places(cfg, number)[-1]) for g in g_slots)
            # Of this, layers need what they do not keep: without rematerialisation nothing.
            seen, _ = look(own(stacked, b * k), last, number)

            def one(c, j):
                g_carry, g_seen, d_stacked = c
                row = b * k + j
                at_hand = pick(stacked, row), share(seen, j), given
                d_params, g_carry, d_told = pulls.joined(row if unroll else None, pick(kept, row), at_hand)(g_carry)
                to_seen = lambda g, *d: put_in(put_in(g, d[0], j, 0), d[1], j, 1)
                g_seen = tuple(jax.tree.map(to_seen, g, *d) for g, d in zip(g_seen, d_told, strict=True))
                return (g_carry, g_seen, put(d_stacked, row, d_params)), None

            begin = taken, nothing(seen), d_stacked
            (_, g_seen, d_stacked), _ = turns(one, begin, over(k), n=k, unroll=unroll, reverse=True)
            d_own, g_slots = look_back(own(stacked, b * k), last, number, pick(of_looks, b), g_seen, g_slots)
            return (g_slots, d_stacked), d_own

        begin = g_slots, table(jax.tree.map(lambda x: jax.typeof(x[0]), stacked), n, unroll)
        (g_slots, d_stacked), d_own = turns(block, begin, blocks, n=n // k, unroll=unroll, reverse=True)
        # What stood where the blocks wrote has no gradient. Theirs stay there until now: no earlier block sees these slots.
        where = mixer.places(cfg, start(first))[-1]
        unwritten = lambda g: jax.lax.dynamic_update_slice_in_dim(g, nothing(g[: n // k]), where, 0)
        g_slots = tuple(map(unwritten, g_slots))
        if unroll:
            d_stacked, d_own = (jax.tree.map(lambda *xs: jnp.stack(xs), *rows) for rows in (d_stacked, d_own))
        d_own = jax.tree.map(lambda x: x.reshape(n, *x.shape[2:]), d_own)
        return {**d_stacked, "residual": jax.tree.map(jnp.add, d_stacked["residual"], d_own)}, g_slots, None, None

    run.defvjp(keep, back)
    return run(stacked, slots, given, jnp.asarray(first))
