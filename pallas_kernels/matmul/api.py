"""The public function: a product with operands in number formats, and its gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax

from jaxpar.pallas_kernels.dispatch import Implementation, Op, unmeasured
from jaxpar.pallas_kernels.formats.format import Format
from jaxpar.pallas_kernels.formats.quantised import Quantised, dequantise, quantise
from jaxpar.pallas_kernels.formats.rotation import rotate, signs
from jaxpar.pallas_kernels.matmul import mosaic_gpu, mosaic_gpu_codes, mosaic_tpu, scaled_dot
from jaxpar.pallas_kernels.matmul.products import product


def _xla(a, b, axes, dtype):
    return product(a, b, axes, dtype).astype(dtype)


XLA = Implementation("xla", _xla)
SCALED_DOT = Implementation(
    "scaled_dot",
    lambda a, b, axes, dtype: scaled_dot.product_scaled_dot(a, b, axes).astype(dtype),
    lambda a, b, axes, dtype: scaled_dot.misfit(*(x.format if isinstance(x, Quantised) else None for x in (a, b))),
    unwise=unmeasured,
)
MOSAIC_TPU = Implementation(
    "mosaic_tpu",
    lambda a, b, axes, dtype, **more: mosaic_tpu.product_mosaic_tpu(a, b, dtype, **more),
    mosaic_tpu.misfit,
    unwise=unmeasured,
    platform="tpu",
    kernel=True,
)
MOSAIC_GPU = Implementation(
    "mosaic_gpu",
    mosaic_gpu.product_mosaic_gpu,
    mosaic_gpu.misfit,
    unwise=mosaic_gpu.unwise,
    platform="cuda",
    kernel=True,
)
MOSAIC_GPU_FEW_ROWS = Implementation(
    "mosaic_gpu_few_rows",
    mosaic_gpu.product_few_rows,
    mosaic_gpu.misfit_few_rows,
    unwise=mosaic_gpu.unwise_few_rows,
    platform="cuda",
    kernel=True,
)
MOSAIC_GPU_CODES = Implementation(
    mosaic_gpu_codes.NAME,
    mosaic_gpu_codes.product_mosaic_gpu_codes,
    mosaic_gpu_codes.misfit,
    unwise=unmeasured,
    platform="cuda",
    kernel=True,
)
PRODUCT = Op("a quantised product", (MOSAIC_TPU, MOSAIC_GPU_CODES, MOSAIC_GPU_FEW_ROWS, MOSAIC_GPU, SCALED_DOT, XLA))
"""One product of two operands, of which one or both are `Quantised`: `explain(PRODUCT, a, b, axes=(-1, -2), dtype=...)` says
what each implementation makes of it."""
IMPLEMENTATIONS = PRODUCT.names
"""What `implementation` may name."""


@dataclass(frozen=True)
class Operands:
    """In which number format the operands of the three products of a linear layer are: None as they are.

    Each operand is quantised along what its product sums over, so with all three given there are six quantisations of four
    tensors (INT v.s. FP, arXiv 2510.25602, has the same ones):

        y  = x [tokens, K↓] · w [K↓, N]          inputs, weights
        dx = dy [tokens, N↓] · wᵀ [N↓, K]        gradients, both operands
        dw = xᵀ [K, tokens↓] · dy [tokens↓, N]   gradients, both operands

    Attributes:
      inputs: of x.
      weights: of w, where it is an array. One that is a `Quantised` has a format already.
      gradients: of both operands of both backward products.
      rotate: a power of two: x and w are multiplied by Hadamard blocks of this size with fixed signs along K first, which
        leaves the product as it is and spreads outliers. A `Quantised` w was rotated before it was quantised, see `rotated`.
    """

    inputs: Format | None = None
    weights: Format | None = None
    gradients: Format | None = None
    rotate: int | None = None

    def rotated(self, x, axis: int, inverse: bool = False):
        """x as it is multiplied: rotated along what is summed over."""
        if self.rotate is None:
            return x
        line = signs(jax.random.key(0), x.shape[axis])
        return rotate(x, self.rotate, axis, signs=line, inverse=inverse)


def quant_matmul(
    x, w, operands: Operands = Operands(), *, contract: int = 1, implementation: str | None = None, interpret=False
):
    """`x [..., a...] · w [a..., b...] -> [..., b...]` over the last `contract` dimensions of x and the first of w.

    Gradients pass through the rounding as if it were not there (straight-through); a `Quantised` w has none. What is
    differentiated twice is the straight-through rule, not the rounded products.

    Args:
      x: float, [..., a...].
      w: float [a..., b...], rounded to x's dtype first as a plain product would; or `Quantised` [K, b...] with K the product
        of the sizes a..., quantised along K.
      operands: formats. With all None and w an array this is the plain product.
      implementation: "xla"; "scaled_dot" (`jax.lax.scaled_dot`, which multiplies blocks in hardware where there is some);
        "mosaic_tpu" (kernels for TPUs: int8 with int8, and weights in 4 bits); "mosaic_gpu" (kernels for Hopper GPUs: int8
        with int8, e4m3 with e4m3, and weights in 4 or 8 bits with x in bfloat16); "mosaic_gpu_few_rows" (what the latter is for
        such weights with up to 64 rows of x); "mosaic_gpu_codes" (another one for up to 16). None: "mosaic_gpu" or
        "mosaic_gpu_few_rows" where it has been seen to be faster than XLA, else "xla", as the others have not been measured
        on their chips; `explain(PRODUCT, ...)` tells. A forward product whose operands a named one cannot multiply raises.
        Of the backward ones "mosaic_gpu" does those of two 8-bit operands; all others are XLA's.
      interpret: run the named kernel in Pallas' interpreter (True, or its parameters), on any platform and very slowly.

    Returns:
      [..., b...] in x's dtype; sums are taken in float32.

    Raises:
      ValueError: shapes that do not fit, a dimension that blocks do not divide, a format for a w that has one, an unknown
        implementation, or a named one that cannot multiply these.
    """
    inner = math.prod(x.shape[x.ndim - contract :])
    fixed = isinstance(w, Quantised)
    if fixed and operands.weights is not None:
        raise ValueError(f"the weights are in {w.format.name} already; weights = {operands.weights.name} must be None")
    if fixed and w.axis != -w.ndim:
        raise ValueError(f"weights {w.shape} are quantised along axis {w.axis}; a product sums over axis {-w.ndim}")
    first = w.shape[0] if fixed else math.prod(w.shape[:contract])
    if first != inner:
        raise ValueError(f"x {x.shape} and w {w.shape} do not multiply: {inner} and {first} values are summed over")
    lead, outer = x.shape[: x.ndim - contract], w.shape[1:] if fixed else w.shape[contract:]
    x_MxK = x.reshape(math.prod(lead), inner)
    w_KxN = _flat(w) if fixed else w.astype(x.dtype).reshape(inner, math.prod(outer))
    _check(x_MxK.shape, w_KxN, operands, implementation)
    y = _multiply((operands, implementation, interpret), x_MxK, w_KxN)
    return y.reshape(*lead, *outer)


def _flat(w: Quantised) -> Quantised:
    """[K, N]: codes and scales of w [K, b...], whose b... are one dimension each."""

    flat = lambda part: None if part is None else part.reshape(part.shape[0], -1)
    return Quantised(flat(w.codes), flat(w.scales), flat(w.tensor), w.format, -2)


def _check(shape, w, operands: Operands, implementation) -> None:
    (M, K), N = shape, w.shape[1]
    fixed = isinstance(w, Quantised)
    for name, fmt, size in (
        ("inputs", operands.inputs, K),
        ("weights", operands.weights, K),
        ("gradients, summed over outputs", operands.gradients, N),
        ("gradients, summed over tokens", None if fixed else operands.gradients, M),
    ):
        if fmt is not None and (reason := fmt.misfit(size)):
            raise ValueError(f"a product of {M} tokens with weights [{K}, {N}]: {name}: {reason}")
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"unknown implementation {implementation!r} of a quantised product; choose one of "
            f"{', '.join(repr(name) for name in IMPLEMENTATIONS)}, or None"
        )
    if implementation == "scaled_dot":
        pairs = [(operands.inputs, w.format if fixed else operands.weights)]
        pairs += [] if operands.gradients is None else [(operands.gradients,) * 2]
        for a, b in pairs:
            if reason := scaled_dot.misfit(a, b):
                raise ValueError(f'implementation="scaled_dot" {reason}; use implementation="xla"')


def _product(how, a, b, axes, dtype):
    """A backward product, [M, N] in `dtype`: by the named implementation where both operands are its own, else by XLA."""
    _, implementation, interpret = how
    one = PRODUCT.named(implementation or XLA.name)
    if not (isinstance(a, Quantised) and isinstance(b, Quantised)) or one.misfit(a, b, axes=axes, dtype=dtype):
        one = XLA
    return one.run(a, b, axes, dtype, **({"interpret": interpret} if one.kernel else {}))


def _in(how, x, fmt: Format | None, axis: int):
    """Of a product by XLA all is XLA's."""
    return x if fmt is None else quantise(x, fmt, axis, implementation=XLA.name if how[1] == XLA.name else None)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(how, x_MxK, w_KxN):
    operands, implementation, interpret = how
    x = _in(how, operands.rotated(x_MxK, -1), operands.inputs, -1)
    w = w_KxN if isinstance(w_KxN, Quantised) else _in(how, operands.rotated(w_KxN, -2), operands.weights, -2)
    axes, dtype = (-1, -2), x_MxK.dtype
    choice = PRODUCT.choose(
        implementation, x, w, interpret=implementation is not None and interpret, axes=axes, dtype=dtype
    )
    run = lambda one: partial(one.run, axes=axes, dtype=dtype, **({"interpret": interpret} if one.kernel else {}))
    return choice.call(run, x, w)


def _multiply_forward(how, x, w):
    return _multiply(how, x, w), (x, w)


def _multiply_backward(how, kept, dy_MxN):
    operands = how[0]
    x_MxK, w_KxN = kept
    fmt, dtype, fixed = operands.gradients, x_MxK.dtype, isinstance(w_KxN, Quantised)
    # Its scales lie along K, which is not summed over here.
    w = dequantise(w_KxN, dtype) if fixed else w_KxN
    dx = _product(how, _in(how, dy_MxN, fmt, -1), _in(how, w, fmt, -1), (-1, -1), dtype)
    if fixed:
        return operands.rotated(dx, -1, inverse=True), None
    return dx, _product(how, _in(how, x_MxK, fmt, -2), _in(how, dy_MxN, fmt, -2), (-2, -2), dtype)


_multiply.defvjp(_multiply_forward, _multiply_backward)
