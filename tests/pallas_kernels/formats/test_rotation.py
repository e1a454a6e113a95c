"""Hadamard rotation: the matrix is Sylvester's, products stay, and what it does to formats is what the paper found."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxpar.pallas_kernels import formats

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("n", [1, 2, 16, 32])
def test_the_matrix_is_scipys(n):
    matrix = formats.rotate(jnp.eye(n, dtype=jnp.float32))
    expected = scipy.linalg.hadamard(n) / np.sqrt(n)
    # 1/sqrt(n) is exact for powers of 4.
    np.testing.assert_allclose(matrix, expected, rtol=0 if n in (1, 16) else 1e-7)
    np.testing.assert_allclose(np.asarray(matrix, np.float64) @ np.asarray(matrix, np.float64).T, np.eye(n), atol=1e-6)


@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("signed", [False, True])
def test_blocks_inverse_and_norms(axis, signed):
    """Each block is multiplied by itself; the inverse gives x back; norms of blocks stay."""
    x = np.random.default_rng(0).standard_normal((3, 48, 48)).astype(np.float32)
    line = formats.signs(jax.random.key(1), 48) if signed else None
    y = np.asarray(formats.rotate(x, 16, axis, signs=line))
    back = formats.rotate(y, 16, axis, signs=line, inverse=True)
    np.testing.assert_allclose(back, x, atol=2e-6)
    rows = np.moveaxis(x, axis, -1).astype(np.float64) * (1 if line is None else np.asarray(line))
    expected = rows.reshape(3, 48, 3, 16) @ scipy.linalg.hadamard(16) / 4
    np.testing.assert_allclose(np.moveaxis(y, axis, -1).reshape(expected.shape), expected, atol=2e-6)
    np.testing.assert_allclose(
        np.linalg.norm(expected, axis=-1), np.linalg.norm(rows.reshape(expected.shape), axis=-1), rtol=1e-12
    )
    if signed:
        assert set(np.unique(line)) == {-1.0, 1.0}
        assert not np.allclose(back, formats.rotate(y, 16, axis, signs=line))


def test_products_stay():
    draw = np.random.default_rng(0)
    x, w = draw.standard_normal((8, 64)).astype(np.float32), draw.standard_normal((64, 5)).astype(np.float32)
    line = formats.signs(jax.random.key(0), 64)
    product = np.asarray(formats.rotate(x, 32, signs=line), np.float64) @ np.asarray(
        formats.rotate(w, 32, 0, signs=line)
    )
    np.testing.assert_allclose(product, x.astype(np.float64) @ w, atol=2e-5)


def test_the_gradient_is_the_transpose():
    x, g = np.random.default_rng(0).standard_normal((2, 4, 32)).astype(np.float32)
    _, pull = jax.vjp(lambda a: formats.rotate(a, 8), x)
    np.testing.assert_allclose(pull(g)[0], formats.rotate(g, 8, inverse=True), atol=1e-6)
    assert formats.rotate(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_integers_gain_where_nvfp4_loses():
    """INT v.s. FP's finding, on channels with outliers: a lower crest factor helps integers, and NVFP4 had no need of it."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((256, 1024)).astype(np.float32)
    x[:, draw.choice(1024, 40, replace=False)] *= 20

    def qsnr(a, name):
        error = np.asarray(formats.dequantise(formats.quantise(a, name)), np.float64) - a
        return 10 * np.log10((a.astype(np.float64) ** 2).sum() / (error**2).sum())

    turned = np.asarray(formats.rotate(x, 16, signs=formats.signs(jax.random.key(0), 1024)))
    gain = {name: qsnr(turned, name) - qsnr(x, name) for name in ("nvint4", "nvfp4", "mxint8", "mxfp8")}
    assert gain["nvint4"] > 3
    assert gain["nvfp4"] < -1
    assert gain["mxint8"] > 5
    assert abs(gain["mxfp8"]) < 0.5
    assert qsnr(x, "nvfp4") > qsnr(x, "nvint4")
    assert qsnr(turned, "nvint4") > qsnr(turned, "nvfp4")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda x: formats.rotate(x), "rotate 640 values in blocks of 640: a block is a power of two that divides 640, so at most 128"),
        (lambda x: formats.rotate(x, 24), "blocks of 24"),
        (lambda x: formats.rotate(x, 256), "blocks of 256: .* at most 128"),
        (lambda x: formats.rotate(x, 16, 2), r"axis = 2, but the array has the shape \(2, 640\)"),
        (lambda x: formats.rotate(x.astype(np.int8), 16), "rotate needs floats, got int8"),
        (lambda x: formats.rotate(x, 16, signs=np.ones(16, np.float32)), "signs of the shape .16,. for an axis of 640"),
    ],
)  # fmt: skip
def test_what_is_refused(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call(np.ones((2, 640), np.float32))
