"""What a model asks of tokens, kernels and vocabulary (`jaxpar.models.shards.Whole`), answered by hand over a mesh axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxpar.parallel.tensor import gathered, ring, vocabulary

Tree = Any


@dataclass(frozen=True)
class ByHand:
    """A device's share, inside a `shard_map` that is manual over the axis. Methods as those of `Whole`.

    Each kernel's heads, hidden units or ids lie over the axis, and so do the stream's tokens: S = T / shards.

    Attributes:
      shards: devices along the axis. One has all tokens and kernels, but for their width (`over`).
      axis: its name.
      rings: layers multiply in ring steps (`ring`); else they gather and scatter (`gathered`). The embedding and the
        loss's chunks gather and scatter in either: they stand alone, with no product beside them to hide behind, and a
        pipeline runs them under a condition, which must not hold a permute.
      parts: see `Whole`.
      over: further axes that the width D of kernels lies on (FSDP); products gather it.
    """

    shards: int
    axis: str = "tensor"
    rings: bool = False
    parts: int = 1
    over: tuple[str, ...] = ()

    def own(self, tree: Tree) -> Tree:
        return jax.tree.map(lambda x: gathered.own(x, self.axis), tree)

    def gather(self, tree: Tree) -> Tree:
        return jax.tree.map(lambda x: gathered.gather(x, self.axis), tree)

    def scatter(self, x):
        return gathered.scatter(x, self.axis)

    def columns(self, matmul: Callable, x_BxSxD, kernels: Sequence) -> list:
        if self.rings:
            return ring.columns(self.axis, x_BxSxD, kernels, self.over)
        return gathered.columns(self.axis, matmul, x_BxSxD, kernels, self.over)

    def row(self, matmul: Callable, h, kernel, contract: int):
        if self.rings:
            return ring.row(self.axis, h, kernel, contract, self.over)
        return gathered.row(self.axis, matmul, h, kernel, contract, self.over)

    def lookup(self, table_VxD, tokens_BxT):
        return vocabulary.lookup(table_VxD, tokens_BxT, self.axis)

    def first_id(self, rows: int):
        return vocabulary.first_id(rows, self.axis)

    def total(self, x):
        return x if self.shards == 1 else jax.lax.psum(x, self.axis)

    def largest(self, x):
        return x if self.shards == 1 else jax.lax.pmax(x, self.axis)
