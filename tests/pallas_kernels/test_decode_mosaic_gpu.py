"""The Hopper decoding kernel in JAX's Mosaic GPU interpreter (from JAX 0.11 on): against float64, no worse than 1.5 times
plain XLA, without races, and lines of it broken, which the comparison sees. How it compiles: `test_decode_cuda_aot`."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import PartitionSpec

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.decode import DECODE_ATTENTION, decode_attention, gpu_kernel, mosaic_gpu
from jaxpar.pallas_kernels.decode.xla import decode_xla
from jaxpar.pallas_kernels.dispatch import explain
from jaxpar.pallas_kernels.formats.quantised import quantise
from tests.pallas_kernels.attention_cases import errors, no_worse
from tests.pallas_kernels.decode_cases import Case, arguments, call, check_data, poisoned, truth
from tests.pallas_kernels.test_attention_mosaic_gpu import B200, H200, TWO
from tests.pallas_kernels.test_attention_mutants import load

pytestmark = pytest.mark.quick
interpreted = pytest.mark.skipif(
    not gpu.MAY_INTERPRET, reason=f"JAX interprets Mosaic GPU kernels from 0.11 on, this is {jax.__version__}"
)
Tiles = mosaic_gpu.HopperDecodeTiles
CASES = {
    # A row that holds nothing, and one that leaves a split nothing; the last step is no whole one.
    "grouped, split": Case((3, 1, 600, 8, 2, 64), Tiles(64, 1, blocks=12), (600, 1, 0), jnp.bfloat16),
    "several queries, window, cap": Case(
        (2, 5, 400, 4, 2, 128), Tiles(64, 1, blocks=1), (400, 61), jnp.float16, window=90, cap=3.0
    ),
    "pages": Case((2, 2, 256, 4, 2, 64), Tiles(64, 2, blocks=1), (250, 95), jnp.bfloat16, page=16, window=70),
    # Scales of eight heads are copied together.
    "int8, pages": Case(
        (1, 2, 224, 8, 8, 64), Tiles(64, 1, blocks=1), (210,), jnp.bfloat16, "int8_row", 32, window=150
    ),
    # What XLA rounds, too: codes with their scales.
    "int4 blocks": Case((1, 1, 216, 2, 1, 128), Tiles(64, 1, blocks=1), (140,), jnp.bfloat16, "int4_g32"),
    "int4, pages of several steps": Case(
        (2, 1, 256, 4, 2, 128), Tiles(64, 1, blocks=1), (300, 130), jnp.bfloat16, "int4_row", page=128
    ),
}
CEILINGS = {jnp.bfloat16: 5e-3, jnp.float16: 6e-4, jnp.float32: 1e-6}
UNITS = {jnp.bfloat16: 2**-8, jnp.float16: 2**-11, jnp.float32: 2**-18}
"""A difference that is rounding, where XLA has less by luck."""


@cache
def programs(name):
    """The interpreter raises where copies and reads race."""
    case, careful = CASES[name], plgpu.InterpretGPUParams(detect_races=True)
    return call(case, mosaic_gpu.decode_mosaic_gpu, tiles=case.tiles, interpret=careful), call(case, decode_xla)


def exact(case, given):
    """In float64, of what codes and scales say, which `truth` rounds to the case's dtype."""
    return truth(replace(case, dtype=jnp.float32), given)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_against_float64_no_worse_than_xla(name):
    """With NaN in every slot that no row holds; and the same bits without."""
    case = CASES[name]
    kernel, xla = programs(name)
    given = arguments(case)
    spoilt = poisoned(case, given)
    found, theirs, clean = kernel(*spoilt), xla(*spoilt), kernel(*given)
    for label, a, b, c, expected in zip(("out", "lse"), found, theirs, clean, exact(case, given), strict=True):
        np.testing.assert_array_equal(a, c)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        dtype = jnp.float32 if label == "lse" else case.dtype
        ours, xlas = errors(a, expected), errors(b, expected)
        no_worse(ours, xlas, UNITS[dtype], label)
        rounded = case.form == "int4_g32" and label == "lse"
        assert ours[0] <= (1e-3 if rounded else CEILINGS[dtype]), (label, ours)
        # Nothing passes by being small.
        assert np.sqrt(np.mean(expected[np.isfinite(expected)] ** 2)) > 0.01, label


@interpreted
def test_lengths_windows_and_tables_are_data():
    """The same program, other rows; a row that ran far past its slots, and rows that hold nothing: exactly nothing."""
    case, (kernel, _) = CASES["pages"], programs("pages")
    *_, lens, window, table = given = arguments(case)
    swapped = table.at[:, 2].set(table[::-1, 2])
    others = (
        (lens - 40, window, table),
        (lens, window - 60, table),
        (lens, window, swapped),
        (lens * 0, window, table),
    )
    check_data(kernel, case, given, others, CEILINGS[case.dtype])


MUTANTS = (
    (gpu_kernel, "jnp.where(top == -jnp.inf, 0.0, top)", "top"),
    (gpu_kernel, "(column < behind)", "(column <= behind)"),
    (gpu_kernel, "top * LOG2)", "top)"),
    (gpu_kernel, "jnp.where(token < x.held, found, jnp.zeros_like(found))", "found"),
    (gpu_kernel, "x.first = first + x.split * share", "x.first = first"),
    (mosaic_gpu, "* k.shape[-4]\n", "* 0\n"),
)
MUTATED = Case((2, 2, 544, 2, 1, 64), Tiles(64, 1, blocks=4), (544, 23), jnp.bfloat16, window=480, scale=0.9)
"""The first row's second query sees nothing of the first step, which the first one sees the last token of."""
CODE_MUTANTS = (
    (gpu_kernel, "jnp.where(weights > 0.0, weights * scales, 0.0)", "weights * scales"),
    (gpu_kernel, "jnp.where(weights > 0.0, weights * scales, 0.0)", "jnp.where(weights > 0.0, weights, 0.0)"),
    (gpu_kernel, "n * settings.width + channel, CHUNK", "channel, CHUNK"),
    (mosaic_gpu, "x.scales[layer]", "x.scales[0]"),
)
BLOCK_MUTANTS = (
    (gpu_kernel, "jnp.where(row < x.held, part, 0.0)", "part"),
    (gpu_kernel, "column >= block * bytes_of_block", "column > block * bytes_of_block"),
)
BLOCKS = Case((1, 1, 200, 1, 1, 128), Tiles(64, 1, blocks=1), (150,), jnp.bfloat16, "int4_g32", scale=0.1)
CODED = Case((1, 1, 200, 2, 2, 128), Tiles(64, 1, blocks=1), (150,), jnp.bfloat16, "int4_row", scale=0.1)


@pytest.fixture(scope="module")
def problems():
    """Of each case its arguments and the truth."""
    draw = lambda case: (poisoned(case, given := arguments(case)), exact(case, given))
    return {case: draw(case) for case in (MUTATED, CODED, BLOCKS)}


def right(calls, problems, case) -> bool:
    most = 1e-3 if case is BLOCKS else 1e-6
    given, expected = problems[case]
    found = call(case, calls.decode_mosaic_gpu, tiles=case.tiles, interpret=True)(*given)
    try:
        return errors(found[0], expected[0])[0] < 4e-3 and errors(found[1], expected[1])[0] < most
    except AssertionError:
        # Not finite where the truth is.
        return False


@interpreted
@pytest.mark.parametrize("case", [MUTATED, CODED, BLOCKS], ids=["floats", "codes", "blocks"])
def test_the_unbroken_kernel_is_right(problems, case):
    assert right(mosaic_gpu, problems, case)


@interpreted
@pytest.mark.parametrize("number", range(len(MUTANTS + CODE_MUTANTS + BLOCK_MUTANTS)))
def test_mutants_are_killed(problems, number, monkeypatch):
    module, old, new = (MUTANTS + CODE_MUTANTS + BLOCK_MUTANTS)[number]
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{module.__name__} has {old!r} {source.count(old)} times"
    made = load(module, source.replace(old, new), monkeypatch)
    calls = made if module is mosaic_gpu else load(mosaic_gpu, Path(mosaic_gpu.__file__).read_text(), monkeypatch)
    if module is gpu_kernel:
        calls.gpu_kernel, calls.Settings = made, made.Settings
    case = [MUTATED] * len(MUTANTS) + [CODED] * len(CODE_MUTANTS) + [BLOCKS] * len(BLOCK_MUTANTS)
    assert not right(calls, problems, case[number]), f"{old!r} -> {new!r} makes no difference"


def test_splits_keep_all_processors_busy_and_no_part_is_short():
    for pairs, steps in ((64, 512), (512, 64), (8, 512), (1, 2048), (24, 128), (200, 64), (3, 5), (1, 1)):
        splits = mosaic_gpu.splits_of(pairs, steps, 132)
        assert splits == 1 or steps // splits >= mosaic_gpu.LEAST_STEPS
        if steps * pairs >= 132 * 16:
            blocks = pairs * splits
            assert blocks / (-(-blocks // 132) * 132) >= 0.9, (pairs, steps, splits)


def test_who_gets_the_kernel():
    """On a Hopper GPU it is chosen without its name; what it cannot do is one sentence."""
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    q, k, lens = shape(2, 1, 8, 128), shape(2, 256, 2, 128), shape(2, dtype=jnp.int32)
    reason = lambda q=q, k=k, **more: (
        {v.name: v for v in explain(DECODE_ATTENTION, q, k, k, lens, **dict(scale=1.0) | more)}["mosaic_gpu"].reason
    )
    table = shape(2, 3, dtype=jnp.int32)
    codes = lambda form, size=128, places=(2, 256): jax.eval_shape(
        lambda: quantise(jnp.zeros((*places, 2, size)), form)
    )
    assert reason() == "runs on NVIDIA GPUs, and here are CPUs only"
    for found, words in (
        (reason(q=shape(2, 1, 8, 128, dtype=jnp.float32)), "queries in bfloat16 or float16, got float32"),
        (reason(k=shape(2, 256, 2, 128, dtype=jnp.float16)), "in the queries' dtype, bfloat16, got float16"),
        (reason(k=codes("fp8_e4m3_row")), "int8 or int4 with float32 scales, got fp8_e4m3_row"),
        (reason(k=codes("int4_g16")), "blocks of 16 bytes of codes, 8 a head at most, got 8 of int4_g16"),
        (reason(k=codes("int8_tensor")), "one scale a head of a token or a block of it, got int8_tensor"),
        (reason(q=shape(2, 1, 8, 128, dtype=jnp.float16), k=codes("int8_row")), "bfloat16 with int8_row, got float16"),
        (reason(q=shape(2, 1, 8, 64), k=codes("int4_row", 64)), "int4 from a head size of 128 on, got 64"),
        (reason(k=codes("int8_row", places=(9, 16)), table_BxP=table), "at least 32 slots with int8_row, got 16"),
        (reason(q=shape(2, 1, 8, 80), k=shape(2, 256, 2, 80)), "head sizes of 64, 128 and 256, got 80"),
        (reason(q=shape(2, 17, 8, 128)), "1 to 16 queries a row, and 64 that share a key/value head, got 17 and 68"),
        (reason(k=shape(2, 56, 2, 128)), "at least 64 slots, and of whole eights, got 56"),
        (reason(k=shape(2, 100, 2, 128)), "at least 64 slots, and of whole eights, got 100"),
        (reason(k=shape(9, 24, 2, 128), table_BxP=table), "a power of two of slots from 8 on, got 3 of 24"),
    ):
        assert words in found
        assert "\n" not in found
    with jax.sharding.use_abstract_mesh(B200):
        assert reason() == "is written for Hopper GPUs, and here is a NVIDIA B200"
    with jax.sharding.use_abstract_mesh(H200):
        assert reason() == "is chosen on NVIDIA GPUs"
        assert reason(k=codes("int4_g32", places=(9, 32)), table_BxP=table) == "is chosen on NVIDIA GPUs"
        run = jax.jit(lambda *x: decode_attention(*x, scale=1.0))
        text = run.trace(q, k, k, lens).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    with pytest.raises(ValueError, match="tokens must be 64 or 128, got 96"):
        Tiles(96)
    with pytest.raises(ValueError, match="stages must be at least 1, got 0"):
        Tiles(stages=0)


BOTH = pytest.mark.parametrize(
    ("kernel", "form"), [("mosaic_gpu", None), ("mosaic_gpu", "int8_row"), ("mosaic_gpu_codes", "int4_row")]
)
"""The kernels for Hopper GPUs by their names, and formats of the cache."""


@interpreted
@BOTH
def test_the_public_function_runs_it_with_sinks_and_tiles_of_the_table(kernel, form):
    case = replace(CASES["grouped, split"], shape=(2, 3, 80, 4, 2, 64), lens=(80, 50), form=form)
    q, k, v, lens, *_ = arguments(case)
    run = lambda name, **more: decode_attention(
        q, k, v, lens, scale=0.3, layer=1, sinks_H=jnp.arange(4.0), lse_out=True, implementation=name, **more
    )
    for a, b in zip(*jax.jit(lambda: (run(kernel, interpret=True), run("xla")))(), strict=True):
        assert errors(a, np.asarray(b, np.float64))[0] < CEILINGS[jnp.bfloat16]


@BOTH
def test_it_lowers_for_a_gpu_inside_a_shard_map(kernel, form):
    """Where JAX keeps account of what differs between devices: rows are spread."""
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    cache = shape(3, 4, 128, 2, 128)
    if form is not None:
        cache = jax.eval_shape(lambda: quantise(jnp.zeros(cache.shape), form))
    named = dict(scale=1.0, implementation=kernel)
    run = lambda q, k, v, lens, layer: decode_attention(q, k, v, lens, layer=layer, **named)
    rows, kept, whole = PartitionSpec("data"), PartitionSpec(None, "data"), PartitionSpec()
    with jax.sharding.use_abstract_mesh(TWO):
        split = jax.jit(jax.shard_map(run, mesh=TWO, in_specs=(rows, kept, kept, rows, whole), out_specs=rows))
        given = shape(4, 1, 8, 128), cache, cache, shape(4, dtype=jnp.int32), shape(dtype=jnp.int32)
        text = split.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
