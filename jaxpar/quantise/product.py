"""The product that blocks call, as a value that programs can be compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.context import matmul
from jaxpar.pallas_kernels.matmul import Operands, quant_matmul
from jaxpar.pallas_kernels.matmul.mixed import Mixed, mixed_matmul


@dataclass(frozen=True)
class QuantisedProduct:
    """`Ops.matmul` with operands in number formats.

    Attributes:
      operands: which operand is in which.
      implementation: see `quant_matmul`.
    """

    operands: Operands
    implementation: str | None = None

    def __call__(self, x, w, contract: int = 1):
        return quant_matmul(x, w, self.operands, contract=contract, implementation=self.implementation)


@dataclass(frozen=True)
class MixedProduct:
    """`Ops.matmul` where kernels may be `Mixed`."""

    def __call__(self, x, w, contract: int = 1):
        return mixed_matmul(x, w, contract=contract) if isinstance(w, Mixed) else matmul(x, w, contract)
