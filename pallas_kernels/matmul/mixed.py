"""W4Ax: 4-bit weights times activations of which some blocks of channels are in 8 bits and the others in 4.

COMET (arXiv 2410.12168): outliers of activations sit in few channels. The blocks that hold them are multiplied in 8 bits and
all others in 4. One product walks both kinds: a block's integers are summed exactly, and scales are multiplied behind the
sum. Which blocks are which is data, so that layers of a stack may differ.

Where a chip has no 4-bit products (Hopper), 4-bit blocks are multiplied as int8: bytes are saved, and no operations. XLA's
product does so everywhere; `mixed_tpu` is a kernel that multiplies them as int4.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from jaxpar.pallas_kernels.dispatch import Implementation, Op
from jaxpar.pallas_kernels.formats.format import get
from jaxpar.pallas_kernels.formats.quantised import Quantised, quantise
from jaxpar.pallas_kernels.matmul import mixed_tpu
from jaxpar.pallas_kernels.matmul.products import grouped, integers


def _xla(x_MxK, scales_x, w: Quantised, eight):
    return grouped(x_MxK, scales_x, integers(w), w.scales, (-1, -2), eight.shape[0])


XLA = Implementation("xla", _xla)
MOSAIC_TPU = Implementation(
    "mosaic_tpu",
    mixed_tpu.mixed_mosaic_tpu,
    mixed_tpu.misfit,
    unwise=lambda *arrays: "has not been measured on a chip, so that only its name chooses it",
    platform="tpu",
    kernel=True,
)
MIXED = Op("a mixed product", (MOSAIC_TPU, XLA))
"""Of x in whole numbers, its scales, w and which blocks are in 8 bits, see `mixed_tpu`."""


@struct.dataclass
class Mixed:
    """Weights [K, b...] in 4 bits, and which blocks of their inputs are in 8. A stack of layers has a dimension in front.

    Attributes:
      weights: integers, quantised along K in groups, as many as there are blocks.
      eight: bool [blocks].
    """

    weights: Quantised
    eight: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weights.shape

    @property
    def ndim(self) -> int:
        return self.weights.ndim


def inputs(x_MxK, eight) -> tuple[jax.Array, jax.Array]:
    """x in whole numbers, int8 [M, K], and float32 scales [M, blocks]: to ±127 in blocks that are `eight`, to ±7 in others."""
    block = x_MxK.shape[1] // eight.shape[0]
    wide, narrow = (quantise(x_MxK, get(f"int{bits}_g{block}"), -1) for bits in (8, 4))
    return (
        jnp.where(jnp.repeat(eight, block)[None], integers(wide), integers(narrow)),
        jnp.where(eight[None], wide.scales, narrow.scales),
    )


def mixed_matmul(x, w: Mixed, *, contract: int = 1, implementation: str | None = None, interpret=False):
    """`x [..., a...] · w [a..., b...]` with x rounded block by block, in x's dtype. For use, not for training.

    Args:
      x: float, [..., a...] whose last `contract` dimensions are w's K.
      implementation: "xla", "mosaic_tpu" (not measured on a TPU yet, and so never chosen unasked), or None: "xla".
      interpret: run the named kernel in Pallas' interpreter (True, or its parameters), on any platform and very slowly.

    Raises:
      ValueError: shapes that do not fit, an unknown implementation, or a named one that cannot do this product here.
    """
    inner, K = math.prod(x.shape[x.ndim - contract :]), w.shape[0]
    if inner != K or w.weights.axis != -w.ndim:
        raise ValueError(f"x {x.shape} and w {w.shape} do not multiply: {inner} and {K} values are summed over")
    blocks = w.eight.shape[0]
    if w.weights.scales.shape[0] != blocks:
        raise ValueError(f"w {w.shape} has {w.weights.scales.shape[0]} groups, and its inputs {blocks} blocks")
    lead, outer = x.shape[: x.ndim - contract], w.shape[1:]
    whole, scales = inputs(x.reshape(math.prod(lead), K), w.eight)
    flat = lambda part: part.reshape(part.shape[0], -1)
    q = Quantised(flat(w.weights.codes), flat(w.weights.scales), None, w.weights.format, -2)
    choice = MIXED.choose(implementation, whole, scales, q, w.eight, interpret=interpret)
    run = lambda one: partial(one.run, interpret=interpret) if one.kernel else one.run
    y_MxN = choice.call(run, whole, scales, q, w.eight)
    return y_MxN.astype(x.dtype).reshape(*lead, *outer)
