"""A vocabulary that lies over devices: rows of the embedding table, and what a softmax over all ids needs.

Shoeybi et al. 2019, "Megatron-LM", §3: a device looks up the ids that it has, and zeros stand for the others until the sum
over the devices; of a softmax, maximum and sum travel instead of logits. Here the lookup's sum is a reduce-scatter over the
tokens (Korthikanti et al. 2022).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxpar.parallel.tensor.gathered import alone, scatter


def first_id(rows: int, axis: str):
    """The id that the first of this device's rows stands for, where each has as many."""
    return 0 if alone(axis) else rows * jax.lax.axis_index(axis)


def lookup(table_VxD, tokens_BxT, axis: str):
    """Rows of a table [t·V, D] of which each of t devices has V, for this device's T / t of the tokens: [B, T/t, D].

    Args:
      tokens_BxT: the ids of all tokens, the same on every device.
    """
    if alone(axis):
        return table_VxD[tokens_BxT]
    V = table_VxD.shape[0]
    ids = tokens_BxT - first_id(V, axis)
    here = (ids >= 0) & (ids < V)
    rows = jnp.where(here[..., None], table_VxD[jnp.where(here, ids, 0)], 0)
    return scatter(rows, axis)
