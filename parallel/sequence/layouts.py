"""Which tokens each device of a sequence axis holds, and which blocks of the mask are empty. Free of JAX.

Stored arrays have their tokens in the order of the devices: device n holds the stored places n·T/N ... (n+1)·T/N - 1.

    contiguous  device n holds tokens n·T/N ... : causal work grows with n, the last device does all of its blocks
    striped     token i lies on device i mod N: every block is half masked (Brandon et al. 2023, "Striped Attention")
    zigzag      of 2N pieces, device n holds pieces n and 2N-1-n: every device computes the same number of blocks
                (zhuzilin/ring-flash-attention; Llama 3, §3.3.2)

Permute once, where batches are made (`Layout.arrange`): tokens, targets, weights, segments, and the positions that a
rotary embedding reads, which stay those in the whole sequence (`Layout.positions`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from jaxpar.parallel.mesh import did_you_mean

LAYOUTS = ("contiguous", "striped", "zigzag")


@dataclass(frozen=True)
class Layout:
    """How `length` tokens lie on `shards` devices.

    Attributes:
      kind: one of LAYOUTS.
      shards: N, devices along the sequence axis.
      length: T, tokens of a whole row.

    Raises:
      ValueError: an unknown kind, or a length that does not divide.
    """

    kind: str
    shards: int
    length: int

    def __post_init__(self):
        if self.kind not in LAYOUTS:
            raise ValueError(
                f"unknown layout {self.kind!r}{did_you_mean(self.kind, LAYOUTS)}; choose one of {', '.join(LAYOUTS)}"
            )
        if self.shards < 1:
            raise ValueError(f"a layout over {self.shards} devices cannot be made; give at least 1")
        divides(self.length, self.shards * self.parts, f"the {self.kind} layout over {self.shards} devices")

    @property
    def parts(self) -> int:
        """C, runs of tokens that a device holds: 2 for zigzag, else 1."""
        return 2 if self.kind == "zigzag" else 1

    @property
    def local(self) -> int:
        """Tokens on each device."""
        return self.length // self.shards

    @cached_property
    def positions(self) -> np.ndarray:
        """int32 [T]: the place in the whole sequence of the token at each stored place."""
        return self.arrange(np.arange(self.length, dtype=np.int32), axis=0)

    @cached_property
    def chunks(self) -> Chunks:
        """The same as arithmetic progressions."""
        n = np.arange(self.shards)[:, None]
        match self.kind:
            case "contiguous":
                return Chunks(n * self.local, 1, self.local)
            case "striped":
                return Chunks(n, self.shards, self.local)
            case _:
                half = self.local // 2
                return Chunks(np.concatenate([n * half, (2 * self.shards - 1 - n) * half], axis=1), 1, half)

    def runs(self, tokens: int) -> tuple[int, np.ndarray]:
        """Stored tokens as runs of consecutive ones, the longest of one length that lie within each `tokens` of them.

        Returns:
          L, the tokens of a run; and int [T / L], which stored run is the first of the row, the second, ...
        """
        breaks = 1 + np.flatnonzero(np.diff(self.positions) != 1)
        length = int(np.gcd.reduce(np.append(breaks, tokens)))
        return length, np.argsort(self.positions[::length])

    def arrange(self, x: Any, axis: int = 1) -> Any:
        """Tokens in their own order -> stored order, along dimension `axis` of a NumPy or JAX array."""
        before, after = self._around(x, axis)
        n, m = self.shards, self.local
        match self.kind:
            case "contiguous":
                return x
            case "striped":
                return x.reshape(*before, m, n, *after).swapaxes(len(before), len(before) + 1).reshape(x.shape)
            case _:
                pieces = x.reshape(*before, 2, n, m // 2, *after)
                return self._turned(pieces, len(before)).swapaxes(len(before), len(before) + 1).reshape(x.shape)

    def restore(self, x: Any, axis: int = 1) -> Any:
        """Stored order -> the tokens' own order; the inverse of `arrange`."""
        before, after = self._around(x, axis)
        n, m = self.shards, self.local
        match self.kind:
            case "contiguous":
                return x
            case "striped":
                return x.reshape(*before, n, m, *after).swapaxes(len(before), len(before) + 1).reshape(x.shape)
            case _:
                pieces = x.reshape(*before, n, 2, m // 2, *after).swapaxes(len(before), len(before) + 1)
                return self._turned(pieces, len(before)).reshape(x.shape)

    def _around(self, x, axis: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        axis %= x.ndim
        if x.shape[axis] != self.length:
            raise ValueError(
                f"dimension {axis} of an array {tuple(x.shape)} has {x.shape[axis]} tokens, and the {self.kind} "
                f"layout is for {self.length}"
            )
        return tuple(x.shape[:axis]), tuple(x.shape[axis + 1 :])

    @staticmethod
    def _turned(pieces, axis: int):
        """[..., 2, N, h, ...] with the second half of the pieces in reverse: piece 2N-1-n next to piece n."""
        first, second = (pieces[(slice(None),) * axis + (i,)] for i in (0, 1))
        second = second[(slice(None),) * axis + (slice(None, None, -1),)]
        both = [x.reshape(*x.shape[:axis], 1, *x.shape[axis:]) for x in (first, second)]
        if isinstance(pieces, np.ndarray):
            return np.concatenate(both, axis=axis)
        import jax.numpy as jnp

        return jnp.concatenate(both, axis=axis)


@dataclass(frozen=True, eq=False)
class Chunks:
    """The tokens of each device as C progressions: start, start + stride, ..., `count` of them.

    Attributes:
      starts: int [N, C].
      stride, count: the same for all.
    """

    starts: np.ndarray
    stride: int
    count: int

    def halved(self) -> Chunks:
        """Each progression as two, one after the other: [N, 2C]. Raises ValueError for an odd count."""
        shards, parts = self.starts.shape
        divides(shards * parts * self.count, 2 * shards * parts, f"a ring in both directions over {shards} devices")
        half = self.count // 2
        starts = np.stack([self.starts, self.starts + half * self.stride], axis=-1).reshape(shards, 2 * parts)
        return replace(self, starts=starts, count=half)


def needed(q: Chunks, k: Chunks, *, causal: bool, window: Any = None) -> Any:
    """Which blocks of the mask have a visible pair at all; exact.

    Args:
      q, k: of queries and keys, with the same stride.
      causal, window: as in `MaskSpec`; a window may be traced.

    Returns:
      bool [N of queries, N of keys, C of queries, C of keys]; NumPy unless the window is traced.
    """
    # Query index - key index takes the values `base + stride·m` for these m.
    base = q.starts[:, None, :, None] - k.starts[None, :, None, :]
    least, most = -(k.count - 1), q.count - 1
    if not causal:
        nearest = base + q.stride * least
        seen = np.ones(base.shape, bool)
    else:
        m = np.maximum(-(base // q.stride), least)  # the first m with base + stride·m >= 0
        nearest = base + q.stride * m
        seen = m <= most
    return seen if window is None else seen & (nearest < window)


def divides(length: int, unit: int, what: str) -> None:
    """Raises ValueError with the nearest length that works, unless `length` is a multiple of `unit`."""
    if length >= unit and length % unit == 0:
        return
    nearest = max(1, (2 * length + unit) // (2 * unit)) * unit
    raise ValueError(
        f"a sequence of {length} tokens does not fit {what}: it must be a multiple of {unit}; nearest that works: "
        f"{nearest}"
    )
