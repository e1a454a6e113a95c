"""The kernel that walks 4-bit and 8-bit blocks in Pallas' interpreter, and lines of it broken: every check sees it."""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.pallas_kernels.dispatch import explain
from jaxpar.pallas_kernels.formats import quantise
from jaxpar.pallas_kernels.formats.packing import unpack
from jaxpar.pallas_kernels.matmul import mixed_tpu
from jaxpar.pallas_kernels.matmul.mixed import MIXED, Mixed, inputs, mixed_matmul

pytestmark = pytest.mark.quick
M, K, N, BLOCK = 40, 512, 256, 128
EIGHT = (False, True, True, False)
SMALL = mixed_tpu.MatmulTiles(32, 128, 0)
"""Two blocks of rows, the last padded, and two of columns."""


def operands():
    """x, weights, and their product by NumPy: whole numbers in int64, block by block, scales in float64."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((M, K)), rng.standard_normal((K, N))
    x *= np.exp(rng.standard_normal((M, 1)))
    x[:, BLOCK : 3 * BLOCK] *= 10
    w *= np.exp(rng.standard_normal((K // BLOCK, N))).repeat(BLOCK, 0)
    mixed = Mixed(quantise(jnp.asarray(w, jnp.float32), f"int4_g{BLOCK}", 0), jnp.asarray(EIGHT))
    x = jnp.asarray(x, jnp.float32)
    exact = np.zeros((M, N))
    whole, scales = (np.asarray(part) for part in inputs(x, mixed.eight))
    codes = np.asarray(unpack(mixed.weights.codes, 4, -2)).astype(np.int64)
    # Two's complement of 4 bits.
    signed = np.where(codes > 7, codes - 16, codes)
    for n in range(len(EIGHT)):
        here = slice(n * BLOCK, (n + 1) * BLOCK)
        part = whole[:, here].astype(np.int64) @ signed[here]
        exact += part * scales[:, n, None].astype(np.float64) * np.asarray(mixed.weights.scales, np.float64)[n]
    return x, mixed, exact


def error(found, exact) -> float:
    found = np.asarray(found, np.float64)
    return float(np.nan_to_num(np.max(np.abs(found - exact)) / np.max(np.abs(exact)), nan=np.inf))


def run(module, x, mixed):
    whole, scales = inputs(x, mixed.eight)
    return module.mixed_mosaic_tpu(whole, scales, mixed.weights, mixed.eight, interpret=True, tiles=SMALL)


def test_both_kinds_of_blocks_are_multiplied_exactly():
    x, mixed, exact = operands()
    assert error(run(mixed_tpu, x, mixed), exact) < 3e-7
    ours = mixed_matmul(x, mixed, implementation="mosaic_tpu", interpret=True)
    np.testing.assert_allclose(np.asarray(ours), np.asarray(mixed_matmul(x, mixed)), rtol=1e-5, atol=1e-4)


BROKEN = [
    ("eight[k] != 0)(partial(add, jnp.int8", "eight[k] != 0)(partial(add, jnp.int4"),
    ("eight[k] == 0", "eight[k] == 2"),
    ("for shift in (28, 24)", "for shift in (24, 28)"),
    (">> 28", ">> 27"),
    (".swapaxes(2, 3)", ""),
    ("* scales_x[...]", ""),
    ("* scales_w[...]", ""),
    ("out[...] += whole", "out[...] = whole"),
    ("lambda m, n, k, eight: (k, m, 0)", "lambda m, n, k, eight: (k, 0, 0)"),
    ("lambda m, n, k, eight: (k, 0, n)", "lambda m, n, k, eight: (0, 0, n)"),
]


@pytest.mark.parametrize(("line", "instead"), BROKEN)
def test_a_broken_line_shows(line, instead):
    source = inspect.getsource(mixed_tpu)
    assert source.count(line) == 1
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(line, instead), "mutant", "exec"), mutant.__dict__)
    x, mixed, exact = operands()
    assert error(run(mutant, x, mixed), exact) > 1e-2


def test_only_its_name_chooses_it_and_what_it_cannot_do_is_told():
    x, mixed, _ = operands()
    arrays = *inputs(x, mixed.eight), mixed.weights, mixed.eight
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        verdicts = {one.name: one for one in explain(MIXED, *arrays)}
    assert verdicts["mosaic_tpu"].reason == "has not been measured on a chip, so that only its name chooses it"
    assert verdicts["xla"].chosen == ("tpu",)
    small = Mixed(quantise(jnp.ones((K, N)), "int4_g64", 0), jnp.zeros(8, bool))
    whole = Mixed(quantise(jnp.ones((K, N)), "int8_g128", 0), jnp.zeros(4, bool))
    for w, words in (
        (mixed, "runs on TPUs, and here are CPUs only; use implementation=.xla."),
        (small, "blocks of 128 to 1024 channels, multiples of 128, got 256 and 64"),
        (whole, "takes w in int4, got int8_g128"),
    ):
        with pytest.raises(ValueError, match=words):
            mixed_matmul(x, w, implementation="mosaic_tpu")
