"""Arrays in a number format: quantise, dequantise, and training through the rounding."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.layout import Format as ArrayFormat
from jax.experimental.layout import Layout

from jaxpar.pallas_kernels.dispatch import Implementation, Op
from jaxpar.pallas_kernels.formats import mosaic_gpu
from jaxpar.pallas_kernels.formats.format import Format, get
from jaxpar.pallas_kernels.formats.packing import pack, unpack
from jaxpar.pallas_kernels.formats.scales import TINY


@struct.dataclass
class Quantised:
    """An array in a number format: a pytree, whose shape is read off its parts.

    Every part has the array's number of dimensions, so that it can be sliced, scanned and stacked over leading dimensions
    (a stack of layers), and sharded as the array is, along the quantised dimension in whole blocks.

    Attributes:
      codes: uint8, packed along `axis` (see `packing`): K values take K·bits/8 bytes.
      scales: along `axis` one for each block; uint8 (E8M0, E4M3) or float32. 1 in the dimensions that share a scale.
      tensor: float32, the scale of the whole tensor under scales in E4M3 (all dimensions 1 but stacked ones), or None.
      format: static.
      axis: the quantised dimension, counted from the end (negative). Static.
    """

    codes: jax.Array
    scales: jax.Array
    tensor: jax.Array | None
    format: Format = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.codes.shape)
        shape[self.axis] = shape[self.axis] * 8 // self.format.stored_bits
        return tuple(shape)

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        """Of codes and scales."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_value(self) -> float:
        return 8 * self.nbytes / int(np.prod(self.shape))


def quantise(
    x,
    fmt: str | Format,
    axis: int = -1,
    *,
    key=None,
    stacked: int = 0,
    implementation: str | None = "xla",
    interpret=False,
) -> Quantised:
    """x in a number format, in float32 arithmetic; eager, compiled and sharded results are the same bits.

    Float32's subnormals count as zero. A block with NaN or infinity in it becomes NaN as a whole when this is traced, where
    nothing can be raised; the other blocks are as they would be without it.

    Args:
      x: bfloat16, float16 or float32, of any shape with at least one dimension.
      fmt: a format or its name, see `get`.
      axis: the dimension that blocks and rows lie along: what a product sums over.
      key: for stochastic rounding; None rounds to the nearest, ties to even.
      stacked: leading dimensions that are not part of a tensor: scales "a tensor" are one for each index of them.
      implementation: "xla"; "mosaic_gpu" (a kernel for Hopper GPUs: int8 with a scale a row, along the last dimension), which
        has no derivative. None: the kernel where it has been seen to be faster; `explain(QUANTISE, ...)` tells.
      interpret: run the named kernel in Pallas' interpreter.

    Raises:
      ValueError: a dtype or dimension that cannot be quantised; NaN or infinity in an x that is not traced; an unknown
        implementation, or a named one that cannot do this.
    """
    fmt, x, axis = _checked(x, fmt, axis, stacked)
    if not isinstance(x, jax.core.Tracer):
        _finite(x)
    how = dict(fmt=fmt, axis=axis, key=key, stacked=stacked)
    choice = QUANTISE.choose(implementation, x, interpret=interpret, **how)
    return choice.call(lambda one: partial(one.run, **how, **({"interpret": interpret} if one.kernel else {})), x)


def dequantise(q: Quantised, dtype=jnp.float32) -> jax.Array:
    """The array's values, computed in float32 and rounded to `dtype`.

    MX formats, and NV formats but for the tensor's scale, are exact in bfloat16 (away from the ends of its range).
    """
    return _dequantise(q, dtype)


@partial(jax.jit, static_argnums=1)
def _dequantise(q: Quantised, dtype) -> jax.Array:
    values = q.format.element.decode(unpack(q.codes, q.format.stored_bits, q.axis))
    return _unscaled(values, q.scales, q.tensor, q.format, q.axis).astype(dtype)


def laid_along(q: Quantised, stacked: int = 0) -> Quantised:
    """The same array, the quantised dimension innermost in memory, in each array's own sharding.

    Hopper's matrix units take both operands of an 8-bit product so; weights [K, N] that were quantised along K and lie as JAX
    lays arrays are transposed at every call. A compiled function takes arguments as they lie, and what is computed from them
    lies as JAX lays arrays again: weights that stay are to be laid once, outside of it.

    Args:
      stacked: leading dimensions of which a loop takes one index at a time (a stack of layers [L, K, N]). They lie next to the
        quantised one, [N, L, K], where XLA puts them for such a loop: a stack that lies otherwise it copies first, whole.

    Raises:
      ValueError: q is traced: inside of a compiled function only XLA says how an array lies.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(q)):
        raise ValueError(
            "laid_along takes arrays in memory, and this one is traced; lay it before the compiled function"
        )
    layout = layout_along(q.ndim, q.axis, stacked)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, ArrayFormat(layout, leaf.sharding)), q)


def layout_along(ndim: int, axis: int, stacked: int = 0) -> Layout:
    """How `laid_along` lays an array of so many dimensions that is quantised along `axis` (negative)."""
    along = ndim + axis
    return Layout((*(dim for dim in range(stacked, ndim) if dim != along), *range(stacked), along))


def split(q: Quantised, dtype) -> tuple[jax.Array, jax.Array | None]:
    """The array as `inside · outside`: what differs along the quantised axis, in `dtype`, and what does not, in float32.

    A sum over the axis may so be taken of `inside` alone, which is exact in bfloat16 (away from the ends of its range) for
    all formats but those with a float32 a group of values, where it is rounded.

    Returns:
      inside of q's shape; outside with 1 in the quantised dimension, or None for 1 everywhere.
    """
    values, scales, tensor = q.format.element.decode(unpack(q.codes, q.format.stored_bits, q.axis)), q.scales, q.tensor
    if q.scales.dtype == jnp.float32 and q.scales.shape[q.axis] == 1:
        return values.astype(dtype), q.scales
    ones = None if tensor is None else jnp.ones_like(tensor)
    return _unscaled(values, scales, ones, q.format, q.axis).astype(dtype), tensor


def fake_quantise(x, fmt: str | Format, axis: int = -1, *, key=None, stacked: int = 0) -> jax.Array:
    """`dequantise(quantise(x, ...))` in x's dtype, with the derivative of the identity (the straight-through estimator).

    A custom JVP rather than a custom VJP: it serves reverse mode and forward mode. Arguments and errors as in `quantise`,
    but NaN and infinity are not looked for: they come out as blocks of NaN.
    """
    fmt, x, axis = _checked(x, fmt, axis, stacked)
    return _fake(fmt, axis, stacked, x, key)


@partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def _fake(fmt: Format, axis: int, stacked: int, x, key):
    return _round_trip(x, key, fmt, axis, stacked)


@_fake.defjvp
def _straight_through(fmt, axis, stacked, primals, tangents):
    return _fake(fmt, axis, stacked, *primals), tangents[0]


@partial(jax.jit, static_argnums=(2, 3, 4))
def _round_trip(x, key, fmt: Format, axis: int, stacked: int):
    codes, scales, tensor = _coded(x, key, fmt, axis, stacked)
    return _unscaled(fmt.element.decode(codes), scales, tensor, fmt, axis).astype(x.dtype)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _quantise(x, key, fmt: Format, axis: int, stacked: int) -> Quantised:
    codes, scales, tensor = _coded(x, key, fmt, axis, stacked)
    return Quantised(pack(codes, fmt.stored_bits, axis), scales, tensor, fmt, axis)


def _rows(x, fmt: Format, axis: int, key, stacked: int, *, interpret=False) -> Quantised:
    return Quantised(*mosaic_gpu.quantise_mosaic_gpu(x, interpret=interpret), None, fmt, axis)


QUANTISE = Op(
    "quantising",
    (
        Implementation("mosaic_gpu", _rows, mosaic_gpu.misfit, unwise=mosaic_gpu.unwise, platform="cuda", kernel=True),
        Implementation("xla", lambda x, fmt, axis, key, stacked: _quantise(x, key, fmt, axis, stacked)),
    ),
)
"""`explain(QUANTISE, x, fmt=..., axis=-1, key=None, stacked=0)` says what each implementation makes of it."""


def _coded(x, key, fmt: Format, axis: int, stacked: int):
    """Codes of x's shape, and the scales with a block's own dimension gone."""
    x = x.astype(jnp.float32)
    x = jnp.where(jnp.abs(x) < TINY, jnp.copysign(jnp.float32(0), x), x)
    blocks = _blocks(x, fmt, axis)
    # In `blocks` the values of one block lie along `axis`, and the blocks along the dimension before it.
    whole = tuple(range(stacked, blocks.ndim))
    # Of the bits, which order as the magnitudes do and NaN last: XLA's maximum of floats may lose a NaN on CPUs.
    bits = jax.lax.bitcast_convert_type(jnp.abs(blocks), jnp.int32)
    largest = jnp.max(bits, axis=whole if fmt.block == "tensor" else (axis,), keepdims=True)
    amax = jax.lax.bitcast_convert_type(largest, jnp.float32)
    scales, tensor = fmt.scale.encode(amax, fmt.element.largest, whole)
    noise = None if key is None else jax.random.bits(key, blocks.shape, jnp.uint32)
    codes = fmt.element.encode(fmt.scale.divide(blocks, scales, tensor), noise)
    squeeze = lambda s: None if s is None else jnp.squeeze(s, axis)
    return codes.reshape(x.shape), squeeze(scales), squeeze(tensor)


def _unscaled(values, scales, tensor, fmt: Format, axis: int):
    """`values` times their scales, float32."""
    expand = lambda s: None if s is None else jnp.expand_dims(s, axis)
    return fmt.scale.multiply(_blocks(values, fmt, axis), expand(scales), expand(tensor)).reshape(values.shape)


def _blocks(x, fmt: Format, axis: int):
    """[..., K, ...] to [..., K/g, g, ...]."""
    at = x.ndim + axis
    size = fmt.block if isinstance(fmt.block, int) else x.shape[at]
    return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])


def _checked(x, fmt: str | Format, axis: int, stacked: int) -> tuple[Format, jax.Array, int]:
    fmt = get(fmt)
    if jnp.result_type(x) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(
            f"{fmt.name}: cannot quantise {jnp.result_type(x)}; convert it to float32, in which quantising is computed"
        )
    x = jnp.asarray(x)
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"{fmt.name}: axis = {axis}, but the array has the shape {x.shape}")
    axis = axis if axis < 0 else axis - x.ndim
    if not 0 <= stacked <= x.ndim + axis:
        raise ValueError(
            f"{fmt.name}: stacked = {stacked} leading dimensions of the shape {x.shape}, but the quantised one is number "
            f"{x.ndim + axis} and must lie behind them"
        )
    if reason := fmt.misfit(x.shape[axis]):
        raise ValueError(f"quantise an array of the shape {x.shape} along axis {axis}: {reason}")
    return fmt, x, axis


def _finite(x) -> None:
    # x may be a constant of something that is being traced.
    with jax.ensure_compile_time_eval():
        if bool(jnp.isfinite(x).all()):
            return
    bad = np.argwhere(~np.isfinite(np.asarray(x, np.float32)))
    at = tuple(int(i) for i in bad[0])
    raise ValueError(
        f"quantise an array of the shape {x.shape}: {len(bad)} of its {x.size} values are NaN or infinite, the first at "
        f"{at} ({float(x[at])}); a scale for them does not exist"
    )
