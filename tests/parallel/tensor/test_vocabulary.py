"""Embedding and cross-entropy of a vocabulary over devices, beside the whole ones; no logits of the whole vocabulary."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpar.models.context import Ops
from jaxpar.models.loss import cross_entropy
from jaxpar.parallel.tensor.by_hand import ByHand

B, T, D, V = 2, 16, 6, 40


def on(devices, t: int):
    return Mesh(np.asarray(devices[:t]), ("tensor",)), ByHand(t)


@pytest.mark.quick
@pytest.mark.parametrize("t", [2, 4])
def test_lookup_and_gradient(t, devices):
    mesh, hand = on(devices, t)
    rng = np.random.default_rng(0)
    tokens = (
        jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32).at[0, :4].set(jnp.asarray([0, V - 1, V // t, V // t - 1]))
    )
    table = jnp.asarray(rng.standard_normal((V, D)), jnp.float32)
    weights = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    run = jax.shard_map(hand.lookup, mesh=mesh, in_specs=(P("tensor"), P()), out_specs=P(None, "tensor"))
    np.testing.assert_array_equal(jax.jit(run)(table, tokens), table[tokens])
    score = lambda f: jax.jit(jax.grad(lambda table: jnp.sum(f(table, tokens) * weights)))
    np.testing.assert_allclose(score(run)(table), score(lambda t, i: t[i])(table), rtol=1e-6, atol=1e-6)


def losses(devices, t: int, chunk: int, cap):
    """Sums of loss and weights as a function of whole arrays; each device returns its own tokens' share."""
    mesh, hand = on(devices, t)

    def local(x, w, targets, weights):
        sums = cross_entropy(x, w, targets, weights, chunk=chunk, cap=cap, ops=Ops(shards=hand))
        return jax.lax.psum(sums, "tensor")

    tokens = P(None, "tensor")
    return jax.shard_map(local, mesh=mesh, in_specs=(tokens, P("tensor"), tokens, tokens), out_specs=P())


@pytest.mark.quick
@pytest.mark.parametrize(("t", "chunk", "cap"), [(2, 3, None), (4, 4, 3.0), (4, 2, None)])
def test_cross_entropy_and_gradients(t, chunk, cap, devices):
    """Chunks that divide a device's tokens and that do not; in float64 to rounding."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        x, w = jnp.asarray(rng.standard_normal((B, T, D))), jnp.asarray(rng.standard_normal((V, D)))
        targets = jnp.asarray(rng.integers(0, V, (B, T)), jnp.int32)
        weights = jnp.asarray(rng.uniform(0.0, 2.0, (B, T)))
        # Both sums, with factors, so that the gradient of each is in it.
        score = lambda f: jax.jit(
            jax.value_and_grad(lambda x, w, b: 1.5 * (s := f(x, w, targets, b))[0] + 0.5 * s[1], argnums=(0, 1, 2))
        )
        plain = lambda *args: cross_entropy(*args, chunk=T, cap=cap)
        expected = score(plain)(x, w, weights)
        found = score(losses(devices, t, chunk, cap))(x, w, weights)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-11, atol=1e-11)


@pytest.mark.quick
def test_no_device_has_logits_of_the_whole_vocabulary(devices):
    t, chunk = 4, 2
    args = (jnp.ones((B, T, D)), jnp.ones((V, D)), jnp.zeros((B, T), jnp.int32), jnp.ones((B, T)))
    step = jax.jit(jax.value_and_grad(lambda x, w: losses(devices, t, chunk, None)(x, w, *args[2:])[0], argnums=(0, 1)))
    text = step.lower(*args[:2]).compile().as_text()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)}
    # A chunk of every device's tokens, for a quarter of the ids.
    assert any(shape[-1] == V // t and np.prod(shape) == B * t * chunk * V // t for shape in shapes)
    assert not any(V in shape for shape in shapes), [shape for shape in shapes if V in shape]
