"""Exits in training: an exit is the model that ends there; losses are joined as the papers' formulas say, done by hand."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import flops
from jaxpar.adaptive.curriculum import exit_weights
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.exits.config import Adapter, Calm, Deed, EeLlm, Exits, Free, LayerSkip, OwnNorm
from jaxpar.models.feedforward.duo import Duo
from jaxpar.models.positions import NoPositions
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.residual.hyper_connections import HyperConnections
from jaxpar.models.residual.mudd import MuddFormer
from jaxpar.models.residual.plain import Plain
from jaxpar.models.route import Route
from jaxpar.models.routing.depth import MixtureOfDepths
from jaxpar.models.spec import flatten
from jaxpar.skipping.config import LayerDrop, LayerSkipDropout
from jaxpar.skipping.transform import skipping
from jaxpar.step import Step, TrainState, chain
from jaxpar.steps.accumulate import accumulate
from tests.models.residual.straight import Decoder

CFG = ModelConfig(
    vocabulary=29, layers=3, width=16, heads=2, hidden=24, context=32, positions=NoPositions(), exits=Exits((1, 2))
)
FOUR = CFG.replace(layers=4, exits=Exits((2, 3)))
ROWS, LENGTH = 2, 8
draw = np.random.default_rng(0)
TOKENS, TARGETS = draw.integers(0, 29, (2, ROWS, LENGTH), np.int32)
WEIGHTS = draw.uniform(0.5, 1.5, (ROWS, LENGTH)).astype(np.float32)
TRAINING = Context(key=jax.random.key(7), sample_ids=jnp.arange(ROWS))


def started(cfg):
    """Parameters of which none is where it would start: norms and adapters are not one and zero."""
    noise = np.random.default_rng(1)
    shapes = jax.eval_shape(partial(decoder.init, cfg), jax.random.key(0))

    def one(path, x):
        start = 1.0 if getattr(path[-1], "key", "") == "scale" else 0.0
        return (start + 0.3 * noise.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def by_hand(cfg, params):
    """Weighted losses of the models that end behind each exit and behind the last layer, each with its own norm: straight-line
    NumPy in float64."""
    found = []
    for layer in (*cfg.exits.at, cfg.layers):
        head = {**params["head"], **params["head"].get("exits", {}).get(str(layer), {})}
        logits = Decoder(cfg.replace(layers=layer, exits=Exits()), {**params, "head": head}).logits(TOKENS)
        right = np.take_along_axis(logits, TARGETS[..., None], -1)[..., 0]
        found.append(np.sum(WEIGHTS * (np.log(np.exp(logits).sum(-1)) - right)))
    return np.array(found)


def sums(cfg, params, ctx=TRAINING):
    return decoder.loss(cfg, params, TOKENS, TARGETS, WEIGHTS, ctx)


@pytest.mark.parametrize(
    ("residual", "head", "loop"),
    [
        (Plain(), OwnNorm(), "scan"),
        (HyperConnections(streams=2), Exits().head, "unroll"),
        (DeepDelta(channels=2), OwnNorm(), "scan"),
    ],
    ids=["plain", "hyper-connections", "deep-delta"],
)
def test_an_exit_is_the_model_that_ends_there(residual, head, loop):
    cfg = CFG.replace(residual=residual, layer_loop=loop, exits=Exits((1, 2), head, EeLlm((0.5, 0.25))))
    params = started(cfg)
    precise = jax.tree.map(lambda x: x.astype(np.float64), params)
    expected, each = by_hand(cfg, precise), np.array([0.5, 0.25, 1.0])
    run = lambda p, ctx: (lambda s: (s.loss_sum, s))(sums(cfg, p, ctx))
    # The weights of a step, where it says them; the scheme's where not.
    other = TRAINING.replace(route=Route(exits=jnp.array([0.0, 2.0, 1.0])))
    if isinstance(residual, Plain):
        (total, found), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params, other)
        # The gradient along a random direction, by central differences in float64.
        way = jax.tree.map(lambda x: np.random.default_rng(x.size).standard_normal(x.shape), precise)
        ahead, behind = (jax.tree.map(lambda x, d, e=e: x + e * d, precise, way) for e in (1e-5, -1e-5))
        slope = (by_hand(cfg, ahead) - by_hand(cfg, behind)) @ [0.0, 2.0, 1.0] / 2e-5
        along = sum(np.sum(g * d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(way), strict=True))
        np.testing.assert_allclose(along, slope, rtol=1e-3)
        np.testing.assert_allclose(total, expected @ [0.0, 2.0, 1.0], rtol=1e-5)
    else:
        total, found = jax.jit(run)(params, TRAINING)
        np.testing.assert_allclose(total, expected @ each, rtol=1e-5)
    np.testing.assert_allclose(found.exits, expected, rtol=1e-5)
    np.testing.assert_allclose(found.weight_sum, WEIGHTS.sum(), rtol=1e-6)


@pytest.mark.quick
def test_a_model_without_exits_has_the_programs_and_parameters_that_it_had():
    plain = CFG.replace(exits=Exits())
    assert flatten(decoder.spec(plain)) == flatten(decoder.spec(CFG))  # the shared head adds none
    params = jax.eval_shape(partial(decoder.init, plain), jax.random.key(0))
    program = lambda cfg, ctx: str(jax.make_jaxpr(lambda p: sums(cfg, p, ctx).loss_sum)(params))
    assert program(CFG, Context()) == program(plain, Context())
    assert program(CFG, TRAINING) != program(plain, TRAINING)


@pytest.mark.quick
def test_an_adapter_by_hand():
    cfg = CFG.replace(exits=Exits((2,), Adapter(3)))
    params = started(cfg)
    own = jax.tree.map(np.copy, params["head"]["exits"]["2"])
    x = np.random.default_rng(2).standard_normal((1, 2, 16)).astype(np.float32)
    h = x @ own["down"]["kernel"]
    gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    y = x + gelu @ own["up"]["kernel"]
    expected = y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5) * own["norm"]["scale"]
    np.testing.assert_allclose(decoder.final_norm(cfg, params, jnp.asarray(x), 2), expected, rtol=1e-5, atol=1e-6)
    params["head"]["exits"]["2"]["up"]["kernel"][:] = 0.0  # where it starts: a norm
    plain = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * own["norm"]["scale"]
    np.testing.assert_allclose(decoder.final_norm(cfg, params, jnp.asarray(x), 2), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.quick
def test_weights_by_hand():
    close = partial(np.testing.assert_allclose, rtol=1e-6)
    close(Calm().weights((2, 4), 6), np.array([2, 4, 6]) / 12)
    close(Calm(0.0).weights((2, 4), 6), np.full(3, 1 / 3))
    close(Calm(-1.0).weights((1, 2), 4), np.array([4, 2, 1]) / 7)
    close(Deed().weights((2, 4), 6), [1 / 3, 1 / 3, 4 / 3])
    close(EeLlm((0.25, 0.5)).weights((6, 12), 24), [0.25, 0.5, 1])
    close(EeLlm((0.4,), "warm_up", 100).weights((6, 12), 24, 25), [0.1, 0.1, 1])
    close(EeLlm((0.4,), "cool_down", 100).weights((6, 12), 24, 250), [0, 0, 1])
    # Layers 1 and 2 of 0 ... 3, scale 0.2: 0.2·1, 0.2·3, and 3 + 0.2·3 for the last.
    close(LayerSkip(0.2).weights((2, 3), 4), np.array([0.2, 0.6, 3.6]) / 4.4)
    close(Free().weights((2,), 6), [0.25, 0.75])
    rotated = [np.asarray(LayerSkip(0.2, "rotational", 2).weights((2, 3), 4, step)) for step in range(4)]
    close(rotated[0], np.array([0.2, 0, 3.6]) / 3.8)
    close(rotated[1], np.array([0, 0.6, 3.6]) / 4.2)
    np.testing.assert_array_equal(rotated[:2], rotated[2:])
    # Layer 2 opens at 1/4 of `over`, layer 1 at 1/2.
    opened = [np.asarray(LayerSkip(0.2, "gradual", over=100).weights((2, 3), 4, s)) > 0 for s in (0, 24, 25, 49, 50)]
    assert [o.tolist() for o in opened] == [
        [False, False, True], [False, False, True], [False, True, True], [False, True, True], [True, True, True],
    ]  # fmt: skip


def test_free_draws_the_exit_to_the_last_layer_and_not_back():
    cfg = CFG.replace(exits=Exits((1,), OwnNorm(), Free(0.7)))
    params = started(cfg)

    def apart(params):
        state = decoder.embed(cfg, params, TOKENS, Context())
        (shallow, deep), _ = decoder.segments(cfg, params, state, Context(), (1,))
        seen = decoder.final_norm(cfg, params, shallow, 1), decoder.final_norm(cfg, params, deep)
        return decoder.distance(cfg, params, deep, Context(), WEIGHTS, shallow, 1), (seen, sums(cfg, params))

    (distance, (seen, found)), grads = jax.jit(jax.value_and_grad(apart, has_aux=True))(params)
    expected = (np.square(seen[0] - seen[1]).mean(-1) * WEIGHTS).sum()
    np.testing.assert_allclose(distance, expected, rtol=1e-5)
    np.testing.assert_allclose(found.loss_sum, found.exits @ np.array([0.25, 0.75]) + 0.7 * expected, rtol=1e-5)
    for kernel in jax.tree.leaves(grads["layers"]):
        assert np.all(kernel[1:] == 0)  # the teacher's layers
        assert np.abs(kernel[0]).max() > 1e-3
    assert np.all(grads["head"]["norm"]["scale"] == 0)


@pytest.mark.parametrize(
    "routers",
    [
        {"feedforward": Duo(small=1 / 8, routing="learned", budget=0.25, strength=10.0)},
        {"depth": MixtureOfDepths(capacity=0.4, predictor=8)},
    ],
    ids=["two modules", "mixture of depths"],
)
def test_routers_beside_exits_have_their_own_loss_once(routers):
    """The objective and its gradient as sums over models without exits, that end behind the exit and behind the last layer."""
    cfg = FOUR.replace(exits=Exits((2,), loss=EeLlm((0.5,))), **routers)
    params = started(cfg)

    def ended(params, layers):
        model = cfg.replace(layers=layers, exits=Exits())
        if layers < 4 and model.feedforward.routed:  # the budget's part is the last layer's, whose weight is 1
            model = model.replace(feedforward=replace(model.feedforward, strength=0.0))
        return sums(model, {**params, "layers": jax.tree.map(lambda x: x[:layers], params["layers"])}).loss_sum

    objective = lambda p: (lambda s: (s.loss_sum, s.exits))(sums(cfg, p))
    by_parts = lambda p: 0.5 * ended(p, 2) + ended(p, 4)
    (total, exits), grads = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    by_hand, expected = jax.jit(jax.value_and_grad(by_parts))(params)
    np.testing.assert_allclose(total, by_hand, rtol=1e-5)
    assert (total - exits @ np.array([0.5, 1.0]) > 1.0) == ("feedforward" in routers)
    if "depth" in routers:
        # What picks outside of training learns by a loss of its own, which has no weight: once, not once an exit. Both models
        # beside it have the second layer, and one the fourth.
        for name in ("up", "down", "bias"):
            leaf = expected["layers"]["depth"][name]
            expected["layers"]["depth"][name] = leaf.at[1].divide(2)
        assert np.abs(leaf[1::2]).min() > 1e-2
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(np.abs(b).max()))


def test_a_curriculum_follows_the_steps_through_accumulation_and_skipped_layers():
    """What the program is told in each step, by parts and with the routes of the layers that are left out."""
    exits, told = Exits((2, 3), loss=LayerSkip(curriculum="rotational", period=2)), []
    gradients = lambda state, batch, control: told.append(control.route) or control.route.exits.sum()
    step = Step(None, None, gradients, None)
    around = exit_weights(exits, 4), skipping(LayerDrop(2, rate=0.3), 4)
    for number in range(3):
        state = TrainState(jnp.int32(number), None, None, jax.random.key(0), None)
        chain(step, *around).gradients(state, None, None)
        expected = np.asarray(exits.loss.weights((2, 3), 4, number))
        np.testing.assert_array_equal(told[-1].exits, [expected, expected])
        assert told[-1].keep.shape == (2, 4)
        chain(step, around[0]).gradients(state, None, None)
        np.testing.assert_array_equal(told[-1].exits, [expected])
    assert chain(step, exit_weights(Exits((2, 3)), 4)) is step  # nothing changes: nothing stands around it
    assert accumulate(1)(step) is step


@pytest.mark.quick
def test_layer_skips_dropout_by_hand():
    close = partial(np.testing.assert_allclose, rtol=1e-5)
    keep = LayerSkipDropout(rate=0.2).probabilities(0, 4)
    close(keep, 1 - 0.2 * (2 ** (np.arange(4) / 3) - 1))
    assert keep[0] == 1
    close(keep[3], 0.8)
    ramped = LayerSkipDropout(rate=0.2, ramp=11)
    close(ramped.probabilities(0, 4), np.ones(4))
    close(ramped.probabilities(5, 4), 1 - 0.2 * (2**0.5 - 1) * (2 ** (np.arange(4) / 3) - 1))
    close(ramped.probabilities(99, 4), keep)
    assert bool(LayerSkipDropout(rate=0.0).route(3, jax.random.key(0), 4).keep.all())


@pytest.mark.quick
def test_flops_by_hand():
    """Compiled code beside them: `tests/jaxpar/adaptive/test_exit_early.py`."""
    cfg, plain = (CFG.replace(exits=exits) for exits in (Exits((1, 2), Adapter(5)), Exits()))
    more = 2 * (2 * 16 * 29 + 2 * 2 * 16 * 5)  # two exits: the projection, an adapter of size 5
    assert flops.forward(cfg).exits == more
    assert flops.training(cfg, LENGTH) == flops.training(plain, LENGTH) + 3 * more


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exits": Exits((4,))}, r"model.exits.at = \(4,\).*1 to 3 of the model's 4 layers, not behind 4"),
        ({"exits": Exits((1, 9))}, "not behind 9 .there is no such layer"),
        ({"exits": Exits((3, 2))}, r"\(3, 2\) must rise.*\(2, 3\)"),
        ({"residual": MuddFormer()}, "MuddFormer reads a source of every layer, and behind layer 2 those of 2 layers"),
        ({"exits": Exits((2, 3), loss=EeLlm((1.0, 1.0, 1.0)))}, "3 numbers for the 2 exits"),
        ({"exits": Exits((1, 3), loss=LayerSkip())}, "LayerSkip's weights are 0 for an exit behind the first layer"),
        ({"exits": Exits((2,), loss=LayerSkip(curriculum="rotational"))}, "period = 2 is longer than the 1 exits"),
        ({"exits": Exits((2, 3), loss=Free())}, "FREE has one exit"),
    ],
)
def test_exits_that_do_not_suit_the_model_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        FOUR.replace(**changes)


@pytest.mark.quick
def test_layers_named_anew_are_refused():
    ctx = TRAINING.replace(route=Route(layers=jnp.array([0, 2, 1])))
    with pytest.raises(ValueError, match="the route names its layers anew"):
        jax.eval_shape(lambda p: sums(CFG, p, ctx), started(CFG))
