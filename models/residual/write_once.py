"""The loop over layers for mixers that keep sources, with backward memory that grows linearly with depth.

A buffer of n slots that is carried through a loop is kept by JAX at every turn, in n versions: memory of the order of
the depth squared. But a slot is written before anybody reads it and never after, so every version that a layer saw
can be had from the last one, by looking at the layer's own slots alone. Here the forward loop keeps the last buffer, and
of each layer what its backward pass needs *besides* buffer and parameters (`jax.vjp` of the layer, without the leaves
that are those: that is what the model's `remat` decides, as in any loop); the backward loop puts the last buffer in
their place, and adds the layers' gradients of the buffer up in one buffer.

No paper's: measured against the naive carry in `tests/models/residual/test_write_once.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.models.residual.base import Stack, StackMixer

Tree = Any


def loop(cfg, layer: Callable, stacked: Tree, state: tuple[Stack, ...], given: Tree, numbers) -> tuple[Stack, ...]:
    """Run n layers.

    Args:
      layer: (given, params, state, number) -> the states behind a layer, not committed. Closes over no array.
      stacked: parameters, leaves [n, ...].
      state: a `Stack` for each of the parts that rows go in.
      given: arrays that every layer sees; not differentiated.
      numbers: the layers' numbers [n]; in NumPy where known.
    """
    mixer: StackMixer = cfg.residual
    n, unroll = len(numbers), cfg.layer_loop == "unroll"
    # Known numbers stay known where each layer has a program of its own.
    known = [int(i) for i in numbers] if unroll and isinstance(numbers, np.ndarray) else None
    at = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    # In a loop, arrays [n, ...]; unrolled, lists: what a layer keeps may have other shapes there than what the next does.
    rows = (lambda tree: [at(tree, i) for i in range(n)]) if unroll else (lambda tree: tree)
    indices = range(n) if unroll else np.arange(n)
    pulls: list = []

    def turns(body, carry, *xs, reverse=False):
        """`jax.lax.scan`, or the same unrolled over lists."""
        if not unroll:
            return jax.lax.scan(lambda c, x: body(c, *x), carry, xs, reverse=reverse)
        outs = [None] * n
        for i in reversed(range(n)) if reverse else range(n):
            carry, outs[i] = body(carry, *(x[i] for x in xs))
        return carry, outs

    def forward(params, slots, carry, given, number):
        """Fresh sources and carry of a layer, for each part."""
        after = layer(given, params, tuple(map(Stack, slots, carry)), number)
        return tuple(s.fresh for s in after), tuple(s.carry for s in after)

    def commit(slots, fresh, number):
        return tuple(mixer.commit(cfg, Stack(s, None, f), number).slots for s, f in zip(slots, fresh, strict=True))

    @jax.custom_vjp
    def run(stacked, slots, carry, given, numbers):
        def body(c, params, number):
            slots, carry = c
            fresh, carry = forward(params, slots, carry, given, number)
            return (commit(slots, fresh, number), carry), None

        return turns(body, (slots, carry), rows(stacked), known or numbers)[0]

    def keep(stacked, slots, carry, given, numbers):
        def body(c, params, number):
            slots, carry = c
            f = lambda params, slots, carry: forward(params, slots, carry, given, number)
            (fresh, carry), pull = jax.vjp(f, params, slots, carry)
            leaves, tree = jax.tree.flatten(pull)
            at_hand = jax.tree.leaves((params, slots, given))
            places = [next((i for i, x in enumerate(at_hand) if x is leaf), None) for leaf in leaves]
            pulls.append((tree, places))
            kept = [leaf for leaf, place in zip(leaves, places, strict=True) if place is None]
            return (commit(slots, fresh, number), carry), kept

        pulls.clear()
        out, kept = turns(body, (slots, carry), rows(stacked), known or numbers)
        return out, (stacked, out[0], given, numbers, kept)

    def back(saved, gradient):
        stacked, last, given, numbers, kept = saved

        def body(c, params, kept, row, number):
            g_slots, g_carry = c
            taken = [take(g, mixer.places(cfg, number)) for g in g_slots]
            tree, places = pulls[row if unroll else -1]
            at_hand, rest = jax.tree.leaves((params, last, given)), iter(kept)
            pull = jax.tree.unflatten(tree, [next(rest) if p is None else at_hand[p] for p in places])
            d_params, d_slots, g_carry = pull((tuple(fresh for fresh, _ in taken), g_carry))
            return (tuple(left + d for (_, left), d in zip(taken, d_slots, strict=True)), g_carry), d_params

        c, d_params = turns(body, gradient, rows(stacked), kept, indices, known or numbers, reverse=True)
        d_stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *d_params) if unroll else d_params
        return d_stacked, *c, None, None

    run.defvjp(keep, back)
    slots, carry = run(
        stacked, tuple(s.slots for s in state), tuple(s.carry for s in state), given, jnp.asarray(numbers)
    )
    return tuple(map(Stack, slots, carry))


def take(g_slots, places: tuple) -> tuple[tuple, Any]:
    """The gradients of what a layer wrote into these slots, and what is left: of what stood there before, nothing."""
    taken = []
    for place in reversed(places):
        taken.insert(0, jax.lax.dynamic_index_in_dim(g_slots, place, 0, keepdims=False))
        g_slots = jax.lax.dynamic_update_index_in_dim(g_slots, jnp.zeros_like(taken[0]), place, 0)
    return tuple(taken), g_slots
