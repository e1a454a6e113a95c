"""A batch in parts, one after the other: how rows are dealt out, and sums over the parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any


def dealt(tree: Tree, parts: int) -> Tree:
    """Arrays [B, ...] as [parts, B / parts, ...]: row i goes to part i mod `parts`, so that rows that lie on one device
    stay there."""

    def one(x):
        return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

    return jax.tree.map(one, tree)


def summed(run: Callable[[Tree], Tree], parts: Tree) -> Tree:
    """The sum of `run` over the leading dimension of `parts`, in a loop that holds one part's results at a time."""
    shapes = jax.eval_shape(run, jax.tree.map(lambda x: x[0], parts))
    zero = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, run(part)), None), zero, parts)[0]
