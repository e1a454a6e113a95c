"""Training with the products of layers in a number format, forwards and backwards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxpar.models.config import ModelConfig
from jaxpar.pallas_kernels import formats
from jaxpar.pallas_kernels.formats.format import Format
from jaxpar.pallas_kernels.formats.scales import E8M0, Float32
from jaxpar.parallel.tensor.config import TENSOR, TensorConfig

if TYPE_CHECKING:
    from jaxpar.models.context import Ops


@dataclass(frozen=True)
class Quantise:
    """Train with products of layers in a number format: see `jaxpar formats`. Parameters, norms, attention, embeddings and the output
    projection stay as they are, and gradients pass through the rounding (straight-through).

    Blocks of tokens, which the gradients of weights sum over, are those that a device holds: with tokens over a sequence axis
    in zigzag or stripes they are others than on one device.

    Attributes:
      forward: the format of activations and weights, along what a product sums over.
      backward: the format of both operands of the two products of the backward pass; "same": the forward's; "none": they
        are computed in the compute dtype.
      symmetric: clip integers to ±(2^(bits-1) - 1); otherwise -2^(bits-1) is used as well where a scale was rounded down,
        which biases gradients (INT v.s. FP, arXiv 2510.25602).
      rotate: Hadamard-rotate activations and weights of forward products in blocks of this size first. None: no rotation.
    """

    forward: str = "mxfp8_e4m3"
    backward: str = "same"
    symmetric: bool = True
    rotate: int | None = None

    def __post_init__(self):
        self.formats()
        if self.rotate is not None and (self.rotate < 2 or self.rotate & (self.rotate - 1)):
            raise ValueError(f"quantise.rotate = {self.rotate}; a Hadamard block is a power of two, for instance 32")

    @classmethod
    def parse(cls, text: str) -> Quantise:
        """A format's name for all products."""
        return cls(forward=text)

    def formats(self) -> tuple[Format, Format | None]:
        """Of the forward products and of the backward ones.

        Raises:
          ValueError: an unknown format, with the nearest; one without integers that is to be clipped asymmetrically.
        """
        words = "" if self.symmetric else "-asymmetric"
        forward = formats.get(self.forward + words)
        match self.backward:
            case "same":
                return forward, forward
            case "none":
                return forward, None
        return forward, formats.get(self.backward + words)

    def ops(self, ops: Ops) -> Ops:
        """With the products of layers in these formats."""
        from jaxpar.pallas_kernels.matmul import Operands
        from jaxpar.quantise.product import QuantisedProduct

        forward, backward = self.formats()
        return replace(ops, matmul=QuantisedProduct(Operands(forward, forward, backward, self.rotate)))

    def check(
        self,
        cfg: ModelConfig,
        sizes: Mapping[str, int],
        tensor: TensorConfig = TensorConfig(),
        length: int | None = None,
    ) -> None:
        """Raise where blocks do not divide what products sum over, or a device has a part only of what shares a scale.

        Args:
          sizes: `{axis: size}` of the mesh.
          length: tokens of a row.

        Raises:
          ValueError: in one sentence with the sizes.
        """
        forward, backward = self.formats()
        cut = sizes[TENSOR] if tensor.by_hand(sizes) else 1
        if tensor.permutes(sizes):
            raise ValueError(
                "tensor.products = 'ring' multiplies in steps of its own, which know no number formats; with quantise take "
                "'gathered', 'weave' or 'whole'"
            )
        parts = [axis for axis in ("sequence", "stage") if sizes[axis] > 1] + (["tensor"] if cut > 1 else [])
        for fmt in filter(None, (forward, backward)):
            if parts and not _local(fmt):
                raise ValueError(
                    f"{fmt.name} has a scale for a whole {'row' if fmt.block == 'row' else 'tensor'}, of which a device of the "
                    f"mesh axis {parts[0]} has a part only; take blocks (mxint8, mxfp8, int8_g32), or a mesh without it"
                )
        sums = {
            "model.width": cfg.width,
            "model.heads × model.head_size": cfg.heads * cfg.head_size // cut,
            "model.hidden": cfg.hidden // cut,
        }
        outputs = sums | {"model.kv_heads × model.head_size": cfg.kv_heads * cfg.head_size // cut}
        over = f" on each of {cut} devices" if cut > 1 else ""
        for name, size in sums.items():
            self._divides(forward, size, name + (over if name != "model.width" else ""))
            if self.rotate is not None and size % self.rotate:
                raise ValueError(
                    f"quantise.rotate = {self.rotate} does not divide {name} = {size}{over}; take at most {size & -size}"
                )
        for name, size in outputs.items() if backward is not None else ():
            self._divides(backward, size, name + (over if name != "model.width" else ""))
        if backward is not None and length is not None:
            tokens = length // sizes["sequence"]
            spread = f" on each of {sizes['sequence']} devices" if sizes["sequence"] > 1 else ""
            self._divides(backward, tokens, f"data.length{spread}")

    def _divides(self, fmt: Format, size: int, name: str) -> None:
        if reason := fmt.misfit(size):
            raise ValueError(f"quantise: a product sums over {name} = {size}: {reason}")


def _local(fmt: Format) -> bool:
    """Whether blocks are all that share a scale."""
    return isinstance(fmt.block, int) and isinstance(fmt.scale, E8M0 | Float32)
