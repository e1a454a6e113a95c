"""Routes through the stack: what runs, what is learned, and what it costs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.executed import executed_flops
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.route import Route

CFG = ModelConfig(
    vocabulary=64,
    layers=6,
    width=16,
    heads=2,
    hidden=32,
    window=4,
    window_pattern=(True, False),
    dropout=0.1,
    init_std=0.1,
)
TOKENS = jax.random.randint(jax.random.key(1), (2, 8), 0, 64)
TARGETS = jnp.roll(TOKENS, -1, axis=1)
PARAMS = decoder.init(CFG, jax.random.key(0))
ORDER = [0, 2, 1, 5]


def context(route=None):
    return Context(key=jax.random.key(3), sample_ids=jnp.arange(2), route=route)


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(cfg, params, route=None):
    return jax.value_and_grad(lambda p: decoder.loss(cfg, p, TOKENS, TARGETS, ctx=context(route)).loss_sum)(params)


@partial(jax.jit, static_argnums=(0, 2))
def by_slices(cfg, params, order):
    """The same by hand: `blocks` on one layer after the other."""

    def loss(params):
        ctx = context()
        state = decoder.embed(cfg, params, TOKENS, ctx)
        for layer in order:
            one = jax.tree.map(lambda x, layer=layer: x[layer : layer + 1], params["layers"])
            state, _ = decoder.blocks(cfg, one, state, ctx, first_layer=layer)
        return decoder.head(cfg, params, state, ctx, TARGETS).loss_sum

    return jax.value_and_grad(loss)(params)


def assert_close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * float(jnp.max(jnp.abs(b)) + 1e-6))


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_a_route_is_its_layers_one_after_the_other(loop):
    """Windows and dropout stay those of the layer, wherever in the route it runs."""
    cfg = CFG.replace(layer_loop=loop)
    found = loss_and_gradients(cfg, PARAMS, Route(layers=jnp.array(ORDER)))
    assert_close(found, by_slices(cfg, PARAMS, tuple(ORDER)))


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_whole_stack_as_a_route_is_the_model(remat):
    cfg = CFG.replace(remat=remat)
    everything = Route(layers=jnp.arange(6), keep=jnp.ones(6, bool), scale=jnp.ones(6))
    assert_close(loss_and_gradients(cfg, PARAMS, everything), loss_and_gradients(cfg, PARAMS))


def test_layers_by_chance_are_those_that_are_kept():
    keep = jnp.array([True, False, True, True, False, True])
    found = loss_and_gradients(CFG, PARAMS, Route(keep=keep))
    assert_close(found, by_slices(CFG, PARAMS, (0, 2, 3, 5)))


@pytest.mark.quick
@pytest.mark.parametrize(
    "route",
    [Route(layers=jnp.array(ORDER)), Route(keep=jnp.isin(jnp.arange(6), jnp.array(ORDER)))],
    ids=["path", "chance"],
)
def test_what_is_skipped_is_not_looked_at(route):
    """Its gradient is exactly zero, and what it holds, NaN even, goes nowhere."""
    skipped = np.array([3, 4])
    broken = {**PARAMS, "layers": jax.tree.map(lambda x: x.at[skipped].set(jnp.nan), PARAMS["layers"])}
    loss, grads = loss_and_gradients(CFG, broken, route)
    assert jnp.isfinite(loss)
    for g in jax.tree.leaves(grads["layers"]):
        assert np.all(np.isfinite(g))
        assert np.all(np.asarray(g)[skipped] == 0)
        assert np.any(np.asarray(g)[2] != 0)


def test_scale_multiplies_what_a_layer_adds():
    state = decoder.embed(CFG, PARAMS, TOKENS, Context())
    run = lambda route: decoder.through(CFG, PARAMS, state, Context(route=route))[0]
    whole = run(Route(layers=jnp.array([2])))
    half = run(Route(layers=jnp.array([2]), scale=jnp.array([0.5])))
    np.testing.assert_allclose(half, (state + whole) / 2, rtol=1e-5, atol=1e-6)


def masked(cfg, params, keep):
    """What a route must not be: every layer computed, and chosen away."""
    ctx = context()
    state = decoder.embed(cfg, params, TOKENS, ctx)
    for layer in range(cfg.layers):
        one = jax.tree.map(lambda x, layer=layer: x[layer : layer + 1], params["layers"])
        new, _ = decoder.blocks(cfg, one, state, ctx, first_layer=layer)
        state = jnp.where(keep[layer], new, state)
    return decoder.head(cfg, params, state, ctx, TARGETS).loss_sum


def test_skipped_layers_cost_nothing():
    """Executed FLOPs of a training step fall in proportion; those of a masked model do not."""
    cfg = CFG.replace(layers=3, dropout=0.0)
    params = decoder.init(cfg, jax.random.key(0))
    loss = lambda p, route: decoder.loss(cfg, p, TOKENS, TARGETS, ctx=context(route)).loss_sum
    executed = lambda f, *args: executed_flops(jax.grad(f), params, *args)
    keep = lambda n: jnp.arange(3) < n
    none, all_three = executed(loss, Route(keep=keep(0))), executed(loss, None)
    assert all_three > none > 0
    assert executed(loss, Route(keep=keep(1))) == none + (all_three - none) / 3
    assert executed(loss, Route(layers=jnp.arange(2))) == none + (all_three - none) / 3 * 2
    assert executed(lambda p, keep: masked(cfg, p, keep), keep(1)) == all_three


def test_compiled_flops_of_a_path_fall_in_proportion():
    cfg = CFG.replace(layer_loop="unroll", dropout=0.0)
    loss = lambda p, route: decoder.loss(cfg, p, TOKENS, TARGETS, ctx=context(route)).loss_sum

    def compiled(n):
        return jax.jit(jax.grad(loss)).lower(PARAMS, Route(layers=jnp.arange(n))).compile().cost_analysis()["flops"]

    two, four, six = (compiled(n) for n in (2, 4, 6))
    assert (six - four) == pytest.approx(four - two, rel=0.02)
    assert (six - two) / six > 0.5


def test_generation_takes_a_route():
    """A cache holds the route's layers; token by token gives what all at once gives."""
    cfg = CFG.replace(dropout=0.0)
    route = Route(layers=jnp.array(ORDER))
    whole = decoder.apply(cfg, PARAMS, TOKENS, Context(route=route)).logits
    cache = kv.empty(cfg.replace(layers=len(ORDER)), 2, 8)
    ctx = lambda cache: Context(route=route, cache=cache)
    rows = []
    step = jax.jit(lambda tokens, cache: decoder.apply(cfg, PARAMS, tokens, ctx(cache)))
    for t in range(8):
        found = step(TOKENS[:, t : t + 1], cache)
        cache = found.aux.cache.replace(lens=cache.lens + 1)
        rows.append(found.logits[:, 0])
    np.testing.assert_allclose(jnp.stack(rows, 1), whole, rtol=1e-4, atol=1e-4)
