"""Softmax reads of several queries over sources: values and gradients beside the formula in float64, differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.models.residual.depth_reads import merge, products, reads, reads_back

N, B, T, D, R, EPSILON = 4, 2, 3, 16, 5, 1e-3


def formula(w, x, visible):
    """Eq. 2 to 4 of Attention Residuals, whole."""
    normed = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)
    logits = jnp.where(visible[:, None, None, None], jnp.einsum("nbtd,rd->nbtr", normed, w), -jnp.inf)
    return jnp.einsum("nbtr,nbtd->btrd", jax.nn.softmax(logits, axis=0), x)


@jax.custom_vjp
def part(w, x, visible):
    """`reads` with its backward pass; of visible sources, where that is given."""
    return reads(w, x, visible, EPSILON)


def part_forward(w, x, visible):
    read = reads(w, x, visible, EPSILON)
    return read, (w, x, visible, read[1])


def part_backward(saved, g_read):
    w, x, visible, top = saved
    count = len(x) if visible is None else visible.sum()
    # Beside a gradient that is there already.
    before = jnp.asarray(np.random.default_rng(1).normal(size=x.shape), x.dtype)
    d_w, g = reads_back(w, x, count, top, g_read, before, EPSILON)
    added = (g.astype(jnp.float32) - before.astype(jnp.float32)).astype(x.dtype)
    return d_w, added, None


part.defvjp(part_forward, part_backward)


def read(w, x, visible):
    out, top, total = part(w, x, visible)
    return out.astype(total.dtype) / total[..., None], top


@pytest.mark.parametrize("last", [0, 2, N - 1])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 3e-6), ("bfloat16", 2e-2)])
def test_values_and_gradients(last, dtype, limit):
    random = np.random.default_rng(last)
    x = jnp.asarray(random.normal(size=(N, B, T, D)), dtype)
    w = jnp.asarray(random.normal(size=(R, D)), jnp.float32)
    toward = random.normal(size=(B, T, R, D))
    visible = np.arange(N) <= last
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(a, np.float64)) for a in (w, x)]
        expected, pull = jax.vjp(lambda w, x: formula(w, x, jnp.asarray(visible)), *exact)
        wanted = [np.asarray(a) for a in (expected, *pull(jnp.asarray(toward)))]
    (found, _), pull = jax.vjp(lambda w, x: read(w, x, jnp.asarray(visible)), w, x)
    got = [found, *pull((jnp.asarray(toward, jnp.float32), jnp.zeros((B, T, R), jnp.float32)))]
    for a, b in zip(got, wanted, strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= limit * max(np.linalg.norm(b), np.linalg.norm(toward))
    assert not np.asarray(got[2], np.float64)[last + 1 :].any()


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize(("dtype", "limit"), [("float32", 3e-6), ("bfloat16", 2e-2)])
def test_a_part_and_one_source_more_are_the_whole(there, dtype, limit):
    """Values, and the gradients of query, sources and the source merged last, beside the formula over all of them."""
    random = np.random.default_rng(7)
    x = jnp.asarray(random.normal(size=(N, B, T, D)), dtype)
    rest = jnp.asarray(3 * random.normal(size=(B, T, D)), dtype)
    w = jnp.asarray(random.normal(size=(1, D)), jnp.float32)
    toward = random.normal(size=(B, T, D))
    visible = jnp.asarray([True] * N + [there])

    def parted(w, x, rest):
        return merge(w[0], tuple(a[:, :, 0] for a in part(w, x, None)), rest, jnp.asarray(there), EPSILON)

    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(a, np.float64)) for a in (w, x, rest)]
        whole = lambda w, x, rest: formula(w, jnp.concatenate([x, rest[None]]), visible)[:, :, 0]
        expected, pull = jax.vjp(whole, *exact)
        wanted = [np.asarray(a) for a in (expected, *pull(jnp.asarray(toward)))]
    found, pull = jax.vjp(parted, w, x, rest)
    got = [found, *pull(jnp.asarray(toward, dtype))]
    for a, b in zip(got, wanted, strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= limit * max(np.linalg.norm(b), np.linalg.norm(toward))
    assert there or not np.asarray(got[3], np.float64).any()


def test_a_query_is_not_rounded_to_the_sources_format():
    """Sixteen bits of it count, where a bfloat16 has eight."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(N, B, T, D)), jnp.bfloat16)
    w = random.normal(size=(R, D)).astype(np.float32)
    exact = np.einsum("nbtd,rd->nbtr", np.asarray(x, np.float64), w.astype(np.float64))
    found = jax.jit(products)(x, w)
    assert np.linalg.norm(found - exact) < 2e-5 * np.linalg.norm(exact)
