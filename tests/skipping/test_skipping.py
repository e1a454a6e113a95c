"""Skipping strategies: their probabilities and paths, and a step with them."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import options
from jaxpar.errors import UserError
from jaxpar.experiments.parity.compare import LLAMA, OPTIMISER, ROWS, STEPS, batch_of
from jaxpar.optimisers import make
from jaxpar.parallel.mesh import MeshConfig, make_mesh
from jaxpar.presets import tiny
from jaxpar.program import build
from jaxpar.skipping.chance import LayerDrop, ProgressiveLayerDrop, StochasticDepth
from jaxpar.skipping.paths import SkipPaths, SwapEnds
from jaxpar.skipping.together import with_swaps
from jaxpar.skipping.transform import skipping
from jaxpar.step import chain
from jaxpar.steps.accumulate import accumulate
from jaxpar.steps.base import make_step

CFG = LLAMA.replace(layers=4, heads=4, kv_heads=2)
KEY = jax.random.key(7)
STRATEGIES = {
    "layer-drop": LayerDrop(2, rate=0.5),
    "stochastic-depth": StochasticDepth(2, rate=0.9),
    "progressive": ProgressiveLayerDrop(2, speed=1.0),
    "paths": SkipPaths(4, stages=4, skipped=2),
    "swaps": SwapEnds(2, stages=4),
}


@pytest.mark.quick
@pytest.mark.parametrize("strategy", [LayerDrop(500, rate=0.3), StochasticDepth(500), ProgressiveLayerDrop(500)])
def test_layers_are_left_out_as_often_as_it_says(strategy):
    """Within four standard deviations of a binomial, for each layer, over 4 steps of 500 microbatches."""
    kept = np.concatenate([strategy.route(step, KEY, 6).keep for step in (0, 300, 600, 900)])
    said = np.mean([strategy.probabilities(step, 6) for step in (0, 300, 600, 900)], axis=0)
    deviation = np.sqrt(np.maximum(said * (1 - said), 1e-3) / len(kept))
    assert np.all(np.abs(kept.mean(axis=0) - said) < 4 * deviation)


@pytest.mark.quick
def test_probabilities_by_hand():
    np.testing.assert_allclose(StochasticDepth(rate=0.5).probabilities(0, 4), [0.875, 0.75, 0.625, 0.5])
    np.testing.assert_allclose(StochasticDepth(rate=0.5, profile="uniform").probabilities(0, 2), [0.5, 0.5])
    np.testing.assert_allclose(LayerDrop(rate=0.2, ramp=10).probabilities(5, 2), [0.9, 0.9])
    np.testing.assert_allclose(LayerDrop(rate=0.2, ramp=10).probabilities(50, 2), [0.8, 0.8])
    late = ProgressiveLayerDrop(limit=0.5, speed=0.001).probabilities(1e6, 4)
    np.testing.assert_allclose(late, [0.875, 0.75, 0.625, 0.5])
    np.testing.assert_allclose(ProgressiveLayerDrop().probabilities(0, 4), np.ones(4))


@pytest.mark.quick
def test_what_stays_is_scaled_so_that_the_expectation_is_the_whole_layer():
    strategy = StochasticDepth(4000, rate=0.5)
    route = strategy.route(0, KEY, 3)
    np.testing.assert_allclose(jnp.mean(route.keep * route.scale, axis=0), 1.0, atol=0.06)
    assert LayerDrop().route(0, KEY, 3).scale is None


@pytest.mark.quick
def test_draws_depend_on_step_microbatch_and_layer_alone():
    few, many = LayerDrop(2, rate=0.5).route(3, KEY, 4).keep, LayerDrop(4, rate=0.5).route(3, KEY, 8).keep
    np.testing.assert_array_equal(few, many[:2, :4])
    np.testing.assert_array_equal(few, jax.jit(lambda s: LayerDrop(2, rate=0.5).route(s, KEY, 4).keep)(3))
    assert not np.array_equal(many, LayerDrop(4, rate=0.5).route(4, KEY, 8).keep)


@pytest.mark.quick
def test_paths_by_hand():
    np.testing.assert_array_equal(
        SkipPaths(3, stages=3, skipped=1).route(0, KEY, 6).layers, [[0, 1, 4, 5], [0, 1, 2, 3], [0, 1, 4, 5]]
    )
    np.testing.assert_array_equal(SwapEnds(2, stages=4).route(0, KEY, 4).layers, [[0, 1, 2, 3], [1, 0, 3, 2]])
    np.testing.assert_allclose(SkipPaths(4, stages=3, skipped=1, gradients="visits").gradient_scale(3), [1, 2, 2])


@cache
def step_of(name, microbatches=1):
    program = build(CFG, make_mesh(MeshConfig(), jax.devices()[:1]))
    transforms = [accumulate(microbatches)]
    if name is not None:
        transforms.append(skipping(STRATEGIES[name], CFG.layers))
    step = chain(make_step(program.grad_fn, make(OPTIMISER, program.specs, steps=STEPS)), *transforms)
    return program, step, jax.jit(step.init)(program.init(jax.random.key(0)), KEY)


@pytest.mark.parametrize("name", STRATEGIES)
def test_gradients_are_those_of_each_microbatch_on_its_route(name):
    program, step, state = step_of(name)
    batch = batch_of(0)
    route = STRATEGIES[name].route(state.step, state.key, CFG.layers)
    m = STRATEGIES[name].microbatches
    gradients = jax.jit(jax.grad(lambda p, b, r: program.eval_fn(p, b, r)[0]))
    parts = [
        gradients(
            state.params,
            jax.tree.map(lambda x, i=i: x[i::m], batch),
            jax.tree.map(lambda x, i=i: x[i], route),
        )
        for i in range(m)
    ]
    found = jax.jit(step.gradients)(state, batch, None)
    for a, *b in zip(jax.tree.leaves(found.grads), *map(jax.tree.leaves, parts), strict=True):
        np.testing.assert_allclose(a, sum(b), rtol=1e-4, atol=1e-5)
    metrics = jax.jit(step.update)(state, batch)[1]
    ran = route.keep.mean() if route.keep is not None else route.layers.shape[1] / CFG.layers
    assert metrics["skipping/kept"] == pytest.approx(float(ran))


def test_evaluation_runs_the_whole_model_in_order():
    program, _, state = step_of("paths")
    from jaxpar.models import decoder
    from jaxpar.models.context import Context
    from jaxpar.models.route import Route

    batch = batch_of(0)
    ctx = Context(batch.positions, batch.segments)
    whole = decoder.loss(CFG, state.params, batch.tokens, batch.targets, batch.weights, ctx).loss_sum
    np.testing.assert_allclose(program.eval_fn(state.params, batch)[0], whole, rtol=1e-6)
    some = jax.jit(program.eval_fn)(state.params, batch, Route(layers=jnp.array([0, 2])))[0]
    assert abs(float(some - whole)) > 1e-3 * float(whole)


def test_accumulation_inside_takes_the_same_routes():
    """Four microbatches of a route are two parts of two: rows are dealt to both alike."""
    _, whole, state = step_of("swaps")
    _, parts, _ = step_of("swaps", 2)
    batch = batch_of(0)
    a = jax.jit(whole.gradients)(state, batch, None)
    swapped = [i for i in range(ROWS) if i % 2]
    straight = [i for i in range(ROWS) if not i % 2]
    # The rows so that part p's microbatch q has the rows of class q.
    places = [None] * ROWS
    for i in range(ROWS):
        places[i] = (straight if i // 2 % 2 == 0 else swapped).pop(0)
    b = jax.jit(parts.gradients)(state, jax.tree.map(lambda x: x[np.array(places)], batch), None)
    for x, y in zip(jax.tree.leaves(a.grads), jax.tree.leaves(b.grads), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["layer-drop", "swaps"])
@pytest.mark.parametrize("mesh", ["data=2,stage=2", "stage=4", "tensor=2,sequence=2"])
def test_routes_on_meshes_are_those_of_one_device(name, mesh, devices):
    """The stage dimension sharded over its axis, and by hand over the sequence: the same gradients."""
    sizes = MeshConfig.parse(mesh)
    program = build(
        CFG, make_mesh(sizes, devices[: np.prod(list(sizes.sizes.values()))]), rows=ROWS, length=16, staged=False
    )
    tx = make(OPTIMISER, program.specs, steps=STEPS)
    step = chain(make_step(program.grad_fn, tx), skipping(STRATEGIES[name], CFG.layers))
    _, one, state = step_of(name)
    expected = jax.jit(one.gradients)(state, batch_of(0), None)
    params = jax.device_put(state.params, program.param_shardings)
    key, count = (jax.device_put(x, jax.NamedSharding(program.mesh, jax.P())) for x in (state.key, state.step))
    batch = jax.tree.map(lambda x: jax.device_put(x, program.batch_sharding), batch_of(0))
    found = jax.jit(lambda p, k, s, b: step.gradients(state.replace(params=p, key=k, step=s), b, None))(
        params, key, count, batch
    )
    np.testing.assert_allclose(found.loss_sum, expected.loss_sum, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(found.grads), jax.tree.leaves(expected.grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (lambda: LayerDrop(rate=1.0), "rate = 1.0 must be at least 0 and below 1 .that leaves no layer"),
        (lambda: StochasticDepth(rate=-0.1), "rate = -0.1 must be at least 0"),
        (lambda: ProgressiveLayerDrop(limit=0.0), "limit = 0.0 must be above 0"),
        (lambda: SkipPaths(stages=4, skipped=4), "skipped = 4 of stages = 4 leaves no stage besides the first"),
        (lambda: SwapEnds(stages=3), "stages = 3 are too few to swap"),
        (
            lambda: SkipPaths(4, stages=3).check(8, 8),
            "stages = 3 do not divide the model's 8 layers.*nearest that works: 2",
        ),
        (lambda: SwapEnds(stages=4).check(2, 8), "give the model a multiple of 4 layers"),
        (lambda: LayerDrop(3).check(4, 8), "8 rows do not divide into layer-drop's microbatches = 3.*nearest: 9"),
        (lambda: LayerDrop(4).check(4, 8, 4), "on each of 4 devices; choose a multiple of 16 rows"),
        (lambda: LayerDrop(0), "microbatches = 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_sentence(make_it, sentence):
    with pytest.raises(UserError, match=sentence):
        make_it()


@pytest.mark.quick
def test_a_run_takes_a_strategy_by_name():
    """`jaxpar train tiny --skipping layerdrop --skipping.rate 0.5`."""
    words = ["--skipping", "layerdrop", "--skipping.rate", "0.5", "--skipping.microbatches", "2"]
    config = options.parse(tiny(), words, prog="jaxpar train")
    assert config.skipping == LayerDrop(2, rate=0.5)
    assert not config.staged({"stage": 2})
    assert tiny().staged({"stage": 2})
    assert len(config.transforms()) == len(tiny().transforms()) + 1
    paths = options.parse(tiny(), ["--skipping", "skip_paths"], prog="jaxpar train")
    with pytest.raises(UserError, match="stages = 4 do not divide the model's 2 layers"):
        paths.check({"data": 1, "fsdp": 1})


@pytest.mark.quick
def test_swaps_under_what_is_skipped_by_chance():
    """What is drawn belongs to a layer, in whichever place it runs; microbatches become an even number."""
    drop = StochasticDepth(3, rate=0.6)
    both = with_swaps(drop, 4, "or")
    assert both.microbatches == 6
    swapped, drawn = both.route(5, KEY, 8), replace(drop, microbatches=6).route(5, KEY, 8)
    np.testing.assert_array_equal(swapped.layers[1::2], np.tile([2, 3, 0, 1, 6, 7, 4, 5], (3, 1)))
    np.testing.assert_array_equal(swapped.layers[::2], np.tile(np.arange(8), (3, 1)))
    for name in ("keep", "scale"):
        found, one = np.array(getattr(swapped, name)), np.array(getattr(drawn, name))
        for m in range(6):
            np.testing.assert_array_equal(found[m][np.argsort(np.array(swapped.layers[m]))], one[m])
    assert not np.array_equal(drawn.keep, swapped.keep)
    assert with_swaps(None, 6, "or") == SwapEnds(2, stages=6) == with_swaps(SwapEnds(2, stages=6), 6, "or")
    with pytest.raises(UserError, match="skip-paths with stages = 4 has an order of its own"):
        with_swaps(SkipPaths(), 4, "or")
    with pytest.raises(UserError, match="9 rows do not divide into swap-ends's microbatches = 6"):
        both.check(4, 9)


def test_a_pipeline_refuses_routes(devices):
    program = build(CFG, make_mesh(MeshConfig(stage=2), devices[:2]), rows=ROWS, length=16)
    step = chain(make_step(program.grad_fn, make(OPTIMISER, program.specs, steps=STEPS)), skipping(LayerDrop(2), 4))
    state = jax.eval_shape(step.init, program.init(jax.random.key(0)), KEY)
    with pytest.raises(ValueError, match=r"set pipeline\.schedule to skippipe"):
        jax.eval_shape(step.update, state, batch_of(0))
