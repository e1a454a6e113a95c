"""What of a branch's tokens and kernels, and of the vocabulary, is at hand: everything (`Whole`), or a device's share.

Between branches lies the *stream* of tokens: the residual state, norms, dropout. Here it has all of a row's T tokens. Where
products are spread by hand, a device holds S = T / shards of them between branches, and all T inside: an object with the
same methods stands in for `Whole` then (`jaxpar.parallel.tensor.by_hand`), and the model does not know.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Tree = Any


@dataclass(frozen=True)
class Whole:
    """Everything is here: one device, or a partitioner that spreads the program by itself.

    Attributes:
      shards: over how many devices the stream's tokens lie.
      parts: into how many groups of rows a batch is cut, which go through the layers side by side and do not meet.
    """

    shards: int = 1
    parts: int = 1

    def own(self, tree: Tree) -> Tree:
        """The stream's tokens of arrays [B, T, ...]: [B, S, ...]."""
        return tree

    def gather(self, tree: Tree) -> Tree:
        """Arrays [B, n, ...] of each device's tokens as one: [B, shards · n, ...]. The inverse of `own`."""
        return tree

    def scatter(self, x):
        """[B, shards · n, ...], summed over the devices, each keeping its own tokens: [B, n, ...]."""
        return x

    def columns(self, matmul: Callable, x_BxSxD, kernels: Sequence) -> list:
        """Products of the stream with kernels whose outputs may be spread: each [B, T, ...]."""
        return [matmul(x_BxSxD, kernel) for kernel in kernels]

    def row(self, matmul: Callable, h, kernel, contract: int):
        """The product with a kernel whose inputs may be spread, back on the stream: [B, S, D]."""
        return matmul(h, kernel, contract)

    def lookup(self, table_VxD, tokens_BxT):
        """Rows of a table whose first dimension may be spread, on the stream: [B, S, D]."""
        return table_VxD[tokens_BxT]

    def first_id(self, rows: int):
        """The token that the first of the vocabulary's rows at hand stands for."""
        return 0

    def total(self, x):
        """A sum over the vocabulary, or the stream's tokens, at hand -> over all of it."""
        return x

    def largest(self, x):
        """A maximum, likewise."""
        return x


def cut(tree: Tree, parts: int) -> list[Tree]:
    """Arrays [B, ...] as `parts` groups of rows: every second row for two.

    Neighbouring rows go to different groups, so that each device's rows are cut where a batch lies over devices.
    """
    import jax

    part = lambda i: jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:])[:, i], tree)
    return [part(i) for i in range(parts)]


def join(arrays: Sequence):
    """The inverse of `cut`, of one array."""
    import jax.numpy as jnp

    x = jnp.stack(arrays, axis=1)
    return x.reshape(-1, *x.shape[2:])
