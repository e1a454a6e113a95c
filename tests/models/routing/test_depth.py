"""Mixture of depths against straight-line NumPy: who is picked, what they see, who is masked, and what the predictor learns."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import flops
from jaxpar.executed import executed_flops
from jaxpar.generation import continued
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.feedforward.duo import Duo
from jaxpar.models.positions import NoPositions, Rope
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.routing.depth import MixtureOfDepths, score
from jaxpar.models.routing.skip import FFNSkip
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.tensor.config import TensorConfig
from jaxpar.program import checked
from tests.models.residual.straight import Decoder, rms, sigmoid, softmax

CFG = ModelConfig(
    vocabulary=32, layers=4, width=16, heads=2, hidden=24, context=64, positions=NoPositions(), init_std=0.3,
    depth=MixtureOfDepths(capacity=0.4, every=2, predictor=8),
)  # fmt: skip
PARAMS = jax.jit(decoder.init, static_argnums=0)(CFG, jax.random.key(0))
EXACT = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 32)
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]


def gelu(x):
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def straight(tokens, training: bool):
    """Logits, who ran in the routed layers, and the predictors' cross-entropies."""
    m, own = Decoder(CFG, EXACT), EXACT["layers"]["depth"]
    x = EXACT["embedding"]["tokens"][tokens]
    ran, losses = [], []
    for layer in range(CFG.layers):
        r = x @ own["router"][layer]
        z = gelu(x @ own["up"][layer]) @ own["down"][layer] + own["bias"][layer]
        if layer % 2 == 0:
            go, gate = np.ones(r.shape, bool), np.ones(r.shape)
        elif training:
            go, gate = r >= np.sort(r, -1)[:, -int(np.ceil(0.4 * r.shape[1])), None], sigmoid(r)
            ran.append(go)
            losses.append((np.log1p(np.exp(z)) - go * z).sum())
        else:
            go, gate = z > 0, sigmoid(r)
            ran.append(go)
        p = m.layers["attention"]
        n = rms(x, CFG.norm.epsilon) * p["norm"]["scale"][layer]
        q, k, v = (np.einsum("btd,dhk->bhtk", n, p[name]["kernel"][layer]) for name in ("query", "key", "value"))
        seen = np.tril(np.ones((x.shape[1],) * 2, bool))[None, None] & go[:, None, None, :]
        s = np.where(seen, np.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(q.shape[-1]), -1e30)
        h = x + np.einsum("bhts,bhsk,hkd->btd", softmax(s), v, p["out"]["kernel"][layer])
        h = h + m.feedforward(layer, h)
        x = np.where(go[..., None], x + gate[..., None] * (h - x), x)
    x = rms(x, CFG.norm.epsilon) * EXACT["head"]["norm"]["scale"]
    return x @ EXACT["embedding"]["tokens"].T, ran, losses


def context():
    return Context(key=jax.random.key(0), sample_ids=jnp.arange(2))


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(cfg, params):
    run = lambda params: decoder.loss(cfg, params, INPUTS, TARGETS, None, context()).loss_sum
    return jax.value_and_grad(run)(params)


def test_training_runs_the_highest_of_each_row_among_themselves():
    expected, ran, _ = straight(INPUTS, training=True)
    assert {int(go.sum()) for go in ran} == {2 * 4}
    found = jax.jit(lambda p: decoder.apply(CFG, p, INPUTS, context()).logits)(PARAMS)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    loss, _ = loss_and_gradients(CFG, PARAMS)
    right = np.take_along_axis(expected, np.asarray(TARGETS)[..., None], -1)[..., 0]
    by_hand = (np.log(np.exp(expected).sum(-1)) - right).sum()
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)


def test_the_predictor_learns_its_cross_entropy_and_moves_nothing_else():
    """Its gradient by central differences of the cross-entropy; the loss that is reported does not have it."""
    _, grads = loss_and_gradients(CFG, PARAMS)
    for name in ("bias", "down"):
        leaf, found = EXACT["layers"]["depth"][name], np.asarray(grads["layers"]["depth"][name])
        for layer in range(4):
            at = (layer,) if name == "bias" else (layer, 3)
            sums = []
            for step in (1e-5, -1e-5):
                leaf[at] += step
                sums.append(sum(straight(INPUTS, training=True)[2]))
                leaf[at] -= step
            assert found[at] == pytest.approx((sums[0] - sums[1]) / 2e-5, abs=1e-3)
    assert not found[[0, 2]].any(), "layers that are not routed have nothing to learn there"
    other = {**PARAMS["layers"]["depth"], "down": 3 * PARAMS["layers"]["depth"]["down"]}
    changed = loss_and_gradients(CFG, {**PARAMS, "layers": {**PARAMS["layers"], "depth": other}})[1]
    for name in ("attention", "feedforward"):
        for a, b in zip(*(jax.tree.leaves(g["layers"][name]) for g in (grads, changed)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    np.testing.assert_allclose(changed["layers"]["depth"]["router"], grads["layers"]["depth"]["router"], atol=1e-5)


def test_outside_of_training_the_predictor_picks_and_a_cache_has_masked_holes():
    expected, ran, _ = straight(INPUTS, training=False)
    assert 0 < np.mean(ran) < 1
    whole = jax.jit(lambda p, t: decoder.apply(CFG, p, t).logits)
    np.testing.assert_allclose(whole(PARAMS, INPUTS), expected, atol=1e-4)
    # Nothing of the future: other tokens behind place 4 change nothing before it.
    other = INPUTS.at[:, 5:].set((INPUTS[:, 5:] + 7) % 32)
    np.testing.assert_allclose(whole(PARAMS, other)[:, :5], expected[:, :5], atol=1e-4)
    cache = kv.empty(CFG, 2, 8)
    step = jax.jit(partial(decoder.forward, CFG))
    for t in range(8):
        logits, cache = step(PARAMS, INPUTS[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], expected[:, t], atol=1e-4)
    np.testing.assert_array_equal(cache.there[1], ran[0])
    np.testing.assert_array_equal(cache.there[3], ran[1])
    assert cache.there[::2].all()


class Told(MixtureOfDepths):
    """Picks outside of training whom training picks."""

    def predict(self, own, x_BxTxD):
        r_BxT = score(own["router"], x_BxTxD)
        return jnp.where(r_BxT >= jnp.sort(r_BxT)[:, -4, None], 1.0, -1.0)


def test_picked_tokens_keep_their_places_in_the_row():
    """Gathered, they have the rotary angles, windows and documents that they have where the others are only masked."""
    cfg = CFG.replace(positions=Rope(), window=5, window_pattern=(False, True), depth=Told(capacity=0.5))
    cfg = cfg.replace(layer_loop="unroll")
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 2], [1] * 8])
    positions = jnp.asarray([[0, 1, 2, 0, 1, 2, 3, 4], list(range(8))])
    run = jax.jit(lambda ctx: decoder.apply(cfg, PARAMS, INPUTS, ctx).logits)
    gathered = run(context().replace(segments=segments, positions=positions))
    masked = run(Context(segments=segments, positions=positions))
    np.testing.assert_allclose(gathered, masked, atol=1e-4)


@pytest.mark.quick
def test_flops_follow_the_tokens_that_run():
    whole = CFG.replace(depth=ModelConfig.depth)
    half, full = flops.forward(CFG, 8), flops.forward(whole, 8)
    assert half.feedforward == full.feedforward * (8 + 4 + 8 + 4) / 32
    assert half.scores == full.scores * (36 + 10 + 36 + 10) / (4 * 36)
    two = CFG.replace(layers=2)
    cache = kv.empty(two, 1, 8)

    def cost(bias):
        layers = jax.tree.map(lambda x: x[:2], PARAMS["layers"])
        layers["depth"]["bias"] = jnp.full(2, bias)
        params = {**PARAMS, "layers": layers}
        return executed_flops(lambda p: decoder.forward(two, p, INPUTS[:1, :1], cache)[0], params)

    assert cost(50.0) - cost(-50.0) == 2 * 3 * 16 * 24 + 2 * 4 * 16 * 16 + 2 * 2 * 16 * 8


def mesh(text, **more):
    return checked(CFG, MeshConfig.parse(text).sizes, rows=8, length=16, **more)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MixtureOfDepths(capacity=0.0), "capacity = 0.0"),
        (lambda: MixtureOfDepths(capacity=1.1), "capacity = 1.1"),
        (lambda: CFG.replace(layers=1), "every = 2 routes one layer of 2, but the model has 1"),
        (lambda: CFG.replace(residual=DeepDelta()), "DeepDelta keeps more than one stream"),
        (lambda: CFG.replace(dropout=0.1), "dropout = 0.1"),
        (lambda: CFG.replace(feedforward=Duo()), "Duo routes whole rows"),
        (lambda: continued(CFG, None, [[1]], new_tokens=2, skip=FFNSkip()), "MixtureOfDepths says itself"),
        (lambda: mesh("sequence=2"), "tokens that lie on 2 devices .* train on a mesh with sequence=1"),
        (lambda: mesh("tensor=2", tensor=TensorConfig("ring")), "products = 'ring' permutes.*'gathered', 'weave'"),
    ],
)
def test_bad_input_is_one_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()
