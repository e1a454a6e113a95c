"""The Hopper kernels of quantised products in Pallas' interpreter (from JAX 0.11 on), and lines of them broken: every check
sees it. What an interpreter does not show, and how they compile: `test_matmul_cuda_aot`."""

import importlib
import inspect
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.dispatch import explain
from jaxpar.pallas_kernels.formats import get, quantise
from jaxpar.pallas_kernels.matmul import (
    PRODUCT,
    Operands,
    gpu_eight,
    gpu_few_rows,
    gpu_kernels,
    mosaic_gpu,
    product_reference,
    quant_matmul,
)
from jaxpar.pallas_kernels.matmul.products import product

pytestmark = pytest.mark.quick
interpreted = pytest.mark.skipif(
    not gpu.MAY_INTERPRET, reason=f"JAX {jax.__version__} cannot interpret Mosaic GPU kernels; JAX 0.11 can"
)
AXES = (-1, -2)
FORMATS = {
    "w8a8": ("int8_row", "int8_row"),
    "fp8": ("fp8_e4m3_row", "fp8_e4m3_row"),
    "w4a16": (None, "int4_g128"),
    "w8a16": (None, "int8_row"),
    "few rows, w4a16": (None, "int4_g128"),
    "few rows, w8a16": (None, "int8_g128"),
}
ROWS = {"w8a8": 260, "fp8": 130, "w4a16": 20, "w8a16": 130, "few rows, w4a16": 9, "few rows, w8a16": 1}
"""Two blocks of rows, the last not whole, or less than one."""
TILES = {
    # Four tiles of two clusters, in two bands; two tiles of one cluster of four blocks, all of whose steps have a place.
    "w8a8": mosaic_gpu.EightTiles(64, 256, stages=2, cluster_rows=2, band=1),
    "fp8": mosaic_gpu.EightTiles(64, 128, cluster_rows=2, cluster_columns=2),
    "w4a16": mosaic_gpu.HopperTiles(64, 64, stages=2),
    "w8a16": mosaic_gpu.HopperTiles(128, 64, stages=2),
    # Two warpgroups in each of two blocks of a cluster; two warpgroups, with steps that they do not divide.
    "few rows, w4a16": mosaic_gpu.FewRowsTiles(2, stages=2, blocks=8),
    "few rows, w8a16": mosaic_gpu.FewRowsTiles(2, stages=2, blocks=1),
}
COLUMNS = {"w8a8": 512, "fp8": 512, "few rows, w4a16": 256}
SUMS = {"few rows, w4a16": 3072, "few rows, w8a16": 896}
"""Steps along K are at least 3, more than there are places, but of "fp8"."""


def operands(kind: str):
    """`(x, w, value of their product)`: x and w are in their formats."""
    rng = np.random.default_rng(0)
    M, K, N = ROWS[kind], SUMS.get(kind, 384), COLUMNS.get(kind, 128)
    x, w = rng.standard_normal((M, K)), rng.standard_normal((K, N))
    # Channels, rows and columns that stand out: which scale belongs to which shows.
    x[:, [5, 300]] *= 20
    x *= np.exp(rng.standard_normal((M, 1)))
    w *= np.exp(rng.standard_normal((K // 128, 1, N))).repeat(128, 1).reshape(K, N)
    x, w = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.float32)
    inputs, weights = FORMATS[kind]
    a, b = x if inputs is None else quantise(x, inputs), quantise(w, weights, 0)
    return a, b, product_reference(a, b, AXES)


def result(kind: str) -> jnp.dtype:
    return jnp.bfloat16 if kind.endswith("16") else jnp.float32


def errors(found, exact) -> tuple[float, float, float]:
    """Relative to the result: of all of it, of the worst row, and what it is too long by."""
    found = np.asarray(found, np.float64)
    rows = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    bias = abs(np.sum((found - exact) * exact)) / np.sum(exact**2)
    worst = np.linalg.norm(found - exact) / np.linalg.norm(exact), np.max(rows), bias
    return tuple(float(np.nan_to_num(one, nan=np.inf)) for one in worst)


def run(module, kind: str, a, b, interpret=True):
    multiply = module.product_few_rows if kind.startswith("few rows") else module.product_mosaic_gpu
    return multiply(a, b, AXES, result(kind), interpret=interpret, tiles=TILES[kind])


@interpreted
@pytest.mark.parametrize("kind", FORMATS)
def test_kernels_are_no_worse_than_xla_and_have_no_races(kind):
    """The detector sees copies and what warpgroups read and write themselves, not what the matrix unit reads."""
    a, b, exact = operands(kind)
    found = run(mosaic_gpu, kind, a, b, plgpu.InterpretGPUParams(detect_races=True))
    theirs = product(a, b, AXES, result(kind)).astype(result(kind))
    if kind == "w8a8":
        np.testing.assert_array_equal(np.asarray(found), np.asarray(theirs))
    floor = 3e-7 if found.dtype == jnp.float32 else 2.0**-9
    for ours, xla in zip(errors(found, exact), errors(theirs, exact), strict=True):
        assert ours <= max(1.5 * xla, floor)


@interpreted
@pytest.mark.parametrize(
    ("kind", "rows", "columns", "tiles"),
    [
        ("int8_row", 1, 640, dict(rows=64, columns=256, cluster_rows=2, cluster_columns=2)),
        ("int8_row", 600, 512, dict(rows=64, columns=128, cluster_rows=2, cluster_columns=2)),
        ("int8_row", 520, 384, dict(rows=128, columns=128, stages=4, cluster_columns=2)),
        ("int8_row", 130, 256, dict(rows=64, columns=256, band=2)),
        ("fp8_e4m3_row", 300, 256, dict(rows=128, columns=128, cluster_rows=2, cluster_columns=2)),
        ("fp8_e4m3_row", 130, 256, dict(rows=64, columns=256, cluster_rows=2)),
    ],
)
def test_blocks_of_every_shape_give_the_same(kind, rows, columns, tiles):
    """Rows and columns that blocks and clusters do not divide, more and fewer tiles than clusters, more and fewer steps than
    places."""
    rng = np.random.default_rng(2)
    draw = lambda *shape: jnp.asarray(rng.integers(-7, 8, shape), jnp.float32)
    a, b = quantise(draw(rows, 384), kind, 1), quantise(draw(384, columns), kind, 0)
    tiles = mosaic_gpu.EightTiles(**dict(stages=2) | tiles)
    found = mosaic_gpu.product_mosaic_gpu(a, b, AXES, jnp.float32, interpret=True, tiles=tiles)
    theirs = np.asarray(product(a, b, AXES, jnp.float32))
    if kind == "int8_row":
        np.testing.assert_array_equal(np.asarray(found), theirs)
    else:
        assert max(errors(found, product_reference(a, b, AXES))) <= 3e-7


BROKEN = [
    ("w8a8", "* lax.broadcast_in_dim(along, shape, [0])", ""),
    ("w8a8", "x.scales_b.at[b_rows]", "x.scales_b.at[pl.ds(0, columns)]"),
    ("w8a8", "x.b.at[b_rows, along]", "x.b.at[pl.ds(0, columns), along]"),
    ("w8a8", "x.cluster + n * settings.clusters", "x.cluster"),
    ("w8a8", "at * size + here", "at * size"),
    ("w8a8", "step, along = n * steps + k, pl.ds(k * STEP, STEP)", "step, along = n * steps + k, pl.ds(0, STEP)"),
    ("w8a8", "1 - x.cluster, settings.clusters) + 1", "1 - x.cluster, settings.clusters)"),
    ("fp8", "totals[i] + gpu.mma", "gpu.mma"),
    ("fp8", "first_column + column, CHUNK", "first_column, CHUNK"),
    ("w4a16", "^ 8)", ")"),
    ("w4a16", "* 0.0625", "* 0.125"),
    ("w4a16", "return low, high", "return high, low"),
    ("w4a16", "x.scales.at[lax.div(k * STEP, settings.group), here]", "x.scales.at[0, here]"),
    ("w8a16", "k * STEP + half * HALF", "k * STEP"),
    ("w8a16", "(k * parts + part) * HALF", "k * parts * HALF"),
    ("w8a16", "source.at[pl.ds(x.row * rows, rows)", "source.at[pl.ds(0, rows)"),
    ("few rows, w4a16", "x.scales.at[lax.div(k * STEP, s.group), here]", "x.scales.at[0, here]"),
    ("few rows, w4a16", 'lax.axis_index("column") * COLUMNS', "0"),
    ("few rows, w4a16", "start + n * everyone", "n * everyone"),
    ("few rows, w4a16", "s.steps - start + everyone - 1", "s.steps - start"),
    ("few rows, w4a16", "x.x.at[:, pl.ds(k * STEP, STEP)]", "x.x.at[:, pl.ds(0, STEP)]"),
    ("few rows, w4a16", "x.sums.at[n]", "x.sums.at[0]"),
    ("few rows, w4a16", "part * lax.broadcast_in_dim(scale / registers.UNIT, part.shape, [0])", "part"),
    (
        "few rows, w4a16",
        "copy_smem_to_gmem(x.out_tile.at[pl.ds(start, some)]",
        "copy_smem_to_gmem(x.out_tile.at[pl.ds(0, some)]",
    ),
    ("few rows, w4a16", "x.out.at[here_of_k, pl.ds(row, some), here]", "x.out.at[here_of_k, pl.ds(0, some), here]"),
    ("few rows, w4a16", "here_of_k * s.workers + worker", "worker"),
    ("few rows, w8a16", "total + part * lax.broadcast_in_dim(scale /", "part * lax.broadcast_in_dim(scale /"),
]
RACES = [
    ("fp8", "        plgpu.barrier_wait(x.scales_used)\n\n            for", "        pass\n\n            for"),
    ("w8a8", "plgpu.barrier_wait(x.used.at[slot])", "pass"),
    ("w8a8", "plgpu.wait_smem_to_gmem(settings.out_slots - 1, wait_read_only=True)", "pass"),
    ("w8a16", "plgpu.barrier_wait(x.used.at[slot])", "pass"),
    (
        "w4a16",
        "        plgpu.commit_smem()\n        plgpu.barrier_arrive(x.used",
        "        plgpu.barrier_arrive(x.used",
    ),
    ("few rows, w4a16", "plgpu.barrier_wait(x.ready.at[warpgroup * s.stages + slot])", "pass"),
    ("few rows, w4a16", "plgpu.barrier_wait(x.all_here)", "pass"),
]


def broken(kind: str, line: str, instead: str) -> types.ModuleType:
    """`mosaic_gpu` with this in the kernel of this kind."""
    mutant = types.ModuleType(mosaic_gpu.__name__)
    exec(compile(inspect.getsource(mosaic_gpu), "mutant", "exec"), mutant.__dict__)
    kernels = gpu_eight if kind in ("w8a8", "fp8") else gpu_few_rows if kind.startswith("few rows") else gpu_kernels
    source = inspect.getsource(kernels)
    assert source.count(line) == 1
    changed = types.ModuleType(kernels.__name__)
    # Its dataclasses look their module up by name.
    exec(compile(source.replace(line, instead), "broken", "exec"), changed.__dict__)
    setattr(mutant, kernels.__name__.rsplit(".", 1)[1], changed)
    return mutant


@interpreted
@pytest.mark.parametrize(("kind", "line", "instead"), BROKEN)
def test_a_broken_line_shows(kind, line, instead):
    a, b, exact = operands(kind)
    assert max(errors(run(broken(kind, line, instead), kind, a, b), exact)) > 0.02


@interpreted
@pytest.mark.parametrize(("kind", "line", "instead"), RACES)
def test_a_tile_that_is_overwritten_too_early_is_a_race(kind, line, instead):
    """Or a barrier is passed for the second time while nobody has seen the first."""
    a, b, _ = operands(kind)
    try:
        with pytest.raises(Exception, match=r"RACE DETECTED|no threads observed"):
            jax.block_until_ready(
                run(broken(kind, line, instead), kind, a, b, plgpu.InterpretGPUParams(detect_races=True))
            )
    finally:
        # JAX exports it not yet.
        reset = importlib.import_module("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
        reset.reset_gpu_interpret_mode_state()


@interpreted
def test_the_public_function_runs_them_forwards_and_backwards():
    """All three products of int8 are the kernel's: the same bits as XLA's."""
    rng = np.random.default_rng(1)
    x, w, c = (jnp.asarray(rng.standard_normal((128, 128)), jnp.bfloat16) for _ in range(3))
    int8 = get("int8_row")

    def both(name, interpret):
        how = Operands(int8, int8, int8)
        call = lambda x, w: quant_matmul(x, w, how, implementation=name, interpret=interpret)
        return jax.value_and_grad(lambda x, w: jnp.sum(call(x, w).astype(jnp.float32) * c), (0, 1))(x, w)

    ours = str(jax.make_jaxpr(lambda: both("mosaic_gpu", True))())
    assert ours.count("quant_matmul_eight") >= 3
    for found, theirs in zip(
        *(jax.tree.leaves(both(*how)) for how in (("mosaic_gpu", True), ("xla", False))), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(theirs, np.float32))


@interpreted
@pytest.mark.parametrize(("rows", "kernel"), [(64, "few_rows"), (65, "sixteen")])
def test_few_rows_are_the_kernel_for_few_rows(rows, kernel):
    """By either name; nothing else is asked for it."""
    x, w = jnp.zeros((rows, 128), jnp.bfloat16), quantise(jnp.ones((128, 128)), "int4_g128", 0)
    text = str(jax.make_jaxpr(lambda x: quant_matmul(x, w, implementation="mosaic_gpu", interpret=True))(x))
    assert set(re.findall(r"quant_matmul_(few_rows|sixteen|eight)", text)) == {kernel}


@pytest.mark.parametrize(
    ("kind", "sizes", "words"),
    [
        (
            "HopperTiles",
            dict(rows=64, columns=256),
            "HopperTiles must have 64 or 128 rows and 64 or 128 columns, got 64 and 256",
        ),
        ("FewRowsTiles", dict(warpgroups=3), "1, 2, 4 or 8 warpgroups, .* got 3, 4 and 132"),
        ("EightTiles", dict(rows=96, columns=128), "64 or 128 rows and 64, 128 or 256 columns, got 96 and 128"),
        ("EightTiles", dict(rows=128, columns=256), "EightTiles of 256 columns have 64 rows, got 128"),
        ("EightTiles", dict(rows=64, columns=128, stages=1), "stages must be at least 2, got 1"),
        (
            "EightTiles",
            dict(rows=64, columns=128, cluster_rows=4, cluster_columns=4),
            "clusters of 1 to 8 .* got 4 x 4",
        ),
    ],
)
def test_tiles_that_no_kernel_has_are_told(kind, sizes, words):
    with pytest.raises(ValueError, match=words):
        getattr(mosaic_gpu, kind)(**sizes)


@pytest.mark.parametrize(("cores", "found"), [(114, 114), (None, 132)])
def test_all_processors_have_blocks(cores, found):
    """Also of a GPU that does not say how many it has."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=cores, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert mosaic_gpu._processors(interpret=False) == found


def test_what_has_been_seen_to_be_faster_is_chosen():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    coded = lambda sizes, form, axis: jax.eval_shape(
        lambda w: quantise(w, form, axis), shape(*sizes, dtype=jnp.float32)
    )
    weights = coded((4096, 4096), "int4_g128", 0)
    eight = coded((4096, 256), "int8_row", 1), coded((256, 128), "int8_row", 0)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        asked = lambda a, b: {one.name: one for one in explain(PRODUCT, a, b, axes=AXES, dtype=jnp.bfloat16)}
        assert asked(*eight)["mosaic_gpu"].chosen == ("cuda",)
        for rows in (1, 64):
            found = asked(shape(rows, 4096), weights)
            assert found["mosaic_gpu_few_rows"].chosen == ("cuda",)
            assert found["mosaic_gpu"].reason == 'is the same as "mosaic_gpu_few_rows" here'
        only = lambda seen: (
            f"has been seen to be faster than XLA for {seen}, so that only its name chooses it elsewhere"
        )
        slower = "has been slower than XLA with many rows: only its name chooses it"
        for a, b, name, reason in (
            (shape(65, 4096), weights, "mosaic_gpu", slower),
            (
                shape(1, 256),
                coded((256, 128), "int4_g128", 0),
                "mosaic_gpu_few_rows",
                only("weights of 2^20 values or more"),
            ),
            (
                coded((1000, 256), "int8_row", 1),
                eight[1],
                "mosaic_gpu",
                only("int8 with int8 forwards from 1024 rows on"),
            ),
        ):
            verdicts = asked(a, b)
            assert verdicts["xla"].chosen == ("cuda",)
            assert verdicts[name].reason == reason
            assert PRODUCT.choose(name, a, b, axes=AXES, dtype=jnp.bfloat16).default.name == name
        assert verdicts["mosaic_tpu"].reason == "runs on TPUs, and here are NVIDIA GPUs only"
        few = lambda a, b: asked(a, b)["mosaic_gpu_few_rows"].reason
        assert few(shape(65, 4096), weights) == "takes up to 64 rows of x, got 65"
        assert few(*eight) == "takes w in int4 or int8 with x in bfloat16, got x in int8_row"


@pytest.mark.parametrize(
    ("inputs", "weights", "shape", "dtype", "words"),
    [
        (None, "int4_g128", (256, 128), "bfloat16", "runs on NVIDIA GPUs, and here are CPUs only; use .*=.xla."),
        ("mxfp8", "mxfp8", (256, 128), "bfloat16", "int8 with int8 or e4m3 with e4m3.*, got mxfp8_e4m3 and mxfp8_e4m3"),
        ("int8_row", "fp8_e4m3_row", (256, 128), "bfloat16", "e4m3 with e4m3.*, got int8_row and fp8_e4m3_row"),
        ("int8_row", "int8_g128", (256, 128), "bfloat16", "a scale a row or tensor, got int8_row and int8_g128"),
        (None, "mxfp4", (256, 128), "bfloat16", "w in int4 or int8 with x in bfloat16, got mxfp4"),
        (None, "int4_g128", (256, 128), "float32", "x in bfloat16 or in w's 8-bit format, got float32"),
        (None, "int4_g32", (256, 128), "bfloat16", "multiples of 128 values, got int4_g32 with 32"),
        (None, "int4_row", (320, 128), "bfloat16", "K and N that are multiples of 128, got 320 and 128"),
        ("int8_row", "int8_row", (256, 96), "bfloat16", "K and N that are multiples of 128, got 256 and 96"),
    ],
)
def test_what_kernels_cannot_multiply_is_told(inputs, weights, shape, dtype, words):
    x, w = (jax.ShapeDtypeStruct(size, dtype) for size in ((4, shape[0]), shape))
    how = Operands(inputs and get(inputs), get(weights))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda x, w: quant_matmul(x, w, how, implementation="mosaic_gpu"), x, w)
