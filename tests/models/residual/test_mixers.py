"""Every depth mixer: against straight-line NumPy in float64, values and gradients; causal; cached decoding is the full
pass; equal to the plain stream at initialisation where it says so, and only there."""

from functools import cache, partial

import jax
import numpy as np
import pytest

from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.norms import RMSNorm
from jaxpar.models.positions import NoPositions
from jaxpar.models.residual.attention_residuals import AttentionResiduals
from jaxpar.models.residual.cross_attention import DeepCrossAttention
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.residual.dense_former import DenseFormer
from jaxpar.models.residual.depth_window import DepthWindow
from jaxpar.models.residual.elc_bert import ElcBert
from jaxpar.models.residual.hyper_connections import HyperConnections
from jaxpar.models.residual.manifold import ManifoldHyperConnections
from jaxpar.models.residual.mudd import MuddFormer
from jaxpar.models.residual.plain import Plain
from jaxpar.models.residual.short_window import ShortWindow
from jaxpar.models.residual.vertical import VerticalAttention
from jaxpar.models.spec import path_name
from tests.models.residual.straight import Decoder

# Hardly an epsilon: where a mixer is the plain stream but for a factor, its norm is to take out all of it.
CFG = ModelConfig(
    vocabulary=29,
    layers=3,
    width=16,
    heads=2,
    hidden=24,
    context=32,
    init_std=0.3,
    norm=RMSNorm(epsilon=1e-9),
    positions=NoPositions(),
)
# (mixer, how far from plain at initialisation: 0 is bitwise, None is far)
MIXERS = [
    (DenseFormer(), 0),
    (DenseFormer(dilation=2, period=2), 0),
    (AttentionResiduals(), 1e-5),
    (AttentionResiduals(block=3), 1e-5),
    (AttentionResiduals(block=4, phases="two"), 1e-5),
    (HyperConnections(), 0),
    (HyperConnections(streams=1), 0),
    (ManifoldHyperConnections(streams=3), None),
    (DeepDelta(), None),
    (DeepDelta(channels=4, value="sigmoid"), None),
    (DeepDelta(update="write", value="constant"), None),
    (ElcBert(), None),
    (ElcBert("base"), None),
    (ElcBert("normalized"), None),
    (ElcBert("weighted_output"), None),
    (VerticalAttention(), None),
    (DeepCrossAttention(), 1e-5),
    (DeepCrossAttention(version=2, latest=1), 1e-5),
    (MuddFormer(), 0),
    (DepthWindow(window=2), None),
    (ShortWindow(window=3), None),
    (DeepDelta(channels=2, compressor="tokens", embedding="convolution", value="sigmoid"), None),
]
every_mixer = pytest.mark.parametrize("mixer", [m for m, _ in MIXERS], ids=str)
TOKENS = np.random.default_rng(0).integers(0, 29, (2, 9), np.int32)


def cfg_of(mixer, **changes):
    return CFG.replace(residual=mixer, **changes)


@cache
def params_of(mixer, noise=0.0):
    """Initial parameters; with noise on the mixer's, so that no gate is closed and no weight zero."""
    params = jax.jit(decoder.init, static_argnums=0)(cfg_of(mixer), jax.random.key(0))
    draw = np.random.default_rng(1)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: x + ("residual/" in path_name(path)) * noise * draw.standard_normal(x.shape).astype(np.float32),
        params,
    )


@partial(jax.jit, static_argnums=0)
def run(cfg, params, tokens):
    """Logits, and the gradient of their weighted sum."""

    def loss(params):
        logits = decoder.apply(cfg, params, tokens).logits
        return (logits * weights_of(logits)).sum(), logits

    gradient, logits = jax.grad(loss, has_aux=True)(params)
    return logits, gradient


def weights_of(logits):
    """Of a loss that every logit has a part in."""
    return np.cos(np.arange(logits.size)).reshape(logits.shape)


def straight(mixer, params):
    return Decoder(cfg_of(mixer), params).logits(TOKENS)


@every_mixer
def test_values_and_gradients_are_those_of_straight_line_python(mixer):
    """Gradients of every tensor along a random direction, beside central differences in float64."""
    cfg, params = cfg_of(mixer), params_of(mixer, 0.3)
    logits, gradient = run(cfg, params, TOKENS)
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: np.asarray(x, np.float64), params))
    expected = straight(mixer, jax.tree.unflatten(tree, leaves))
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.linalg.norm(expected))
    draw, step, errors, slopes = np.random.default_rng(2), 1e-6, {}, {}
    for i, (path, found) in enumerate(jax.tree_util.tree_leaves_with_path(gradient)):
        way = draw.standard_normal(leaves[i].shape)
        moved = lambda by, i=i, way=way: [x + by * way if i == j else x for j, x in enumerate(leaves)]
        loss = lambda by, moved=moved: (
            (at := straight(mixer, jax.tree.unflatten(tree, moved(by)))) * weights_of(at)
        ).sum()
        slopes[path_name(path)] = (loss(step) - loss(-step)) / (2 * step)
        errors[path_name(path)] = abs(slopes[path_name(path)] - np.sum(np.asarray(found, np.float64) * way))
    # What a norm makes invisible has no gradient but rounding: measured against all tensors together.
    least = 1e-2 * max(map(abs, slopes.values()))
    wrong = {
        name: (error, slopes[name]) for name, error in errors.items() if error > 2e-4 * max(abs(slopes[name]), least)
    }
    assert not wrong
    # Tokens to come change nothing, bitwise.
    other = TOKENS.copy()
    other[:, 6:] = (other[:, 6:] + 1) % 29
    np.testing.assert_array_equal(run(cfg, params, other)[0][:, :6], logits[:, :6])


@pytest.mark.parametrize(("mixer", "off"), MIXERS, ids=str)
def test_equal_to_the_plain_stream_at_initialisation_where_it_says_so(mixer, off):
    expected = run(cfg_of(Plain()), params_of(Plain()), TOKENS)[0]
    found = run(cfg_of(mixer), params_of(mixer), TOKENS)[0]
    if off == 0:
        np.testing.assert_array_equal(found, expected)
    elif off is None:
        assert np.linalg.norm(found - expected) > 1e-3 * np.linalg.norm(expected)
    else:
        assert 0 < np.abs(found - expected).max() < off * np.abs(expected).max()
    away = run(cfg_of(mixer), params_of(mixer, 0.3), TOKENS)[0]
    assert np.linalg.norm(away - expected) > 0.05 * np.linalg.norm(expected), "its parameters change nothing"


@pytest.mark.parametrize("mixer", {(type(m), m.reach(CFG)): m for m, _ in MIXERS}.values(), ids=str)
def test_cached_decode_equals_the_full_pass(mixer):
    """Ragged rows in unequal chunks: nothing is kept from token to token but what a mixer with a reach asks for."""
    cfg, params = cfg_of(mixer), params_of(mixer, 0.3)
    full = run(cfg, params, TOKENS)[0]
    forward = jax.jit(partial(decoder.forward, cfg))
    cache, done = kv.empty(cfg, rows=2, capacity=16), np.zeros(2, int)
    for counts in ([3, 1], [1, 3], [3, 0], [2, 3]):
        chunk = np.zeros((2, 3), np.int32)
        for b, n in enumerate(counts):
            chunk[b, :n] = TOKENS[b, done[b] : done[b] + n]
        logits, cache = forward(params, chunk, cache, np.asarray(counts, np.int32))
        for b, n in enumerate(counts):
            np.testing.assert_allclose(logits[b, :n], full[b, done[b] : done[b] + n], atol=2e-5 * np.abs(full).max())
            done[b] += n
    assert done.tolist() == [9, 7]


@every_mixer
def test_the_state_keeps_the_compute_dtype(mixer):
    """Traced only: a state that changed its dtype could not be carried from layer to layer."""
    cfg = cfg_of(mixer, dtype="bfloat16")
    params = params_of(mixer)
    states = lambda p: decoder.blocks(cfg, p["layers"], decoder.embed(cfg, p, TOKENS, Context()), Context())[0]
    kinds = lambda tree: {str(x.dtype) for x in jax.tree.leaves(tree)}
    assert kinds(jax.eval_shape(states, params)) == {"bfloat16"}
    assert kinds(jax.eval_shape(partial(run, cfg), params, TOKENS)[1]) == {"float32"}
