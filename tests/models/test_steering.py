"""Steering vectors: what is added where, the sign, the strength against measured divergences, and whose vector it is."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.generation import continued, generate
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.steering import Vector, agreeing, behind, extract, mark, strength
from jaxpar.models.steering import divergence as measured

CFG = ModelConfig(vocabulary=32, layers=3, width=16, heads=2, hidden=24, context=64, init_std=0.3)
PARAMS = jax.jit(decoder.init, static_argnums=0)(CFG, jax.random.key(0))
LAYER = 1
WANTED = [[1, 2, 3, 7], [4, 7], [9, 9, 7]]
OTHER = [[1, 2, 3, 8, 8], [4, 8, 8], [9, 9, 8, 8]]
VECTOR = extract(CFG, PARAMS, WANTED, OTHER, LAYER)
TOKENS = jax.random.randint(jax.random.key(1), (3, 8), 0, 32)
logits_of = jax.jit(lambda tokens, steering: decoder.apply(CFG, PARAMS, tokens, Context(steering=steering)).logits)


@jax.jit
def by_layers(tokens, added):
    """The streams behind each layer by single layers, `added` put on behind LAYER; and the logits."""
    ctx = Context()
    state, found = decoder.embed(CFG, PARAMS, tokens, ctx), []
    for layer in range(CFG.layers):
        one = jax.tree.map(lambda x, layer=layer: x[layer : layer + 1], PARAMS["layers"])
        state, _ = decoder.blocks(CFG, one, state, ctx, layer)
        state = state + added if layer == LAYER else state
        found.append(state)
    return found, decoder.head(CFG, PARAMS, state, ctx)


def test_the_vector_is_the_mean_difference_of_pairs_at_their_last_tokens():
    def last(text):
        padded = jnp.asarray([text + [0] * (8 - len(text))] * 3)
        return np.asarray(by_layers(padded, jnp.zeros((3, 8, 16)))[0][LAYER][0, len(text) - 1])

    expected = np.mean([last(a) - last(b) for a, b in zip(WANTED, OTHER, strict=True)], axis=0)
    np.testing.assert_allclose(VECTOR.values, expected, atol=1e-5)
    assert (VECTOR.layer, VECTOR.layers) == (LAYER, 3)


def test_it_is_added_behind_its_layer_to_the_tokens_that_are_named():
    chosen = jnp.arange(8)[None] % 2 == jnp.array([[0], [1], [0]])
    found = logits_of(TOKENS, VECTOR.steering(CFG, PARAMS, 0.7, chosen))
    added = jnp.where(chosen[..., None], 0.7 * VECTOR.values, 0)
    np.testing.assert_allclose(found, by_layers(TOKENS, added)[1], atol=1e-4)
    np.testing.assert_array_equal(logits_of(TOKENS, VECTOR.steering(CFG, PARAMS, 0.0, chosen)), logits_of(TOKENS, None))


@pytest.mark.quick
def test_a_positive_strength_leads_to_what_is_wanted():
    """Behind the layer the stream moves along the vector, and the wanted texts' last state is nearer for it."""
    read = partial(behind, CFG, PARAMS, layer=LAYER)
    unit = VECTOR.values / np.linalg.norm(VECTOR.values)
    gap = np.asarray((read(WANTED) - read(OTHER)) @ unit)
    assert gap.mean() == pytest.approx(np.linalg.norm(VECTOR.values), rel=1e-4)
    apart = lambda strength: np.linalg.norm(
        np.asarray(read(OTHER)).mean(0) + strength * VECTOR.values - np.asarray(read(WANTED)).mean(0)
    )
    assert apart(1.0) < 1e-4 < apart(0.0) < apart(-1.0)
    back = extract(CFG, PARAMS, OTHER, WANTED, LAYER)
    np.testing.assert_allclose(back.values, -VECTOR.values, atol=1e-6)


def divergence(by):
    """KL(p ‖ p steered) of the last tokens, in nats, in float64."""
    last = jnp.broadcast_to(jnp.arange(8) == 7, (3, 8))
    p, q = (
        np.asarray(jax.nn.log_softmax(logits_of(TOKENS, s)[:, -1]), np.float64)
        for s in (VECTOR.steering(CFG, PARAMS, 0.0, last), VECTOR.steering(CFG, PARAMS, by, last))
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def test_the_strength_gives_the_divergence_that_was_asked_for():
    for nats in (1e-4, 1e-3):
        by = strength(CFG, PARAMS, VECTOR, TOKENS, nats)
        assert divergence(by) == pytest.approx(nats, rel=0.1)
        bound = strength(CFG, PARAMS, VECTOR, TOKENS, nats, "bound")
        assert 0 < bound < by
        assert divergence(bound) < nats
    # To second order: a fourth at half the strength, and the same the other way.
    assert divergence(by) / divergence(by / 2) == pytest.approx(4, rel=0.15)
    assert divergence(by) / divergence(-by) == pytest.approx(1, rel=0.15)


def test_rows_of_unequal_length_are_steered_at_their_own_last_token():
    """The strength of one row, whatever stands behind its end; and what is measured is what was computed in float64."""
    short = TOKENS[:1, :5]
    whole = strength(CFG, PARAMS, VECTOR, short, 1e-3)
    assert strength(CFG, PARAMS, VECTOR, TOKENS[:1], 1e-3, counts_B=[5]) == pytest.approx(whole, rel=1e-5)
    assert strength(CFG, PARAMS, VECTOR, TOKENS[:1], 1e-3) != pytest.approx(whole, rel=1e-2)
    assert measured(CFG, PARAMS, VECTOR, 1.0, TOKENS) == pytest.approx(divergence(1.0), rel=1e-4)


@pytest.mark.quick
def test_pairs_agree_or_do_not():
    """By the mean of the others, so that a pair does not vouch for itself."""
    draw = np.random.default_rng(0)
    noise = draw.normal(size=(400, 16))
    assert agreeing(noise + 2 * draw.normal(size=16)) == 400
    assert abs(agreeing(noise) - 200) < 60, "about half of them"
    by_loops = sum(d @ np.delete(noise, i, axis=0).mean(0) > 0 for i, d in enumerate(noise))
    assert agreeing(noise) == by_loops
    assert agreeing([[1.0, 0.0], [-1.0, 0.0]]) == 0


def test_generation_steers_each_prompts_last_token_and_every_new_one():
    prompts = [[3, 1, 4], [7, 7, 2, 5, 1]]
    steering = VECTOR.steering(CFG, PARAMS, 2.0)
    found = continued(CFG, PARAMS, prompts, new_tokens=6, steering=steering).rows
    padded = jax.jit(
        lambda t, mask: decoder.apply(CFG, PARAMS, t, Context(steering=steering.replace(tokens=mask))).logits
    )
    for prompt, row in zip(prompts, found, strict=True):
        text = list(prompt)
        for _ in range(6):
            tokens = jnp.asarray([text + [0] * (12 - len(text))])
            steered = jnp.arange(12)[None] >= len(prompt) - 1
            text.append(int(padded(tokens, steered)[0, len(text) - 1].argmax()))
        assert row == text[len(prompt) :]
    assert found != generate(CFG, PARAMS, prompts, new_tokens=6)
    none = continued(CFG, PARAMS, prompts, new_tokens=6, steering=VECTOR.steering(CFG, PARAMS, 0.0)).rows
    assert none == generate(CFG, PARAMS, prompts, new_tokens=6)


def test_a_file_keeps_it(tmp_path):
    VECTOR.save(tmp_path / "v.npz")
    again = Vector.load(tmp_path / "v.npz")
    np.testing.assert_array_equal(again.values, VECTOR.values)
    assert (again.layer, again.layers, again.mark) == (VECTOR.layer, VECTOR.layers, mark(PARAMS))
    whole, bad = (tmp_path / "v.npz").read_bytes(), tmp_path / "bad.npz"
    with pytest.raises(ValueError, match=r"there is no steering vector .*bad.npz"):
        Vector.load(bad)
    cuts = (0, 1, 3, 50, len(whole) // 2, len(whole) - 1)
    for content in (b"nothing", b"[1, 2]", *(whole[:cut] for cut in cuts)):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad.npz holds no whole steering vector"):
            Vector.load(bad)
    replace(VECTOR, values=VECTOR.values * np.nan).save(bad)
    with pytest.raises(
        ValueError, match=rf"{len(VECTOR.values)} of the steering vector's {len(VECTOR.values)} numbers"
    ):
        Vector.load(bad)


OTHERS = {**PARAMS, "embedding": {"tokens": 2 * PARAMS["embedding"]["tokens"]}}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (
            lambda: VECTOR.steering(CFG.replace(layers=4), PARAMS, 1.0),
            "16 numbers for layer 1 of 3.*width 16 and 4 layers",
        ),
        (lambda: VECTOR.steering(CFG.replace(width=32), PARAMS, 1.0), "16 numbers.*this model has width 32"),
        (lambda: VECTOR.steering(CFG, OTHERS, 1.0), rf"mark {mark(PARAMS)}, but this model's have {mark(OTHERS)}"),
        (lambda: VECTOR.steering(CFG, PARAMS, float("nan")), "strength of nan"),
        (lambda: extract(CFG, PARAMS, WANTED, OTHER[:2], 1), "3 texts that are wanted and 2 others"),
        (lambda: extract(CFG, PARAMS, WANTED, OTHER, 3), "no layer 3 to steer behind: the model has layers 0 to 2"),
        (lambda: extract(CFG, PARAMS, [[1], []], [[1], [2]], 1), "text 1 is empty"),
        (lambda: extract(CFG.replace(residual=DeepDelta()), PARAMS, WANTED, OTHER, 1), "DeepDelta keeps several"),
        (lambda: strength(CFG, PARAMS, VECTOR, TOKENS, 0.0), "divergence of 0.0 nats"),
    ],
)
def test_bad_input_is_one_sentence(ask, words):
    with pytest.raises(ValueError, match=words):
        ask()
