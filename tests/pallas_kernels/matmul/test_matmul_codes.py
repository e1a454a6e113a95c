"""The Hopper kernel for few rows of x whose warps widen codes for themselves, in JAX's Mosaic GPU interpreter (from JAX 0.11 on):
against float64, without races, and lines of it broken. Its programs are those that are inlined on a chip (`lanes`). How it
compiles: `test_matmul_codes_cuda_aot`."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.dispatch import explain
from jaxpar.pallas_kernels.formats.quantised import quantise
from jaxpar.pallas_kernels.matmul import (
    PRODUCT,
    gpu_codes,
    gpu_codes_program,
    mosaic_gpu_codes,
    product_reference,
    quant_matmul,
)
from tests.pallas_kernels.test_attention_mosaic_gpu import H200
from tests.pallas_kernels.test_attention_mutants import load

pytestmark = pytest.mark.quick
interpreted = pytest.mark.skipif(
    not gpu.MAY_INTERPRET, reason=f"JAX interprets Mosaic GPU kernels from 0.11 on, this is {jax.__version__}"
)
AXES = (-1, -2)
Tiles = gpu_codes.CodeTiles
CASES = {
    # Rows, K, N, format, tiles: clusters as many as blocks are allowed, and steps that K does not fill.
    "one row": (1, 1024, 128, "int4_g128", Tiles(64, 2, 4)),
    "five rows, a last step of a quarter, more stages than steps": (5, 640, 128, "int4_g128", Tiles(64, 3, 16)),
    "sixteen rows, 8 bits": (16, 512, 128, "int8_g128", Tiles(64, 1, 2)),
    "scales of columns": (3, 896, 128, "int8_row", Tiles(64, 2, 16)),
    "nine rows, 4 bits with scales of columns": (9, 1152, 128, "int4_row", Tiles(64, 2, 4)),
    "groups that are no part of a step": (2, 1152, 128, "int4_g384", Tiles(64, 2, 4)),
    "eight blocks, fewer steps for some": (8, 5504, 128, "int4_g128", Tiles(64, 1, 16)),
    "nine rows, 8 bits, four blocks": (9, 1152, 128, "int8_row", Tiles(64, 2, 8)),
    "groups of several steps, wide blocks": (4, 2048, 256, "int8_g512", Tiles(128, 2, 8)),
}


def operands(name):
    rows, K, N, form, _ = CASES[name]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((rows, K)) * np.exp(rng.standard_normal((rows, 1))), jnp.bfloat16)
    w = quantise(jnp.asarray(rng.standard_normal((K, N)) * np.exp(rng.standard_normal((1, N))), jnp.float32), form, 0)
    return x, w, product_reference(x, w, AXES)


def errors(found, exact) -> tuple[float, float]:
    """Of all, and of the worst row."""
    found = np.asarray(found, np.float64)
    rows = np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact)), float(np.max(np.nan_to_num(rows, nan=np.inf)))


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_against_float64_and_without_races(name):
    """Products of bfloat16 with codes are exact, sums float32's: what is left is the result's rounding."""
    x, w, exact = operands(name)
    careful = plgpu.InterpretGPUParams(detect_races=True)
    found = mosaic_gpu_codes.product_mosaic_gpu_codes(
        x, w, AXES, jnp.bfloat16, interpret=careful, tiles=CASES[name][-1]
    )
    assert (found.shape, found.dtype) == (exact.shape, jnp.bfloat16)
    assert max(errors(found, exact)) < 2.0**-8 / np.sqrt(3) * 1.1
    right = jnp.asarray(exact, jnp.bfloat16)
    # A sum of float32 may fall on the other side of where bfloat16 rounds.
    assert np.mean(np.asarray(found) == np.asarray(right)) > 0.99


MUTANTS = (
    (gpu_codes, "(split + n * s.splits) * s.step\n", "n * s.step\n"),
    (gpu_codes, "s.steps - split + s.splits - 1", "s.steps - split"),
    (gpu_codes, "pl.ds(lax.div(k * s.step, s.group), s.groups)", "pl.ds(0, s.groups)"),
    (gpu_codes, "pl.ds(column * s.width, s.width)", "pl.ds(0, s.width)"),
    (gpu_codes, "(column * s.width + split * s.share)", "(column * s.width)"),
    (gpu_codes_program, "first + s.step * s.splits)", "first + s.step)"),
    (gpu_codes_program, "(first + at.warp * s.depth) // s.group - first // s.group", "at.warp * 0"),
    (gpu_codes_program, "machine.where(k < s.inputs, k, 0)", "machine.where(k < s.inputs, 0, 0)"),
    (gpu_codes_program, "0x5410), machine.picked(a, b, 0x7632)", "0x7632), machine.picked(a, b, 0x5410)"),
    (gpu_codes_program, "(pairs[0], pairs[2], pairs[1], pairs[3])", "(pairs[0], pairs[1], pairs[2], pairs[3])"),
    (gpu_codes_program, "at.group * 2 + TILE * tile\n        here", "at.group * 2\n        here"),
    (gpu_codes_program, "scale[i // 2]", "scale[0]"),
    (gpu_codes_program, "scale[i // 2], total[i])", "scale[i // 2], one[i] * 0.0)"),
    (gpu_codes_program, "[four[e], four[2 + e]]", "[four[2 + e], four[e]]"),
    (gpu_codes_program, "column // s.share, place", "column // s.share * 0, place"),
    (gpu_codes_program, "for worker in range(s.workers)", "for worker in range(s.workers - 1)"),
    (gpu_codes_program, "at.group + COLUMNS * n\n", "at.group\n"),
    (gpu_codes_program, "index < s.there * half", "index < half"),
)
BROKEN_CASES = ("groups that are no part of a step", "nine rows, 8 bits, four blocks")


def right(calls) -> bool:
    for name in BROKEN_CASES:
        x, w, exact = operands(name)
        found = calls.product_mosaic_gpu_codes(x, w, AXES, jnp.bfloat16, interpret=True, tiles=CASES[name][-1])
        if not max(errors(found, exact)) < 4e-3:
            return False
    return True


@interpreted
def test_the_unbroken_kernel_is_right():
    assert right(mosaic_gpu_codes)


@interpreted
@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_mutants_are_killed(number, monkeypatch):
    module, old, new = MUTANTS[number]
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, f"{module.__name__} has {old!r} {source.count(old)} times"
    made = load(module, source.replace(old, new), monkeypatch)
    frame = made if module is gpu_codes else load(gpu_codes, Path(gpu_codes.__file__).read_text(), monkeypatch)
    if module is gpu_codes_program:
        frame.program = made
    calls = load(mosaic_gpu_codes, Path(mosaic_gpu_codes.__file__).read_text(), monkeypatch)
    calls.gpu_codes = frame
    assert not right(calls), f"{old!r} -> {new!r} makes no difference"


@interpreted
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("plgpu.barrier_wait(x.ready.at[warpgroup * s.stages + slot])", "pass"),
        ("plgpu.barrier_wait(x.all_here)", "pass"),
        ("        plgpu.commit_smem()\n        fetch(n + s.stages, slot)", "        fetch(n + s.stages, slot)"),
    ],
)
def test_what_is_read_too_early_or_overwritten_is_a_race(old, new, monkeypatch):
    source = Path(gpu_codes.__file__).read_text()
    assert source.count(old) == 1
    calls = load(mosaic_gpu_codes, Path(mosaic_gpu_codes.__file__).read_text(), monkeypatch)
    calls.gpu_codes = load(gpu_codes, source.replace(old, new), monkeypatch)
    name = "eight blocks, fewer steps for some"
    x, w, _ = operands(name)
    careful = plgpu.InterpretGPUParams(detect_races=True)
    try:
        with pytest.raises(Exception, match=r"RACE DETECTED|no threads observed"):
            jax.block_until_ready(
                calls.product_mosaic_gpu_codes(x, w, AXES, jnp.bfloat16, interpret=careful, tiles=CASES[name][-1])
            )
    finally:
        gpu.reset_interpreter()


@interpreted
def test_the_public_function_runs_it_and_nan_comes_out():
    x, w, exact = operands("five rows, a last step of a quarter, more stages than steps")
    run = jax.jit(lambda x: quant_matmul(x, w, implementation="mosaic_gpu_codes", interpret=True))
    assert max(errors(run(x), exact)) < 4e-3
    found = np.asarray(run(x.at[2, 639].set(jnp.nan)), np.float32)
    assert np.isnan(found[2]).all()
    assert np.isfinite(np.delete(found, 2, 0)).all()


def test_clusters_divide_steps_and_leave_blocks_what_is_wanted():
    for steps, columns, blocks in ((8, 224, 528), (28, 64, 528), (2, 32, 528), (1, 2, 528), (8, 600, 528)):
        found = gpu_codes.splits_of(steps, columns, blocks)
        assert found in (1, 2, 4, 8)
        assert found <= steps
        assert found == 1 or found * columns <= blocks
        assert found == gpu_codes.SPLITS or 2 * found > steps or 2 * found * columns > blocks


def test_who_gets_the_kernel():
    """By its name alone; what it cannot do is one sentence."""
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16)
    coded = lambda K, form: jax.eval_shape(lambda: quantise(jnp.zeros((K, 4096)), form, 0))
    with jax.sharding.use_abstract_mesh(H200):
        verdict = lambda a, b: {v.name: v for v in explain(PRODUCT, a, b, axes=AXES, dtype=jnp.bfloat16)}[
            "mosaic_gpu_codes"
        ]
        found = verdict(shape(1, 4096), coded(4096, "int4_g128"))
        assert (found.chosen, found.reason) == ((), "has not been measured on a chip, so that only its name chooses it")
        for a, b, words in (
            (shape(17, 4096), coded(4096, "int4_g128"), "takes up to 16 rows of x, got 17"),
            (shape(1, 384), coded(384, "int4_g128"), "takes K of at least 512 with 4 bits, got 384"),
            (shape(1, 512), coded(512, "mxfp4"), "w in int4 or int8 with x in bfloat16, got mxfp4"),
        ):
            assert words in verdict(a, b).reason
        run = jax.jit(lambda x, w: quant_matmul(x, w, implementation="mosaic_gpu_codes"))
        given = shape(1, 4096), coded(4096, "int4_g128")
        text = run.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    with pytest.raises(ValueError, match="CodeTiles needs a stage and a block at least, got 0 and 528"):
        Tiles(stages=0)
    with pytest.raises(ValueError, match=r"CodeTiles\.columns must be 64 or 128, got 96"):
        Tiles(96)
