"""The algebra of single operators, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.residual.attention_residuals import AttentionResiduals
from jaxpar.models.residual.deep_delta import DeepDelta, delta, direction
from jaxpar.models.residual.dense_former import DenseFormer
from jaxpar.models.residual.depth_window import DepthWindow
from jaxpar.models.residual.hyper_connections import HyperConnections
from jaxpar.models.residual.manifold import ManifoldHyperConnections, sinkhorn
from jaxpar.models.residual.plain import Plain
from jaxpar.models.residual.short_window import short_window
from jaxpar.models.spec import count

DRAW = np.random.default_rng(0)
CFG = ModelConfig(vocabulary=16, layers=4, width=16, heads=2, hidden=16, context=16, init_std=0.3)


def normal(*shape):
    return jnp.asarray(DRAW.standard_normal(shape), jnp.float32)


@pytest.mark.quick
def test_sinkhorn_makes_rows_and_columns_sum_to_one():
    logits = 3 * normal(5, 4, 4)
    for iterations, error in ((20, 5e-2), (200, 1e-5)):
        m = sinkhorn(logits, iterations)
        np.testing.assert_allclose(m.sum(-1), 1, atol=1e-6)
        np.testing.assert_allclose(m.sum(-2), 1, atol=error)
    np.testing.assert_allclose(sinkhorn(normal(3, 1, 1), 1), 1, atol=1e-7)
    # By hand: a/(a + b) = e^(1/2) of [[e, 1], [1, 1]].
    by_hand = sinkhorn(jnp.array([[1.0, 0.0], [0.0, 0.0]]), 50)
    np.testing.assert_allclose(jnp.diagonal(by_hand), np.exp(0.5) / (1 + np.exp(0.5)), atol=1e-6)
    # Streams in another order are mixed in that order.
    turn = np.array([2, 0, 3, 1])
    turned = sinkhorn(logits[:, turn][:, :, turn], 20)
    np.testing.assert_allclose(turned, sinkhorn(logits, 20)[:, turn][:, :, turn], atol=1e-6)


@pytest.mark.quick
def test_doubly_stochastic_mixes_keep_the_mean_of_the_streams():
    mixer = ManifoldHyperConnections(streams=4, iterations=200)
    cfg = CFG.replace(residual=mixer)
    params = jax.tree.map(lambda x: x[0], decoder.init(cfg, jax.random.key(0))["layers"]["residual"])
    params["attention"]["scales"] = jnp.full(3, 0.3)
    state, zero = normal(2, 3, 4, 16), jnp.zeros((2, 3, 16))
    _, told = mixer.read(cfg, params, state, 0, "attention")
    new = mixer.write(cfg, params, state, told, zero, 0, "attention")
    np.testing.assert_allclose(new.mean(2), state.mean(2), atol=1e-5)
    assert np.abs(new - state).max() > 0.1


@pytest.mark.quick
def test_the_delta_rule_erases_and_writes_along_one_direction():
    x, v = normal(2, 3, 4, 16), normal(2, 3, 4)
    k = direction(normal(2, 3, 16), 1e-5)
    along = lambda x: jnp.einsum("btd,btvd->btv", k, x)
    at = lambda beta, **how: delta(x, k, v, jnp.full((2, 3), beta), **how)
    np.testing.assert_array_equal(at(0.0), x)
    np.testing.assert_allclose(along(at(1.0)), v, atol=1e-5)
    for beta in (0.3, 1.7):
        np.testing.assert_allclose(along(at(beta)) - v, (1 - beta) * (along(x) - v), atol=1e-5)
        # What is orthogonal to k stays.
        apart = lambda x: x - along(x)[..., None] * k[:, :, None]
        np.testing.assert_allclose(apart(at(beta)), apart(x), atol=1e-5)
    mirrored = delta(x, k, 0 * v, jnp.full((2, 3), 2.0))
    np.testing.assert_allclose(jnp.linalg.norm(mirrored, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_allclose(along(at(1.0, erase=False)), along(x) + v, atol=1e-5)
    # A direction whose length is not far above epsilon is no unit vector.
    assert jnp.linalg.norm(direction(jnp.full((1, 1, 4), 1e-6), 1e-5)) < 0.25


def test_a_beta_of_zero_is_a_dead_start():
    """Documented, and why it is refused: branches have no gradient then."""
    cfg = CFG.replace(residual=DeepDelta(), layers=1)
    params = decoder.init(cfg, jax.random.key(0))
    tokens = jnp.arange(8)[None]

    @jax.jit
    def reach(bias):
        gated = jax.tree.map(lambda x: x, params)
        for site in ("attention", "feedforward"):
            gated["layers"]["residual"][site]["gate"]["bias"] = jnp.full(1, bias)
        grads = jax.grad(lambda p: decoder.loss(cfg, p, tokens, tokens).loss_sum)(gated)
        return jnp.linalg.norm(grads["layers"]["attention"]["out"]["kernel"])

    assert reach(-200.0) == 0
    assert reach(0.0) > 1e-2


def along(x_xxSxD, query, key, value, window):
    """The operator along the last dimension but one, of one document."""
    q, k, v = (x_xxSxD @ w for w in (query, key, value))
    front = [(0, 0)] * (q.ndim - 2) + [(window - 1, 0), (0, 0)]
    places = jnp.arange(-(window - 1), q.shape[-2], dtype=jnp.int32).reshape((1,) * (q.ndim - 2) + (-1,))
    there = jnp.where(places >= 0, 0, -1)
    return short_window(q, jnp.pad(k, front), jnp.pad(v, front), there[..., window - 1 :], there, window)


@pytest.mark.quick
def test_blocks_of_the_short_window_are_the_window_written_out():
    """Rows longer than a block, in documents: token by token in float64, and a poisoned document reaches no other."""
    window, S, D = 3, 75, 8
    q, k, v = normal(2, S, D), normal(2, window - 1 + S, D), normal(2, window - 1 + S, D)
    own = jnp.asarray(np.repeat([[0, 1, 2], [4, 4, 5]], 25, axis=1), jnp.int32)
    there = jnp.concatenate([jnp.array([[-1, 0], [4, 4]]), own], axis=1)
    found = short_window(q, k, v, own, there, window)
    (Q, K, V), (mine, of) = (np.asarray(x, np.float64) for x in (q, k, v)), (np.asarray(own), np.asarray(there))
    found = np.asarray(found)
    for b in range(2):
        for t in range(S):
            near = [j for j in range(t, t + window) if of[b, j] == mine[b, t]]
            weights = np.exp(K[b, near] @ Q[b, t] / np.sqrt(D))
            expected = weights @ V[b, near] / weights.sum()
            np.testing.assert_allclose(found[b, t], expected, rtol=1e-5, atol=1e-5)
    poison = jnp.where((there == 1)[..., None], 1e6, 1.0)
    again = short_window(q, k * poison, v * poison, own, there, window)
    np.testing.assert_array_equal(again[own != 1], found[own != 1])
    assert np.abs(again[own == 1] - found[own == 1]).min() > 0


def test_the_read_over_depth_is_short_window_attention_on_the_transposed_stack():
    """One operator over either dimension (residual-stream duality), and the sequence is the wrong one."""
    for window in (1, 2, 4):
        mixer = DepthWindow(window)
        cfg = CFG.replace(residual=mixer)
        params = {name: normal(16, 16) for name in ("query", "key", "value")}
        slots = normal(5, 2, 6, 16)
        x = slots / np.sqrt(np.mean(np.square(slots), -1, keepdims=True) + mixer.epsilon)
        whole = slots + jnp.moveaxis(along(jnp.moveaxis(x, 0, 2), **params, window=window), 2, 0)
        found = jnp.stack([mixer.mix(cfg, params, slots, layer)[0] for layer in range(4)])
        np.testing.assert_allclose(found, whole[:4], rtol=1e-4, atol=1e-4)
        traced, _ = jax.jit(mixer.mix, static_argnums=0)(cfg, params, slots, 2)
        np.testing.assert_allclose(traced, whole[2], rtol=1e-4, atol=1e-4)
        along_tokens = slots + along(x, **params, window=window)
        assert window == 1 or np.abs(along_tokens - whole).max() > 0.1
    np.testing.assert_allclose(along(x, **params, window=1), x @ params["value"], atol=1e-5)


@pytest.mark.quick
def test_parameters_and_bytes_on_the_wire_are_those_of_the_formulas():
    more = lambda mixer: count(decoder.spec(CFG.replace(residual=mixer))) - count(decoder.spec(CFG))
    L, D, x = CFG.layers, CFG.width, 2 * 8 * CFG.width * 4
    # The paper counts d (d + 3) / 2 weights; here every row is padded to the depth, and the first layer has one.
    assert more(DenseFormer()) == (L + 1) ** 2
    assert more(AttentionResiduals()) == (2 * L + 1) * 2 * D
    assert more(HyperConnections(streams=4)) == 2 * L * (D * 6 + 2 + 4 + 16 + 4)
    bytes_of = lambda mixer: mixer.wire_bytes(CFG.replace(residual=mixer), 2, 8)
    sent = [bytes_of(m) for m in (Plain(), DeepDelta(), DeepDelta(channels=4), HyperConnections(streams=3))]
    assert sent == [x, x, 4 * x, 3 * x]
    # All outputs and the embedding; N blocks of four and the embedding, and the sum so far.
    assert [bytes_of(m) for m in (DenseFormer(), AttentionResiduals(), AttentionResiduals(4))] == [5 * x, 9 * x, 4 * x]
