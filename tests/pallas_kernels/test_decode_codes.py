"""The Hopper decoding kernel that widens codes in registers, in JAX's Mosaic GPU interpreter (from JAX 0.11 on): against float64,
no worse than 1.5 times plain XLA, without races, and lines of it broken, which the comparison sees. Its program is the one
that is inlined into the kernel on a chip (`lanes`). How it
compiles: `test_decode_codes_cuda_aot`; the public function: `test_decode_mosaic_gpu`."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels.decode import (
    DECODE_ATTENTION,
    decode_attention,
    gpu_codes,
    gpu_codes_program,
    mosaic_gpu_codes,
)
from jaxpar.pallas_kernels.decode.gpu_codes_program import query_channels
from jaxpar.pallas_kernels.decode.xla import decode_xla
from jaxpar.pallas_kernels.dispatch import explain
from jaxpar.pallas_kernels.formats.quantised import quantise
from jaxpar.pallas_kernels.lanes import codes
from tests.pallas_kernels.attention_cases import errors, no_worse
from tests.pallas_kernels.decode_cases import Case, arguments, call, check_data, poisoned
from tests.pallas_kernels.test_attention_mosaic_gpu import H200
from tests.pallas_kernels.test_attention_mutants import load
from tests.pallas_kernels.test_decode_mosaic_gpu import CEILINGS, UNITS, exact, interpreted

pytestmark = pytest.mark.quick
Tiles = mosaic_gpu_codes.CodeTiles
CASES = {
    # Four heads abreast, and their scales, of eight; a row that holds nothing and one that leaves a split nothing.
    "int4, 8 heads, split": Case(
        (3, 1, 392, 16, 8, 128), Tiles(64, 2, blocks=12), (392, 1, 0), jnp.bfloat16, "int4_row"
    ),
    # Four warps of a head; two columns of queries.
    "int8, one head, several queries, window, cap": Case(
        (2, 5, 328, 2, 1, 64), Tiles(32, 1, blocks=1), (328, 61), jnp.bfloat16, "int8_row", window=90, cap=3.0
    ),
    # Two heads abreast with two warps each.
    "int8 blocks, two heads, pages": Case(
        (2, 1, 256, 4, 2, 128), Tiles(64, 2, blocks=1), (250, 95), jnp.bfloat16, "int8_g32", 32, window=170
    ),
    "int4 blocks, four heads, split": Case(
        (1, 2, 456, 4, 4, 128), Tiles(32, 3, blocks=4), (440,), jnp.bfloat16, "int4_g32", scale=0.2
    ),
    "int8, four heads, pages": Case(
        (2, 1, 128, 4, 4, 64), Tiles(64, 1, blocks=1), (120, 40), jnp.bfloat16, "int8_row", 32
    ),
    "int4, pages of several steps": Case(
        (2, 1, 256, 4, 2, 128), Tiles(64, 1, blocks=1), (300, 130), jnp.bfloat16, "int4_row", page=128
    ),
    "int4, narrow": Case(
        (2, 1, 192, 2, 1, 64), Tiles(128, 2, blocks=1), (190, 77), jnp.bfloat16, "int4_row", scale=0.1
    ),
    "int8, wide": Case((1, 1, 208, 2, 1, 256), Tiles(64, 1, blocks=1), (200,), jnp.bfloat16, "int8_row", scale=0.1),
}


@cache
def programs(name):
    """The interpreter raises where copies and reads race."""
    case, careful = CASES[name], plgpu.InterpretGPUParams(detect_races=True)
    ours = call(case, mosaic_gpu_codes.decode_mosaic_gpu_codes, tiles=case.tiles, interpret=careful)
    return ours, call(case, decode_xla)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_against_float64_no_worse_than_xla(name):
    """With NaN in every slot that no row holds; and the same bits without. Codes are not rounded with their scales, so that
    log-sum-exp is float32's, with blocks too."""
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
        assert ours[0] <= CEILINGS[dtype], (label, ours)
        # Nothing passes by being small.
        assert np.sqrt(np.mean(expected[np.isfinite(expected)] ** 2)) > 0.01, label


@interpreted
def test_lengths_windows_and_tables_are_data():
    """The same program, other rows; a row that ran far past its slots, and rows that hold nothing: exactly nothing."""
    name = "int8 blocks, two heads, pages"
    case, (kernel, _) = CASES[name], programs(name)
    *_, lens, window, table = given = arguments(case)
    swapped = table.at[:, 2].set(table[::-1, 2])
    others = (
        (lens - 40, window, table),
        (lens, window - 60, table),
        (lens, window, swapped),
        (lens * 0, window, table),
    )
    check_data(kernel, case, given, others, 8e-3)


@interpreted
def test_nan_in_queries_or_scales_comes_out():
    """What the kernel skips is what nobody sees: NaN that is seen is in the result."""
    case, (kernel, _) = CASES["int4, 8 heads, split"], programs("int4, 8 heads, split")
    q, k, v, *rest = arguments(case)
    for given in (
        (q.at[0, 0, 3].set(jnp.nan), k, v),
        (q, replace(k, scales=k.scales.at[1, 0, 77, 1].set(jnp.nan)), v),
        (q, k, replace(v, scales=v.scales.at[1, 0, 77, 1].set(jnp.nan))),
    ):
        out, lse = kernel(*given, *rest)
        assert np.isnan(np.asarray(out[0, 0, 3], np.float32)).all()
        assert given[2] is not v or np.isnan(lse[0, 3, 0])
        assert np.isfinite(np.asarray(out[0, 0, 4:], np.float32)).all()
        assert np.isfinite(np.asarray(out[1:], np.float32)).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_each_channel_of_a_query_has_one_place(bits):
    for size in (64, 128, 256):
        found = query_channels(bits, size)
        assert found.shape == (size // 16, 2, 4, 2)
        np.testing.assert_array_equal(np.sort(found.reshape(-1)), np.arange(size))


MUTANTS = (
    (gpu_codes_program, "machine.where(top > -math.inf, top, 0.0)\n            shrink", "top\n            shrink"),
    (gpu_codes_program, "(token < behind + query)", "(token < behind + query + 1)"),
    (gpu_codes_program, "(token >= low + query)", "(token > low + query)"),
    (gpu_codes, "start + s.tokens <= lax.min", "start <= lax.min"),
    (gpu_codes, "clear = clear & (start >= x.low)", "clear = clear & (start >= x.low - s.tokens)"),
    (gpu_codes_program, "for mask in (4, 8, 16):\n                top", "for mask in (4, 8):\n                top"),
    (gpu_codes_program, "for mask in (4, 8, 16):\n                total", "for mask in (4, 8):\n                total"),
    (gpu_codes_program, "total = total + weight\n", "total = weight\n"),
    (gpu_codes_program, "part[n][2 * below + e] * shrink", "part[n][2 * below + e]"),
    (gpu_codes_program, "totals[n][e] * shrink\n", "totals[n][e]\n"),
    (gpu_codes_program, "machine.where(four[i] > 0.0, four[i] * scales[i // 2], 0.0)", "four[i] * scales[i // 2]"),
    (gpu_codes_program, "four[i] * scales[i // 2], 0.0)", "four[i] * scales[0], 0.0)"),
    (gpu_codes_program, "machine.turned(machine.packed(", "(machine.packed("),
    (gpu_codes_program, "operand = first[n], first[n + 1], second[n]", "operand = first[n], second[n], first[n + 1]"),
    (gpu_codes_program, "fresh[n][i], scales[i // 2], old", "fresh[n][i], scales[1], old"),
    (gpu_codes_program, "else found[n][i]\n", "else None\n"),
    (gpu_codes_program, "level) for one in tops]", "0.0) for one in tops]"),
    (
        gpu_codes_program,
        "(top > -math.inf, top, 0.0)\n        shares",
        "(top > -math.inf, tops[0], 0.0)\n        shares",
    ),
    (gpu_codes_program, "+ top) * LOG2", "+ top)"),
    (codes, "0x7F007F00), (0x00F000F0, 0x7D007D00)", "0x7F007F00), (0x00F000F0, 0x7F007F00)"),
    (gpu_codes_program, "per_word // 2)", "per_word // 4)"),
)
"""All are tried with each of the problems until one of them sees it."""
PROBLEMS = {
    # Four warps of a head; the first row's second query sees nothing of the first step, which the first one sees the last token of.
    "one head": Case(
        (2, 2, 536, 2, 1, 64), Tiles(64, 1, blocks=4), (536, 23), jnp.bfloat16, "int8_row", window=472, scale=0.9
    ),
    "blocks": Case((2, 1, 136, 4, 4, 64), Tiles(32, 2, blocks=1), (120, 0), jnp.bfloat16, "int4_g32", scale=0.3),
}


@pytest.fixture(scope="module")
def problems():
    """Of each case its arguments and the truth."""
    draw = lambda case: (poisoned(case, given := arguments(case)), exact(case, given))
    return {name: draw(case) for name, case in PROBLEMS.items()}


def right(calls, problems, name) -> bool:
    given, expected = problems[name]
    case = PROBLEMS[name]
    found = call(case, calls.decode_mosaic_gpu_codes, tiles=case.tiles, interpret=True)(*given)
    try:
        return errors(found[0], expected[0])[0] < 4e-3 and errors(found[1], expected[1])[0] < 1e-6
    except AssertionError:
        # Not finite where the truth is.
        return False


@interpreted
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_unbroken_kernel_is_right(problems, name):
    assert right(mosaic_gpu_codes, problems, name)


@interpreted
@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_mutants_are_killed(problems, number, monkeypatch):
    module, old, new = MUTANTS[number]
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{module.__name__} has {old!r} {source.count(old)} times"
    made = load(module, source.replace(old, new), monkeypatch)
    again = lambda module: load(module, Path(module.__file__).read_text(), monkeypatch)
    frame = made if module is gpu_codes else again(gpu_codes)
    if module is not gpu_codes:
        frame.program = made if module is gpu_codes_program else again(gpu_codes_program)
    if module is codes:
        frame.program.widened = made.widened
    calls = again(mosaic_gpu_codes)
    calls.gpu_codes, calls.Settings, calls.program = frame, frame.Settings, frame.program
    assert not all(right(calls, problems, name) for name in PROBLEMS), f"{old!r} -> {new!r} makes no difference"


def test_who_gets_the_kernel():
    """By its name alone; what it cannot do is one sentence."""
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    codes = lambda form, G=2, size=128: jax.eval_shape(lambda: quantise(jnp.zeros((2, 256, G, size)), form))
    q, lens = shape(2, 1, 8, 128), shape(2, dtype=jnp.int32)
    verdict = lambda k, q=q: {v.name: v for v in explain(DECODE_ATTENTION, q, k, k, lens, scale=1.0)}[
        "mosaic_gpu_codes"
    ]
    with jax.sharding.use_abstract_mesh(H200):
        found = verdict(codes("int4_row"))
        assert (found.chosen, found.reason) == ((), "has not been measured on a chip, so that only its name chooses it")
        many = shape(2, 5, 32, 128)
        for reason, words in (
            (verdict(shape(2, 256, 2, 128)).reason, "takes keys and values in int8 or int4, got bfloat16"),
            (verdict(codes("int4_row"), shape(2, 1, 8, 80)).reason, "head sizes of 64, 128 and 256, got 80"),
            (verdict(codes("int4_row", 8), many).reason, "takes 16 queries that share a key/value head of 128, got 24"),
            (verdict(codes("fp8_e4m3_row")).reason, "int8 or int4 with float32 scales, got fp8_e4m3_row"),
        ):
            assert words in reason
            assert "\n" not in reason
        k = codes("int4_row")
        run = jax.jit(lambda *x: decode_attention(*x, scale=1.0, implementation="mosaic_gpu_codes"))
        text = run.trace(q, k, k, lens).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    for wrong, words in (
        (dict(tokens=48), "tokens must be 32, 64 or 128, got 48"),
        (dict(stages=0), "stages must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Tiles(**wrong)
