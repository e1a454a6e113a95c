"""Merging partial results against attention over all keys at once, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jaxpar.pallas_kernels.attention import MaskSpec, attention_reference
from jaxpar.parallel.sequence.merge import empty, merge

pytestmark = pytest.mark.quick


def parts(count, S=64, size=1.0, seed=0):
    """Partial results over `count` parts of the keys in float32, and the whole in float64."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((1, n, 2, 8)) for n in (8, S, S))
    mask = MaskSpec(causal=False)
    attend = jax.jit(lambda q, k, v: attention_reference(q, k, v, mask=mask, scale=size))
    with jax.enable_x64(True):
        whole = [np.asarray(x) for x in attend(jnp.asarray(q), jnp.asarray(k), jnp.asarray(v))]
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    cut = np.split(np.arange(S), count)
    return [attend(q, k[:, at], v[:, at]) for at in cut], whole


@jax.jit
def merged(found):
    state = empty(found[0][0])
    for part in found:
        state = merge(state, part)
    return state


@pytest.mark.parametrize("size", [0.3, 1e4])
def test_error_does_not_grow_with_the_number_of_parts(size):
    """Logits of 1e4 too: float32 then holds the log-sum-exp to 1e-3 at best, and nothing overflows."""
    error = {}
    for count in (1, 2, 16):
        found, (out, lse) = parts(count, size=size)
        state = merged(found)
        np.testing.assert_allclose(state[1], lse, rtol=1e-6)
        error[count] = np.abs(state[0] - out).max()
    assert error[1] < 3e-6 if size < 1 else error[1] < 0.2
    assert error[16] <= 2 * max(error[1], error[2]) + 1e-7


def test_rows_without_keys():
    found, _ = parts(2)
    nothing = empty(found[0][0])
    for pair in ((found[0], nothing), (nothing, found[0])):
        for a, b in zip(merge(*pair), found[0], strict=True):
            np.testing.assert_array_equal(a, b)
    out, lse = merge(nothing, nothing)
    assert (out == 0).all()
    assert (lse == -jnp.inf).all()
    gradients = jax.jit(jax.grad(lambda a, b: merge(a, b)[0].sum(), argnums=(0, 1)))(nothing, nothing)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_differentiable_and_symmetric():
    a, b = parts(2)[0]
    for x, y in zip(merge(a, b), merge(b, a), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    total = jax.jit(lambda a, b: (merge(a, b)[0] ** 2).sum() + merge(a, b)[1].sum())
    with jax.enable_x64(True):
        up = lambda part: tuple(jnp.asarray(np.asarray(x), jnp.float64) for x in part)
        check_grads(total, (up(a), up(b)), order=1, modes=["rev"])


def test_bfloat16_parts_are_merged_in_float32():
    found, _ = parts(4)
    state = merge(*[(out.astype(jnp.bfloat16), lse) for out, lse in found[:2]])
    assert state[0].dtype == jnp.float32
