"""The Hopper kernel that quantises rows, in Pallas' interpreter: XLA's bits, and its lines broken, each of which shows. That it
compiles without spills: `test_quantise_cuda_aot`."""

import inspect
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.formats import QUANTISE, get, mosaic_gpu, quantise

pytestmark = pytest.mark.quick
interpreted = pytest.mark.skipif(
    not gpu.MAY_INTERPRET, reason=f"JAX {jax.__version__} cannot interpret Mosaic GPU kernels; JAX 0.11 can"
)
K = 384
HOW = dict(axis=-1, key=None, stacked=0)


def rows(dtype) -> jax.Array:
    """[2, 7, K]: each row of another kind."""
    normal = np.random.default_rng(0).standard_normal((2, 7, K))
    normal[:, 1] = 0
    normal[:, 2] *= 1e-40
    # Between float32's smallest normal number and 127 times as much, where the scale stays at it.
    normal[:, 3] *= 2.0**-121
    normal[0, 4, 7], normal[1, 4, 380] = np.nan, -np.inf
    # The scale is 1, and every second quotient is a tie.
    normal[:, 5] = (np.arange(K) - 190) / 2
    normal[:, 5, 0] = 127
    normal[:, 6, 100] = -300
    return jnp.asarray(normal, dtype)


def xla(x):
    q = jax.jit(lambda x: quantise(x, "int8_row"))(x)
    return np.asarray(q.codes), np.asarray(q.scales)


@interpreted
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_the_bits_are_those_of_xla(dtype):
    x = rows(dtype)
    kernel = lambda x: quantise(x, "int8_row", implementation="mosaic_gpu", interpret=True)
    found = jax.jit(kernel)(x)
    codes, scales = xla(x)
    assert np.argwhere(np.isnan(scales)).tolist() == [[0, 4, 0], [1, 4, 0]]
    np.testing.assert_array_equal(found.codes, codes)
    np.testing.assert_array_equal(np.asarray(found.scales).view(np.uint32), scales.view(np.uint32))
    assert (found.shape, found.format.name) == (x.shape, "int8_row")
    again = jax.vmap(kernel)(x)
    np.testing.assert_array_equal(again.codes, codes)


@interpreted
@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("jnp.max(jnp.abs(values))", "jnp.max(values)"),
        ("np.float32(127)", "np.float32(128)"),
        ("* (np.float32(1) / np.float32(127)), TINY)", "* (np.float32(1) / np.float32(127)), 0)"),
        ("amax < jnp.inf", "amax <= jnp.inf"),
        ("jnp.where(quotients == quotients, quotients, jnp.float32(0))", "quotients"),
        ("jnp.round(quotients, 0)", "quotients"),
        ("jnp.round(quotients, 0)", "jnp.floor(quotients + 0.5)"),
        ("codes[row]", "codes[0]"),
        ("x.at[row]", "x.at[0]"),
        ("scales[row] = scale", "scales[row] = amax"),
    ],
)
def test_a_broken_line_shows(line, instead):
    source = inspect.getsource(mosaic_gpu)
    assert source.count(line) == 1
    mutant = types.ModuleType("mutant")
    exec(compile(source.replace(line, instead), "mutant", "exec"), mutant.__dict__)
    x = rows(jnp.float32)
    codes, scales = mutant.quantise_mosaic_gpu(x, interpret=True)
    expected = xla(x)
    equal = np.array_equal(codes, expected[0]) and np.array_equal(scales, expected[1], equal_nan=True)
    # NaN made an integer is defined nowhere: of this line only that it is there can be said.
    assert not equal or (instead == "quotients" and "where" in line)


@pytest.mark.parametrize(
    ("fmt", "shape", "more", "words"),
    [
        ("int8_row", (4, 100), {}, "takes rows of multiples of 128 values, up to 16384, got 100"),
        ("int8_row", (4, 32768), {}, "up to 16384, got 32768"),
        ("int8_row", (256, 256), dict(axis=0), "along the last dimension, got axis -2"),
        ("int8_row", (4, 256), dict(key=0), "rounds to the nearest, got a key"),
        ("mxint8", (4, 256), {}, "symmetric int8 with a float32 scale a row, got mxint8"),
        ("int8_tensor", (4, 256), {}, "symmetric int8 with a float32 scale a row, got int8_tensor"),
        ("int8_row", (4, 256), {}, "runs on NVIDIA GPUs, and here are CPUs only; use .*=.xla."),
    ],
)
def test_what_it_cannot_do_is_told(fmt, shape, more, words):
    if "key" in more:
        more = dict(key=jax.random.key(0))
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda x: quantise(x, fmt, **more, implementation="mosaic_gpu"), jnp.zeros(shape))


def test_it_is_chosen_for_many_long_rows_on_a_hopper_gpu():
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        said = lambda *shape: QUANTISE.explain(jax.ShapeDtypeStruct(shape, jnp.bfloat16), fmt=get("int8_row"), **HOW)
        assert said(2, 2048, 4096)[0].chosen == ("cuda",)
        assert said(16, 4096)[0].reason.startswith("has been seen to be faster than XLA for 64 rows of 640 values")
