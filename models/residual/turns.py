"""What the loops over layers with a backward pass of their own share: turns that may be unrolled, and pullbacks without the
arrays that are at hand when they run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.models.residual.base import slot
from jaxpar.pallas_kernels.varying import varies_over_type, varying

Tree = Any


def rows(tree: Tree, n: int, unroll: bool):
    """Leaves [n, ...] as `turns` takes them. Unrolled, a list: what a layer keeps may have other shapes there than what the
    next does."""
    return [pick(tree, i) for i in range(n)] if unroll else tree


def turns(body: Callable, carry: Tree, *xs, n: int, unroll: bool, reverse: bool = False):
    """`jax.lax.scan` of `body(carry, *x)` over arrays [n, ...], or the same unrolled over lists of n."""
    if not unroll:
        return jax.lax.scan(lambda c, x: body(c, *x), carry, xs, n, reverse)
    outs = [None] * n
    for i in reversed(range(n)) if reverse else range(n):
        carry, outs[i] = body(carry, *(x[i] for x in xs))
    return carry, outs


def table(like: Tree, n: int, unroll: bool):
    """Room for n rows of arrays of these types (`jax.typeof`), to be carried through nested loops: those that `jax.lax.scan`
    makes in an inner loop are copied into those of the outer one. Unrolled, a list."""
    if unroll:
        return [None] * n
    return jax.tree.map(lambda x: varying(jnp.zeros((n, *x.shape), x.dtype), varies_over_type(x)), like)


def put(rows, i, row: Tree):
    """`table` with row i."""
    if isinstance(rows, list):
        return [*rows[:i], row, *rows[i + 1 :]]
    return jax.tree.map(lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), rows, row)


def pick(rows, i) -> Tree:
    """Row i of a `table`, or of leaves [n, ...]; i may be traced."""
    return rows[i] if isinstance(rows, list) else jax.tree.map(partial(slot, i=i), rows)


class Pulls:
    """Pullbacks of layers (`jax.vjp`), what they keep cut in two: arrays that the backward pass has at hand anyway, and the
    rest, which alone goes from pass to pass."""

    def __init__(self):
        self._known: dict = {}

    def cut(self, key, pull, at_hand: Tree) -> tuple:
        """The arrays of `pull` that are none of `at_hand`'s.

        Args:
          key: the layer's, where each has a program of its own.
        """
        leaves, tree = jax.tree.flatten(pull)
        there = jax.tree.leaves(at_hand)
        places = [next((i for i, x in enumerate(there) if x is leaf), None) for leaf in leaves]
        self._known[key] = tree, places
        return tuple(leaf for leaf, place in zip(leaves, places, strict=True) if place is None)

    def joined(self, key, kept: tuple, at_hand: Tree):
        """The pullback again."""
        tree, places = self._known[key]
        there, rest = jax.tree.leaves(at_hand), iter(kept)
        return jax.tree.unflatten(tree, [next(rest) if place is None else there[place] for place in places])


def take(g_slots, places: tuple) -> tuple[tuple, Any]:
    """The gradients of what a layer wrote into these slots, and what is left: of what stood there before, nothing."""
    taken = []
    for place in reversed(places):
        taken.insert(0, slot(g_slots, place))
        g_slots = jax.lax.dynamic_update_index_in_dim(g_slots, jnp.zeros_like(taken[0]), place, 0)
    return tuple(taken), g_slots
