"""The TPU kernels of quantised products in Pallas' interpreter, and lines of them broken: every check sees it."""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.pallas_kernels.formats import get, quantise
from jaxpar.pallas_kernels.matmul import Operands, mosaic_tpu, product_reference, quant_matmul
from jaxpar.pallas_kernels.matmul.products import product

M, K, N = 40, 512, 256
SMALL = mosaic_tpu.MatmulTiles(32, 128, 256)
"""Two blocks along each dimension, the last rows padded."""


def operands(kind: str):
    """`(x, w, value of their product)`: W8A8, or 4-bit weights with x in float32."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((M, K)), rng.standard_normal((K, N))
    x[:, [5, 300]] *= 20
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    a = quantise(x, "int8_row") if kind == "w8a8" else x
    b = quantise(w, "int8_row" if kind == "w8a8" else "int4_g128", 0)
    return a, b, product_reference(a, b, (-1, -2))


def error(found, exact) -> float:
    found = np.asarray(found, np.float64)
    return float(np.nan_to_num(np.linalg.norm(found - exact) / np.linalg.norm(exact), nan=np.inf))


@pytest.mark.parametrize("kind", ["w8a8", "w4a16"])
def test_kernels_are_no_worse_than_xla(kind):
    a, b, exact = operands(kind)
    run = jax.jit(lambda a, b: mosaic_tpu.product_mosaic_tpu(a, b, jnp.float32, interpret=True, tiles=SMALL))
    first, theirs, again = run(a, b), product(a, b, (-1, -2), jnp.float32), run(a, b)
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again))
    if kind == "w8a8":
        np.testing.assert_array_equal(np.asarray(first), np.asarray(theirs))
    assert error(first, exact) < max(1.5 * error(theirs, exact), 3e-7)


BROKEN = [
    ("w8a8", "* scales_x[...]", ""),
    ("w8a8", "* scales_w[...]", ""),
    ("w8a8", "total[...] += jax.lax.dot(x[...], w[...]", "total[...] = jax.lax.dot(x[...], w[...]"),
    (
        "w8a8",
        "pl.BlockSpec((rows, sums), lambda m, n, k: (m, k))",
        "pl.BlockSpec((rows, sums), lambda m, n, k: (m, 0))",
    ),
    ("w8a8", "lambda m, n, k: (0, n)", "lambda m, n, k: (0, 0)"),
    ("w4a16", "(odd, 24)", "(odd, 28)"),
    ("w4a16", ">> 28", ">> 27"),
    ("w4a16", "(k, 0, n)", "(0, 0, n)"),
    ("w4a16", "[:, :, i]", "[:, :, 1 - i]"),
    ("w4a16", "scales[...][:, None, :]", "scales[...][:1, None, :]"),
]


@pytest.mark.parametrize(("kind", "line", "instead"), BROKEN)
def test_a_broken_line_shows(kind, line, instead):
    source = inspect.getsource(mosaic_tpu)
    assert source.count(line) == 1
    mutant = types.ModuleType("mutant")
    # Its dataclass looks its module up by name; the kernel's own tiles are all that this needs.
    mutant.__dict__["__name__"] = mosaic_tpu.__name__
    exec(compile(source.replace(line, instead), "mutant", "exec"), mutant.__dict__)
    a, b, exact = operands(kind)
    found = mutant.product_mosaic_tpu(a, b, jnp.float32, interpret=True, tiles=SMALL)
    assert error(found, exact) > 1e-3


def test_the_public_function_runs_them_and_differentiates():
    x, b, _ = operands("w4a16")
    run = lambda name, interpret: jax.value_and_grad(
        lambda x: jnp.sum(jnp.sin(quant_matmul(x, b, implementation=name, interpret=interpret) / 50))
    )(x)
    (y, dx), (y_xla, dx_xla) = run("mosaic_tpu", True), run("xla", False)
    np.testing.assert_allclose(float(y), float(y_xla), rtol=1e-4)
    assert error(dx, np.asarray(dx_xla, np.float64)) < 1e-5


@pytest.mark.quick
@pytest.mark.parametrize(
    ("inputs", "weights", "size", "words"),
    [
        (None, "int4_g128", 512, "runs on TPUs, and here are CPUs only; use implementation=.xla."),
        ("mxfp8", "mxfp8", 512, "x in the compute dtype or in int8 with w in int8, got mxfp8"),
        (None, "int8_row", 512, "takes w in int4, got int8_row"),
        ("int8_row", "int8_g128", 512, "int8 with a scale a row or tensor, got int8_row and int8_g128"),
        (None, "int4_g32", 480, "multiples of 128, got 480"),
        (None, "int4_row", 2048, "takes groups of 32 to 1024 values.*got int4_row with 2048"),
    ],
)
def test_what_kernels_cannot_multiply_is_told(inputs, weights, size, words):
    x, w = jnp.ones((4, size)), jnp.ones((size, 128))
    how = Operands(inputs and get(inputs), get(weights))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda x, w: quant_matmul(x, w, how, implementation="mosaic_tpu"), x, w)
