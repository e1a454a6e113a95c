"""`jaxpar inspect`: what it says of a model is what the model does, told by other means."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.inspecting import findings, look, scalars
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.exits.config import Adapter, Exits
from jaxpar.models.residual.attention_residuals import AttentionResiduals
from jaxpar.models.residual.cross_attention import DeepCrossAttention
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.residual.dense_former import DenseFormer
from jaxpar.models.residual.plain import Plain
from jaxpar.models.residual.watched import Watched
from jaxpar.report import depth
from jaxpar.step import Batch

CFG = ModelConfig(vocabulary=31, layers=3, width=16, heads=2, hidden=24, context=32, init_std=0.3)
MIXERS = [Plain(), DenseFormer(), AttentionResiduals(block=2), DeepCrossAttention(), DeepDelta(channels=2)]


def batch(rows=2, length=12, seed=0) -> Batch:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 31, (rows, length + 1), np.int32)
    weights = draw.uniform(0.5, 1.5, (rows, length)).astype(np.float32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    segments = np.ones((rows, length), np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, places, segments, np.arange(rows, dtype=np.int32))


def parameters(cfg, seed=1):
    """Drawn anew, so that nothing keeps a special value of its start."""
    params = decoder.init(cfg, jax.random.key(0))
    keys = jax.random.split(jax.random.key(seed), len(jax.tree.leaves(params)))
    leaves, tree = jax.tree.flatten(params)
    noisy = [x + 0.3 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noisy)


def context(b: Batch) -> Context:
    return Context(jnp.asarray(b.positions), jnp.asarray(b.segments))


def loss(cfg, params, b: Batch) -> float:
    sums = jax.jit(partial(decoder.loss, cfg))(params, b.tokens, b.targets, b.weights, ctx=context(b))
    return float(sums.loss_sum / sums.weight_sum)


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: type(m).__name__)
def test_a_watched_model_is_the_model(mixer):
    cfg = CFG.replace(residual=mixer)
    params, b = parameters(cfg), batch()
    assert findings(cfg, params, b)["lens_loss"][-1] == pytest.approx(loss(cfg, params, b), rel=1e-5)
    watched = cfg.replace(residual=Watched(mixer))
    assert jax.tree.map(lambda s: s.shape, decoder.spec(watched)) == jax.tree.map(lambda s: s.shape, decoder.spec(cfg))


@pytest.mark.quick
def test_the_lens_is_the_loss_of_a_shorter_model():
    params, b = parameters(CFG), batch()
    found = findings(CFG, params, b, (1.0,))
    for layers in (1, 2):
        shorter = {**params, "layers": jax.tree.map(lambda x, n=layers: x[:n], params["layers"])}
        assert found["lens_loss"][layers] == pytest.approx(loss(CFG.replace(layers=layers), shorter, b), rel=1e-5)
    assert found["lens_agrees"][-1] == 1
    # Nobody is as sure as that, so that all tokens go to the end.
    [row] = found["exits"]
    assert row["left"] == pytest.approx([0, 0, 0, 1])
    assert row["depth"] == pytest.approx(3)
    assert row["flops_per_token"] == pytest.approx(found["flops_per_token"])
    assert row["agrees"] == pytest.approx(1)


def test_exits_are_those_that_counting_gives():
    params, b = parameters(CFG), batch()
    found = findings(CFG, params, b, (0.2, 0.6))
    sure, best = [], []
    for layers in (1, 2, 3):
        shorter = {**params, "layers": jax.tree.map(lambda x, n=layers: x[:n], params["layers"])}
        out = decoder.apply(CFG.replace(layers=layers), shorter, b.tokens, context(b))
        chances = np.sort(np.asarray(jax.nn.softmax(out.logits)), axis=-1)
        sure.append(chances[..., -1] - chances[..., -2])
        best.append(np.asarray(out.logits).argmax(-1))
    weights = b.weights / b.weights.sum()
    for threshold, row in zip((0.2, 0.6), found["exits"], strict=True):
        left, agrees = np.zeros(4), 0.0
        for at, weight in np.ndenumerate(weights):
            layer = next((n for n in (1, 2) if sure[n - 1][at] >= threshold), 3)
            left[layer] += weight
            agrees += weight * (best[layer - 1][at] == best[2][at])
        assert 0 < left[3] < 1, "a threshold that tells tokens apart"
        np.testing.assert_allclose(row["left"], left, atol=1e-6)
        assert row["depth"] == pytest.approx(left @ np.arange(4))
        assert row["agrees"] == pytest.approx(agrees, abs=1e-6)


def test_behind_an_exit_the_lens_is_what_the_exit_says():
    """With its own adapter and norm, and the state that training reads there; elsewhere the last layer's norm."""
    cfg = CFG.replace(residual=DeepDelta(channels=2), exits=Exits((2,), Adapter(4)))
    params, b = parameters(cfg), batch()
    found = findings(cfg, params, b, (0.3,))

    @jax.jit
    def at_exit(params):
        ctx = context(b)
        (state, _), _ = decoder.segments(cfg, params, decoder.embed(cfg, params, b.tokens, ctx), ctx, (2,))
        return decoder.head(cfg, params, state, ctx, b.targets, b.weights, at=2), decoder.head(
            cfg, params, state, ctx, at=2
        )

    sums, logits = at_exit(params)
    assert found["lens_loss"][2] == pytest.approx(float(sums.loss_sum / sums.weight_sum), rel=1e-5)
    without = findings(cfg.replace(exits=Exits()), params, b, (0.3,))
    assert abs(without["lens_loss"][2] - found["lens_loss"][2]) > 1e-2
    for layer in (0, 1, 3):
        assert found["lens_loss"][layer] == pytest.approx(without["lens_loss"][layer], rel=1e-5)
    chances = np.sort(np.asarray(jax.nn.softmax(logits)), axis=-1)
    sure = ((chances[..., -1] - chances[..., -2] >= 0.3) * b.weights).sum() / b.weights.sum()
    [row], [other] = found["exits"], without["exits"]
    assert row["left"][1] == pytest.approx(other["left"][1])
    assert 0 < row["left"][2] <= sure + 1e-6
    assert row["left"][2] != other["left"][2]
    assert " 2* " in depth.table(found)


def test_depth_weights_of_fixed_averages():
    cfg = CFG.replace(residual=DenseFormer())
    params, b = parameters(cfg), batch()
    found = findings(cfg, params, b)["depth_weights"]
    average = np.asarray(params["layers"]["residual"]["average"])
    np.testing.assert_allclose(found[0][0], [[1, 0, 0, 0]], atol=1e-6)
    for layer in (1, 2):
        expected = np.where(np.arange(4) <= layer, average[layer], 0) + (np.arange(4) == layer)
        np.testing.assert_allclose(found[layer][0], [expected], atol=1e-5)
        assert found[layer][1] is None, "the feed-forward goes on from the layer's own stream"


def test_depth_weights_of_attention_are_its_softmax():
    cfg = CFG.replace(residual=AttentionResiduals(block=1, phases="two", epsilon=1e-12))
    params, b = parameters(cfg), batch()
    found = findings(cfg, params, b)["depth_weights"]
    for layer in range(3):
        for branch in (0, 1):
            [row] = found[layer][branch]
            sources = 1 + 2 * layer + branch
            assert sum(row) == pytest.approx(1, abs=1e-5)
            assert sum(x > 1e-6 for x in row) == sources
    # The second read of layer 0, by hand: the embedding and what attention gave.
    x = np.asarray(decoder.embed(cfg, params, b.tokens, context(b)).slots[0], np.float64)
    watched = cfg.replace(residual=Watched(AttentionResiduals(epsilon=1e-12)))
    one = jax.tree.map(lambda p: p[:1], params["layers"])
    (state, _), _ = decoder.blocks(watched, one, decoder.embed(watched, params, b.tokens, context(b)), context(b))
    given = np.asarray(state.slots[1], np.float64)
    reader = {name: np.asarray(w[0], np.float64) for name, w in params["layers"]["residual"]["feedforward"].items()}
    logit = lambda v: (v / np.sqrt((v**2).mean(-1, keepdims=True)) * reader["scale"]) @ reader["query"]
    first = 1 / (1 + np.exp(logit(given) - logit(x)))
    row = np.asarray(found[0][1][0])
    assert row[row > 1e-6] == pytest.approx([first.mean(), 1 - first.mean()], rel=1e-4)


def test_a_branch_that_gives_nothing_is_seen_so():
    params, b = parameters(CFG), batch()
    down = params["layers"]["feedforward"]["down"]
    down["kernel"] = down["kernel"].at[1].set(0.0)
    found = findings(CFG, params, b)
    assert found["given_rms"][1][1] == 0
    assert found["cosine"][1][1] == pytest.approx(1)
    assert found["given_rms"][1][0] > 0
    assert found["cosine"][0][1] < 0.999
    assert found["read_rms"][2][0] == pytest.approx(found["read_rms"][1][1])
    assert found["depth_weights"] is None


def test_parameters_on_a_mesh_give_the_same(devices):
    from jaxpar.parallel.mesh import MeshConfig, make_mesh
    from jaxpar.program import build

    cfg = CFG.replace(vocabulary=32, residual=AttentionResiduals(block=2))
    params, b = parameters(cfg), batch(rows=4)
    program = build(cfg, make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), devices))
    there = jax.tree.map(jax.device_put, params, program.param_shardings)
    spread = jax.tree.map(lambda x: jax.device_put(x, program.batch_sharding), b)
    for one, many in zip(jax.tree.leaves(look(cfg, params, b)), jax.tree.leaves(look(cfg, there, spread)), strict=True):
        np.testing.assert_allclose(one, many, atol=2e-5)


def test_metrics_table_and_picture():
    cfg = CFG.replace(residual=DeepCrossAttention())
    found = findings(cfg, parameters(cfg), batch())
    values = scalars(json.loads(json.dumps(found)))
    assert values["inspect/lens_loss/03"] == found["lens_loss"][3]
    assert values["inspect/cosine/feedforward/02"] == found["cosine"][2][1]
    assert all(np.isfinite(x) for x in values.values())
    rows, names = depth.weights_of(found)
    assert names[:3] == ["0 attention query", "0 attention key", "0 attention value"]
    assert rows.shape[0] == len(names)
    assert depth.picture(found, "a model").startswith(b"\x89PNG")
    assert len(depth.table(found).splitlines()) == 2 + 4 + 2 + 4


@pytest.mark.parametrize("value", [0.0, -0.1, 1.5, float("nan")])
def test_a_confidence_that_is_none(value):
    with pytest.raises(ValueError, match="outside \\(0, 1\\]"):
        findings(CFG, None, batch(), (value,))
