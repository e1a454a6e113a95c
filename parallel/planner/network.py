"""A network of machines: who is there, how fast each computes, and how long a message takes between any two.

Files that hold one are read and written by `files.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Matrix = tuple[tuple[float, ...], ...]
"""[from][to]; the diagonal is not used."""


@dataclass(frozen=True)
class Node:
    """A machine.

    Attributes:
      name: unique in its network.
      region: where it stands; for people, and for pictures.
      speed: work a second, relative to the machine that `Workload.forward` is given for.
      memory: microbatches whose activations it can hold, from their forward to their backward pass.
    """

    name: str
    region: str = ""
    speed: float = 1.0
    memory: int = 3

    def __post_init__(self):
        if not self.name:
            raise ValueError("a node has no name; give each one")
        if not (0 < self.speed < math.inf):
            raise ValueError(f"node {self.name!r} has speed {self.speed}; a speed is a number above 0")
        if isinstance(self.memory, bool) or not isinstance(self.memory, int) or self.memory < 1:
            raise ValueError(
                f"node {self.name!r} has memory for {self.memory!r} microbatches; give a whole number of at least 1"
            )


@dataclass(frozen=True)
class Network:
    """Machines and their links.

    Attributes:
      name: how messages and pictures call it.
      nodes: the machines, N of them.
      latency: [N][N] seconds that any message takes from one machine to another.
      bandwidth: [N][N] bytes a second.
    """

    name: str
    nodes: tuple[Node, ...]
    latency: Matrix
    bandwidth: Matrix

    def __post_init__(self):
        if len(self.nodes) < 2:
            raise ValueError(f"{self.name} has {len(self.nodes)} node(s); a network has at least 2")
        names = [node.name for node in self.nodes]
        if len(set(names)) < len(names):
            twice = next(n for k, n in enumerate(names) if n in names[:k])
            raise ValueError(f"{self.name} has two nodes named {twice!r}; give each node its own name")
        for what, matrix in (("latency", self.latency), ("bandwidth", self.bandwidth)):
            shape = [len(row) for row in matrix]
            if shape != [len(names)] * len(names):
                raise ValueError(
                    f"{self.name} has {len(names)} nodes, and {what} has rows of {sorted(set(shape))} numbers in "
                    f"{len(shape)} rows; give {len(names)} rows of {len(names)}"
                )
        for i, a in enumerate(names):
            for j, b in enumerate(names):
                if i != j:
                    check_link(f"the link from {a!r} to {b!r}", self.latency[i][j], self.bandwidth[i][j])

    @property
    def size(self) -> int:
        return len(self.nodes)

    @property
    def symmetric(self) -> bool:
        n = range(self.size)
        return all(m[i][j] == m[j][i] for m in (self.latency, self.bandwidth) for i in n for j in n if i < j)

    def seconds(self, size: float) -> list[list[float]]:
        """[from][to] seconds of a message of `size` bytes; 0 from a node to itself."""
        n = range(self.size)
        return [[0.0 if i == j else self.latency[i][j] + size / self.bandwidth[i][j] for j in n] for i in n]

    def subset(self, keep: Sequence[int], name: str | None = None) -> Network:
        """The network of some of the nodes, in the order of `keep`."""
        return Network(
            name or self.name,
            tuple(self.nodes[i] for i in keep),
            tuple(tuple(self.latency[i][j] for j in keep) for i in keep),
            tuple(tuple(self.bandwidth[i][j] for j in keep) for i in keep),
        )


def check_link(what: str, latency: float, bandwidth: float) -> None:
    """Raises ValueError for a latency (seconds) or bandwidth (bytes a second) that no link has."""
    if not (0 <= latency < math.inf):  # also where it is not a number
        raise ValueError(f"{what} has a latency of {latency * 1e3:g} ms; give a number of at least 0")
    if not (0 < bandwidth <= math.inf):
        raise ValueError(f"{what} has a bandwidth of {bandwidth * 8e-6:g} Mbit/s; give a number above 0")
