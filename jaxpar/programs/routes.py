"""Gradients where microbatches take routes of their own through the stack: one microbatch after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxpar.microbatches import dealt, summed
from jaxpar.models.route import Route
from jaxpar.step import Batch

Tree = Any


def over_routes(gradients: Callable, params: Tree, batch: Batch, key, route: Route):
    """`gradients(params, batch, key, route)`, summed over M routes, each with its part of the rows.

    Args:
      route: leaves [M, ...]; row i of the batch takes route i mod M.

    Returns:
      `LossSums` and the gradient of loss_sum. A layer that a microbatch does not visit gets exactly zero from
      it.

    Raises:
      ValueError: rows that M does not divide.
    """
    (m, *_), *_ = (x.shape for x in jax.tree.leaves(route))
    rows = batch.tokens.shape[0]
    if rows % m:
        raise ValueError(
            f"{rows} rows do not divide into {m} microbatches with a route each; choose {rows - rows % m or m} or "
            f"{rows + m - rows % m} rows"
        )
    if m == 1:
        return gradients(params, batch, key, jax.tree.map(lambda x: x[0], route))
    # Not `vmap`: it would turn the branch around a skipped layer into a choice between two computed results.
    return summed(lambda part: gradients(params, part[0], key, part[1]), (dealt(batch, m), route))
