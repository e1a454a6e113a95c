"""What a run says about a mesh's tensor axis. Free of JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TENSOR = "tensor"
BY_HAND = ("gathered", "ring", "weave")


@dataclass(frozen=True)
class TensorConfig:
    """How products are computed on a mesh with a `tensor` axis.

    Attributes:
      products: whole keeps all tokens on each device and sums a branch's output over the axis (all-reduce); sharded spreads
        tokens over it between branches, norms and all, as the partitioner sees fit; gathered does that by hand
        (all-gather, products, reduce-scatter); ring multiplies while it gathers and scatters (collective matmul); weave is
        gathered for two halves of the rows side by side, so that one computes while the other sends (TokenWeave).
    """

    products: Literal["whole", "sharded", "gathered", "ring", "weave"] = "whole"

    def by_hand(self, sizes: Mapping[str, int]) -> bool:
        """Whether the tensor axis of a mesh of these sizes is out of the partitioner's hands."""
        return self.products in BY_HAND and sizes[TENSOR] > 1

    def permutes(self, sizes: Mapping[str, int]) -> bool:
        """Whether a layer holds permutes, which no branch may hold that devices take differently."""
        return self.products == "ring" and sizes[TENSOR] > 1

    def parts(self, sizes: Mapping[str, int]) -> int:
        """Into how many groups rows are cut that go through the layers side by side."""
        return 2 if self.products == "weave" and sizes[TENSOR] > 1 else 1

    def check(
        self, sizes: Mapping[str, int], *, rows: int | None = None, over: int = 1, length: int | None = None
    ) -> None:
        """Raise where the tokens do not divide.

        Args:
          sizes: `{axis: size}` of the mesh.
          rows: rows that a device has at a time (of a microbatch, in a pipeline).
          over: how many devices have rows of their own.
          length: tokens of a row.

        Raises:
          ValueError: in one sentence with the nearest numbers that work.
        """
        devices = sizes[TENSOR]
        if self.products == "whole" or devices == 1:
            return
        spread = sizes["sequence"] * devices
        if length is not None and length % spread:
            near = max(1, (2 * length + spread) // (2 * spread)) * spread
            over = f"tensor({devices})" if spread == devices else f"sequence({sizes['sequence']}) × tensor({devices})"
            raise ValueError(
                f"tensor.products = {self.products!r} spreads the tokens of a row over {over}: {length} / {spread} is no "
                f"whole number; nearest length that works: {near}"
            )
        parts = self.parts(sizes)
        if rows is not None and rows % parts:
            each = f" on each of {over} devices, {(rows + 1) * over} together" if over > 1 else ""
            raise ValueError(
                f"tensor.products = 'weave' cuts the {rows} row{'s' if rows > 1 else ''} that a device has at a time in two "
                f"halves; nearest that works: {rows + 1} rows{each}"
            )
