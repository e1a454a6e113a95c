"""The chunked cross-entropy: against a dense float64 one, and what it never holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.models.context import Ops, matmul
from jaxpar.models.loss import cross_entropy

B, T, D, V = 2, 13, 8, 50


def inputs(dtype=np.float64):
    draw = np.random.default_rng(0)
    x, w = draw.standard_normal((B, T, D)).astype(dtype), draw.standard_normal((V, D)).astype(dtype)
    targets = draw.integers(0, V, (B, T)).astype(np.int32)
    weights = (draw.random((B, T)) * (draw.random((B, T)) > 0.3)).astype(dtype)
    return x, w, targets, weights


def dense(x, w, targets, weights, cap=None):
    logits = x @ w.T
    logits = logits if cap is None else cap * jnp.tanh(logits / cap)
    logp = jax.nn.log_softmax(logits.astype(jnp.promote_types(x.dtype, jnp.float32)))
    return -(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weights).sum()


@pytest.mark.quick
@pytest.mark.parametrize("chunk", [1, 4, 5, 13, 99])
@pytest.mark.parametrize("cap", [None, 3.0])
def test_value_and_gradients_against_float64(chunk, cap):
    with jax.enable_x64(True):
        x, w, targets, weights = inputs()
        ours = lambda x, w, weights: 3.0 * cross_entropy(x, w, targets, weights, chunk=chunk, cap=cap)[0]
        theirs = lambda x, w, weights: 3.0 * dense(x, w, targets, weights, cap)
        found = jax.value_and_grad(ours, argnums=(0, 1, 2))(x, w, weights)
        expected = jax.value_and_grad(theirs, argnums=(0, 1, 2))(x, w, weights)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), found, expected)


@pytest.mark.parametrize("chunk", [4, 99])
def test_bfloat16_operands_under_jit(chunk):
    """Compiled, because backends differ in what products of bfloat16 they have; against float64 of the same numbers."""
    with jax.enable_x64(True):
        x, w, targets, weights = inputs()
        half = jnp.asarray(x, jnp.bfloat16), jnp.asarray(w, jnp.bfloat16).astype(jnp.float32)
        ours = lambda x, w: cross_entropy(x, w, targets, weights.astype(np.float32), chunk=chunk)[0]
        found = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(*half)
        theirs = lambda x, w: dense(x, w, targets, weights)
        expected = jax.value_and_grad(theirs, argnums=(0, 1))(*(h.astype(jnp.float64) for h in half))
        assert found[1][1].dtype == jnp.float32, "parameters are float32, and so are their gradients"
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert np.linalg.norm(np.asarray(a, np.float64) - b) < 1e-2 * np.linalg.norm(b)


def test_another_matmul_is_differentiated_as_it_is():
    """A quantised product, say: the loss must follow the function that it was given."""
    x, w, targets, weights = inputs(np.float32)
    doubled = Ops(matmul=lambda x, w, contract=1: 2.0 * matmul(x, w, contract))
    ours = lambda x, w: cross_entropy(x, w, targets, weights, chunk=4, ops=doubled)[0]
    theirs = lambda x, w: dense(2.0 * x, w, targets, weights)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
        jax.value_and_grad(ours, argnums=(0, 1))(x, w),
        jax.value_and_grad(theirs, argnums=(0, 1))(x, w),
    )


def shapes(jaxpr):
    """The shapes of every value in a jaxpr, and in those inside it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for param in eqn.params.values():
            for inner in param if isinstance(param, tuple | list) else (param,):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from shapes(getattr(inner, "jaxpr", inner))


@pytest.mark.quick
@pytest.mark.parametrize("differentiate", [False, True])
def test_the_logits_of_all_tokens_never_exist(differentiate):
    x, w, targets, weights = inputs(np.float32)
    f = lambda x, w: cross_entropy(x, w, targets, weights, chunk=4)[0]
    f = jax.value_and_grad(f, argnums=(0, 1)) if differentiate else f
    largest = lambda f: max((np.prod(s) for s in shapes(jax.make_jaxpr(f)(x, w).jaxpr) if V in s), default=0)
    # Chunks of 4 of 13 tokens: the weights' gradient [V, D] is the largest thing with a vocabulary.
    assert largest(f) <= max(B * 4 * V, V * D)
    whole = lambda x, w: dense(x, w, targets, weights)
    assert largest(whole) >= B * T * V, "the measure must see the logits where they are"


def test_memory_of_the_compiled_gradient_does_not_grow_with_the_logits():
    draw = np.random.default_rng(0)
    x, w = draw.standard_normal((2, 256, 16)).astype(np.float32), draw.standard_normal((2048, 16)).astype(np.float32)
    targets, weights = np.zeros((2, 256), np.int32), np.ones((2, 256), np.float32)

    def temporary(chunk):
        f = jax.jit(jax.grad(lambda x, w: cross_entropy(x, w, targets, weights, chunk=chunk)[0], argnums=(0, 1)))
        return f.lower(x, w).compile().memory_analysis().temp_size_in_bytes

    logits = 2 * 256 * 2048 * 4
    assert temporary(16) < logits < temporary(256)
