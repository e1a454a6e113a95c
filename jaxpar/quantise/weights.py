"""A model whose weights are quantised once, after it was loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxpar.errors import UserError
from jaxpar.models.config import ModelConfig
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.pallas_kernels import formats

if TYPE_CHECKING:
    from jaxpar.models.context import Ops

Tree = Any
CONTRACT = {("attention", "out"): 2}
"""Kernels whose product sums over several dimensions, and how many; the others over one."""


@dataclass(frozen=True)
class QuantisedWeights:
    """The kernels of layers in a number format, and what they are multiplied with. Embeddings, norms, attention and the output
    projection stay as they are.

    Attributes:
      weights: the kernels' format. None: as they are.
      activations: the format that activations are rounded to, token by token, before each product. None: the compute dtype.
      cache: the format that keys and values are kept in. None: the compute dtype.
    """

    weights: str | None = None
    activations: str | None = None
    cache: str | None = None

    def __post_init__(self):
        for name in filter(None, (self.weights, self.activations, self.cache)):
            formats.get(name)
        if self.weights is None and self.activations is not None:
            raise ValueError(
                f"activations in {self.activations} are multiplied with weights in a number format; give one"
            )

    def check(self, cfg: ModelConfig) -> None:
        """Raises UserError where blocks do not divide what products sum over, or the layers are not known here."""
        if not isinstance(cfg.feedforward, GatedMLP | MLP):
            raise UserError(
                f"quantise knows the kernels of GatedMLP and MLP, and this model's feed-forward is a "
                f"{type(cfg.feedforward).__name__}"
            )
        sums = {"width": cfg.width, "heads × head_size": cfg.heads * cfg.head_size, "hidden": cfg.hidden}
        for name in filter(None, (self.weights, self.activations)):
            for what, size in sums.items():
                if reason := formats.get(name).misfit(size):
                    raise UserError(
                        f"quantise: products of this model sum over {what} = {size}: {reason}; smaller groups are written "
                        "as in w4g32a16"
                    )

    def apply(self, cfg: ModelConfig, params: Tree) -> Tree:
        """The parameters with kernels as `Quantised` [L, K, ...], K being all that a product sums over; on GPUs they lie in
        memory as products of two operands in 8 bits take them (`formats.laid_along`).

        Raises:
          UserError: see `check`; ValueError: NaN or infinity in a kernel.
        """
        self.check(cfg)
        if self.weights is None:
            return params
        layers = dict(params["layers"])
        for branch in ("attention", "feedforward"):
            layers[branch] = {
                name: self._kernel(branch, name, entry) if "kernel" in entry else entry
                for name, entry in layers[branch].items()
            }
        return {**params, "layers": layers}

    def _kernel(self, branch: str, name: str, entry: Tree) -> Tree:
        from jaxpar.pallas_kernels import versions

        contract = CONTRACT.get((branch, name), 1)
        kernel = entry["kernel"]
        flat = kernel.reshape(kernel.shape[0], -1, *kernel.shape[1 + contract :])
        try:
            found = formats.quantise(flat, self.weights, axis=1, stacked=1)
        except ValueError as error:
            raise ValueError(f"layers/{branch}/{name}/kernel: {error}") from None
        laid = self.eight and "cuda" in versions.platforms()
        return {**entry, "kernel": formats.laid_along(found, stacked=1) if laid else found}

    @property
    def eight(self) -> bool:
        """Whether codes of 8 bits are multiplied with each other: scales, of rows or tensors, are behind the sum."""
        if self.activations is None:
            return False
        both = [formats.get(name) for name in (self.weights, self.activations)]
        return all(fmt.stored_bits == 8 and not isinstance(fmt.block, int) for fmt in both)

    def ops(self, ops: Ops) -> Ops:
        """With products that round activations, and the cache's format."""
        from jaxpar.pallas_kernels.matmul import Operands
        from jaxpar.quantise.product import QuantisedProduct

        ops = replace(ops, cache=self.cache)
        if self.activations is None:
            return ops
        return replace(ops, matmul=QuantisedProduct(Operands(inputs=formats.get(self.activations))))
