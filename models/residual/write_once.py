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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.models.residual import blockwise
from jaxpar.models.residual.base import Stack, StackMixer
from jaxpar.models.residual.turns import Pulls, rows, take, turns

Tree = Any


def loop(
    cfg, layer: Callable, stacked: Tree, state: tuple[Stack, ...], given: Tree, numbers, divisor: int
) -> tuple[Stack, ...]:
    """Run n layers.

    Args:
      layer: (given, params, state, number) -> the states behind a layer, not committed. Closes over no array.
      stacked: parameters, leaves [n, ...].
      state: a `Stack` for each of the parts that rows go in.
      given: arrays that every layer sees; not differentiated.
      numbers: the layers' numbers [n]; in NumPy where known.
      divisor: of the first layer's number; that number itself, where it is known.
    """
    mixer: StackMixer = cfg.residual
    n, unroll = len(numbers), cfg.layer_loop == "unroll"
    if together := mixer.together(cfg, divisor):
        return blockwise.loop(cfg, layer, stacked, state, given, numbers[0], together)
    # Known numbers stay known where each layer has a program of its own.
    known = [int(i) for i in numbers] if unroll and isinstance(numbers, np.ndarray) else None
    over, indices = partial(turns, n=n, unroll=unroll), range(n) if unroll else np.arange(n)
    pulls = Pulls()

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

        return over(body, (slots, carry), rows(stacked, n, unroll), known or numbers)[0]

    def keep(stacked, slots, carry, given, numbers):
        def body(c, params, row, number):
            slots, carry = c
            f = lambda params, slots, carry: forward(params, slots, carry, given, number)
            (fresh, carry), pull = jax.vjp(f, params, slots, carry)
            kept = pulls.cut(row if unroll else None, pull, (params, slots, given))
            return (commit(slots, fresh, number), carry), kept

        out, kept = over(body, (slots, carry), rows(stacked, n, unroll), indices, known or numbers)
        return out, (stacked, out[0], given, numbers, kept)

    def back(saved, gradient):
        stacked, last, given, numbers, kept = saved

        def body(c, params, kept, row, number):
            g_slots, g_carry = c
            taken = [take(g, mixer.places(cfg, number)) for g in g_slots]
            pull = pulls.joined(row if unroll else None, kept, (params, last, given))
            d_params, d_slots, g_carry = pull((tuple(fresh for fresh, _ in taken), g_carry))
            return (tuple(left + d for (_, left), d in zip(taken, d_slots, strict=True)), g_carry), d_params

        xs = rows(stacked, n, unroll), kept, indices, known or numbers
        c, d_params = over(body, gradient, *xs, reverse=True)
        d_stacked = jax.tree.map(lambda *layers: jnp.stack(layers), *d_params) if unroll else d_params
        return d_stacked, *c, None, None

    run.defvjp(keep, back)
    slots, carry = run(
        stacked, tuple(s.slots for s in state), tuple(s.carry for s in state), given, jnp.asarray(numbers)
    )
    return tuple(map(Stack, slots, carry))
