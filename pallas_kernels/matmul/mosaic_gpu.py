"""Quantised products for Hopper GPUs by Pallas' Mosaic GPU backend: how kernels are called (`gpu_eight`, `gpu_kernels`:
what they do).

    W8A8          int8 · int8 summed in int32, exactly, or e4m3 · e4m3 in float32; scales of rows and columns at the end.
                  The matrix unit wants both operands along K in memory: an operand that lies otherwise, as weights [K, N]
                  do in the forward product, is transposed before the kernel, a copy of a byte a value, but where
                  `formats.laid_along` has put it so once
    W4A16, W8A16  4-bit and 8-bit weights are read as they are stored and widened: a quarter or a half of bfloat16's bytes are
                  read, and as many operations done (Hopper multiplies no 4-bit operands); for up to 64 rows of x in registers
                  (`gpu_few_rows`, also by the name of "mosaic_gpu_few_rows"), else in shared memory

A byte holds the 4-bit weights of two neighbours along K; the even and the odd channels of x are multiplied with the low and
the high halves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels import gpu, versions
from jaxpar.pallas_kernels.formats.quantised import Quantised
from jaxpar.pallas_kernels.formats.scales import Float32
from jaxpar.pallas_kernels.matmul import gpu_eight, gpu_few_rows, gpu_kernels
from jaxpar.pallas_kernels.matmul.gpu_few_rows import FewRowsTiles
from jaxpar.pallas_kernels.matmul.gpu_kernels import COMPUTE, STEP
from jaxpar.pallas_kernels.matmul.products import integer, integers, operands_name
from jaxpar.pallas_kernels.tiles import Row, chip, look_up

BLOCK = 128
"""What N and K are multiples of."""


@dataclass(frozen=True)
class HopperTiles:
    """Of a warpgroup's tile of a product of a 16-bit x of many rows.

    Attributes:
      rows: 64 or 128.
      columns: 64 or 128.
      stages: steps along K that shared memory holds.
    """

    rows: int
    columns: int
    stages: int = 4

    def __post_init__(self):
        _whole_tile(self, (64, 128))


@dataclass(frozen=True)
class EightTiles:
    """Of a warpgroup's tile of a product of two operands in 8 bits, and of its blocks.

    Attributes:
      rows: 64 or 128.
      columns: 64 or 128; 256 with 64 rows.
      stages: steps along K that shared memory holds, two at least.
      cluster_rows: blocks along the rows of the result that share their copies of w.
      cluster_columns: blocks along the columns that share their copies of x, where N can be cut so.
      band: tiles of clusters along the rows that are made before the next ones along the columns.
    """

    rows: int
    columns: int
    stages: int = 4
    cluster_rows: int = 1
    cluster_columns: int = 1
    band: int = 8

    def __post_init__(self):
        _whole_tile(self, (64, 128, 256))
        if self.rows * self.columns > 128 * 128:
            raise ValueError(f"EightTiles of 256 columns have 64 rows, got {self.rows}: registers hold no more")
        if self.stages < 2:
            raise ValueError(f"EightTiles.stages must be at least 2, got {self.stages}")
        if (
            not 1 <= self.cluster_rows * self.cluster_columns <= 8
            or min(self.cluster_rows, self.cluster_columns, self.band) < 1
        ):
            raise ValueError(
                f"EightTiles must have clusters of 1 to 8 blocks and a band of at least 1, got {self.cluster_rows} x "
                f"{self.cluster_columns} blocks and {self.band}"
            )


def _whole_tile(tiles, columns: tuple[int, ...]) -> None:
    if tiles.rows not in (64, 128) or tiles.columns not in columns:
        raise ValueError(
            f"{type(tiles).__name__} must have 64 or 128 rows and {', '.join(map(str, columns[:-1]))} or {columns[-1]} columns, "
            f"got {tiles.rows} and {tiles.columns}"
        )


INTEGERS = (
    Row(EightTiles(64, 128), most=(("rows", 128),)),
    Row(EightTiles(64, 256, cluster_rows=2)),
)
FLOATS = (
    Row(EightTiles(64, 128), most=(("rows", 128),)),
    Row(EightTiles(128, 128, cluster_columns=2)),
)
SIXTEEN = (
    Row(HopperTiles(128, 128, stages=2), most=(("bits", 4),)),
    Row(HopperTiles(128, 64, stages=2)),
)
"""Tiles of int8 with int8, of float8 with float8, and of a 16-bit x of many rows, by the rows of x and the bits of w. That they
compile for Hopper GPUs and fit their registers is tested. Of int8 with many rows the fastest of nine on an H200: blocks by
themselves, or tiles of 128 x 128, are as fast within 3 %, and clusters of four much slower, as 132 processors do not divide into
them. The others have not been measured beside others: `jaxpar tune` does that."""
FEW_ROWS = (
    Row(FewRowsTiles(4, stages=4), most=(("rows", 8), ("bits", 4))),
    Row(FewRowsTiles(4, stages=2), most=(("rows", 16),)),
    Row(FewRowsTiles(2, stages=2)),
)
"""Tiles of `gpu_few_rows`: of a few that were tried on an H200, before codes were widened in fewer instructions, the fastest of
4-bit weights; of 8-bit ones two and one. That they compile for Hopper GPUs and fit their registers is tested."""


def misfit(a, b, axes, dtype) -> str | None:
    """Why no kernel multiplies these operands, as the end of a sentence; None where one does."""
    K, N = b.shape[axes[1]], b.shape[-3 - axes[1]]
    if N % BLOCK or K % BLOCK:
        return f"takes K and N that are multiples of {BLOCK}, got {K} and {N}"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"gives bfloat16, float16 or float32, got {jnp.dtype(dtype)}"
    if not a.shape[-3 - axes[0]]:
        return "takes a row of x at least, got 0"
    kind = versions.device_kind("cuda")
    if kind is not None and chip(kind) != "hopper":
        return f"is written for Hopper GPUs, and here is a {kind}"
    if isinstance(a, Quantised):
        return _misfit_eight(a, b)
    if tuple(axes) != (-1, -2):
        return "multiplies x [M, K] in bfloat16 with w [K, N] that is quantised along K"
    return _misfit_sixteen(a, b, dtype)


def misfit_few_rows(a, b, axes, dtype) -> str | None:
    """As `misfit`, of `product_few_rows`."""
    if isinstance(a, Quantised):
        return f"takes w in int4 or int8 with x in bfloat16, got x in {a.format.name}"
    if reason := misfit(a, b, axes, dtype):
        return reason
    if (M := a.shape[0]) > gpu_few_rows.MOST:
        return f"takes up to {gpu_few_rows.MOST} rows of x, got {M}"
    return None


def unwise(a, b, axes, dtype) -> str | None:
    """Why None leaves a product to others. On an H200 (`experiments/bench/kernels.py`) int8 with int8 was faster than XLA with
    4096 rows and slower with 16, and weights in 4 bits slower than XLA with 4096 rows."""
    if not isinstance(a, Quantised):
        if a.shape[0] <= gpu_few_rows.MOST:
            return 'is the same as "mosaic_gpu_few_rows" here'
        return "has been slower than XLA with many rows: only its name chooses it"
    if tuple(axes) == (-1, -2) and _operand(a) == jnp.int8 and a.shape[-3 - axes[0]] >= 1024:
        return None
    return _only("int8 with int8 forwards from 1024 rows on")


def unwise_few_rows(a, b, axes, dtype) -> str | None:
    """As `unwise`, of `product_few_rows`."""
    return None if b.shape[-1] * b.shape[-2] >= 2**20 else _only("weights of 2^20 values or more")


def _only(seen: str) -> str:
    return f"has been seen to be faster than XLA for {seen}, so that only its name chooses it elsewhere"


def _misfit_eight(a: Quantised, b) -> str | None:
    if not isinstance(b, Quantised) or (kind := _operand(a)) is None or _operand(b) != kind:
        name = b.format.name if isinstance(b, Quantised) else b.dtype
        return f"takes int8 with int8 or e4m3 with e4m3, float32 scales, got {a.format.name} and {name}"
    if any(q.scales.shape[q.axis] != 1 for q in (a, b)):
        return f"takes 8-bit operands with a scale a row or tensor, got {a.format.name} and {b.format.name}"
    return None


def _misfit_sixteen(a, b, dtype) -> str | None:
    if not isinstance(b, Quantised) or not integer(b) or b.format.element.bits not in (4, 8):
        return (
            f"takes w in int4 or int8 with x in bfloat16, got {b.format.name if isinstance(b, Quantised) else b.dtype}"
        )
    if a.dtype != jnp.bfloat16 or dtype != jnp.bfloat16:
        return f"takes x in bfloat16 or in w's 8-bit format, got {a.dtype}"
    if (group := b.shape[-2] // b.scales.shape[-2]) % STEP:
        return f"takes groups that are multiples of {STEP} values, got {b.format.name} with {group}"
    return None


def _operand(q: Quantised):
    """What the matrix unit multiplies of an operand with float32 scales: int8 or float8_e4m3fn; None for others."""
    if not isinstance(q.format.scale, Float32):
        return None
    if integer(q):
        return jnp.int8 if q.format.element.bits == 8 else None
    return jnp.float8_e4m3fn if q.format.element.name == "e4m3" else None


def table_of(a) -> tuple[Row, ...]:
    """The block table of products with this x."""
    if not isinstance(a, Quantised):
        return SIXTEEN
    return INTEGERS if integer(a) else FLOATS


def sizes_of(a, b: Quantised, axes) -> dict[str, int]:
    """What tiles are looked up by."""
    K, N = b.shape[axes[1]], b.shape[-3 - axes[1]]
    return {"rows": a.shape[-3 - axes[0]], "columns": N, "sums": K, "bits": b.format.stored_bits}


def product_mosaic_gpu(
    a, b: Quantised, axes, dtype, *, interpret=False, tiles: HopperTiles | EightTiles | None = None
) -> jax.Array:
    """`products.product` of operands without a `misfit`: [M, N] in `dtype`. Few rows of a 16-bit x are `product_few_rows`'.

    Args:
      interpret: True, or `plgpu.InterpretGPUParams`, to run in an interpreter (from JAX 0.11 on).
      tiles: instead of those of the table, whatever the rows.
    """
    M = a.shape[-3 - axes[0]]
    if tiles is None:
        if misfit_few_rows(a, b, axes, dtype) is None:
            return product_few_rows(a, b, axes, dtype, interpret=interpret)
        # What is tuned is the forward product.
        op = ("quant_matmul", "mosaic_gpu") if tuple(axes) == (-1, -2) else None
        name, sizes = operands_name(a, b, dtype), sizes_of(a, b, axes)
        tiles = look_up(table_of(a), versions.device_kind("cuda"), op=op, dtype=name, **sizes)
    run = _eight if isinstance(a, Quantised) else _sixteen
    return run(a, b, axes, dtype, tiles, gpu.interpreter(interpret))[:M]


def product_few_rows(x, w: Quantised, axes, dtype, *, interpret=False, tiles: FewRowsTiles | None = None) -> jax.Array:
    """As `product_mosaic_gpu`, for operands without a `misfit_few_rows`."""
    if tiles is None:
        op, name = ("quant_matmul", "mosaic_gpu_few_rows"), operands_name(x, w, dtype)
        tiles = look_up(FEW_ROWS, versions.device_kind("cuda"), op=op, dtype=name, **sizes_of(x, w, axes))
    more = dict(bits=w.format.element.bits, dtype=dtype, tiles=tiles, interpret=gpu.interpreter(interpret))
    return gpu_few_rows.product(x, **stored(w), **more)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _rows(x, count: int):
    """x with rows of zeros up to a multiple of `count`."""
    return jnp.pad(x, ((0, _up(x.shape[0], count) - x.shape[0]), *((0, 0),) * (x.ndim - 1)))


def _eight(a, b, axes, dtype, tiles: EightTiles, interpret):
    kind = _operand(a)
    codes = lambda q: integers(q) if kind == jnp.int8 else jax.lax.bitcast_convert_type(q.codes, kind)
    along = lambda x, axis: x if axis == -1 else x.T
    a_MxK, b_NxK = (along(codes(q), axis) for q, axis in ((a, axes[0]), (b, axes[1])))
    (M, K), N = a_MxK.shape, b_NxK.shape[0]
    columns = tiles.columns if N % tiles.columns == 0 else BLOCK
    # As many values of the result, where it cannot have this many columns.
    rows = tiles.rows * tiles.columns // columns
    cluster = tiles.cluster_rows, tiles.cluster_columns if N % (columns * tiles.cluster_columns) == 0 else 1
    together = COMPUTE * rows * cluster[0]
    scales = [
        jnp.broadcast_to(along(q.scales, axis)[:, 0], (size,)) for q, axis, size in ((a, axes[0], M), (b, axes[1], N))
    ]
    arrays = {"a": _rows(a_MxK, together), "b": b_NxK, "scales_a": _rows(scales[0], together), "scales_b": scales[1]}
    M = arrays["a"].shape[0]
    made = M // together, N // (columns * cluster[1])
    settings = gpu_eight.Eight(
        rows,
        columns,
        tiles.stages,
        K // STEP,
        dtype,
        operand=kind,
        interpret=bool(interpret),
        cluster=cluster,
        tiles=made,
        clusters=min(_processors(interpret) // math.prod(cluster), math.prod(made)),
        band=tiles.band,
    )
    grid, blocks = {"cluster": settings.clusters}, dict(zip(gpu_eight.PLACE, cluster, strict=True))
    return _call(gpu_eight.eight, settings, arrays, (M, N), grid, interpret, module=gpu_eight, cluster=blocks)


def _processors(interpret) -> int:
    """Of the GPU that is compiled for, an H100's and H200's where it does not say; of the interpreter's so few that blocks make
    several tiles."""
    return 4 if interpret else versions.processors("cuda") or 132


def stored(w: Quantised) -> dict:
    """The weights as kernels with a 16-bit x take them."""
    return {
        "codes": jax.lax.bitcast_convert_type(w.codes, jnp.int8),
        "scales": jnp.broadcast_to(w.scales, (w.scales.shape[0], w.shape[1])),
    }


def _sixteen(x, w, axes, dtype, tiles: HopperTiles, interpret):
    K, N = w.shape
    columns = tiles.columns if N % (COMPUTE * tiles.columns) == 0 else BLOCK // COMPUTE
    x_MxK = _rows(x, tiles.rows)
    M = x_MxK.shape[0]
    bits, groups = w.format.element.bits, w.scales.shape[-2]
    halves = [x_MxK.reshape(M, K // 2, 2)[:, :, i] for i in (0, 1)] if bits == 4 else [x_MxK, x_MxK]
    grid = {"column": N // (COMPUTE * columns), "row": M // tiles.rows}
    settings = gpu_kernels.Settings(
        tiles.rows,
        columns,
        tiles.stages,
        K // STEP,
        dtype,
        group=K // groups,
        bits=bits,
        interpret=bool(interpret),
    )
    arrays = {
        "x_first": halves[0],
        "x_second": halves[1],
        **stored(w),
    }
    return _call(gpu_kernels.sixteen, settings, arrays, (M, N), grid, interpret)


def _call(kernel, settings, arrays, shape, grid, interpret, *, module=gpu_kernels, cluster=None):
    scratch = getattr(module, f"{kernel.__name__}_scratch")(settings)
    call = gpu.kernel(
        partial(kernel, settings, (*arrays, "out", *scratch)),
        [versions.out_shape(shape, settings.dtype, *arrays.values())],
        grid=grid,
        warpgroups=COMPUTE + 1,
        cluster=cluster,
        scratch=scratch.values(),
        interpret=interpret,
        name=f"quant_matmul_{kernel.__name__}",
    )
    return call(*arrays.values())[0]
