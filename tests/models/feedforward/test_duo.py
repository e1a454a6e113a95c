"""Two modules a layer: against dense models of either one, the choices of chance and of routers, and oracles by brute force."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import flops
from jaxpar.executed import executed_flops
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.models.feedforward.duo import BIG, SKIP, SMALL, Duo, Tally, with_routers
from jaxpar.models.routing import oracle

CFG = ModelConfig(
    vocabulary=32, layers=3, width=16, heads=2, hidden=32, context=64, feedforward=Duo(small=1 / 8), init_std=0.3
)
PARAMS = jax.jit(decoder.init, static_argnums=0)(CFG, jax.random.key(0))
TOKENS = jax.random.randint(jax.random.key(1), (2, 9), 0, 32)
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]
losses_of = jax.jit(oracle.losses_of, static_argnums=0)
ALL = oracle.routes(3)


def dense(module: str, hidden: int):
    """The same model with one module alone."""
    feedforward = PARAMS["layers"]["feedforward"]
    own = {**feedforward[module], "norm": feedforward["norm"]}
    return (
        CFG.replace(feedforward=GatedMLP(), hidden=hidden),
        {**PARAMS, "layers": {**PARAMS["layers"], "feedforward": own}},
    )


@partial(jax.jit, static_argnums=0)
def losses(cfg, params):
    return oracle.token_losses(decoder.apply(cfg, params, INPUTS).logits, TARGETS)


@pytest.mark.quick
def test_a_route_of_one_module_is_the_dense_model_of_it():
    by_route = losses_of(CFG, PARAMS, INPUTS, TARGETS, np.array([[BIG] * 3, [SMALL] * 3, [SKIP] * 3]))
    np.testing.assert_allclose(by_route[0], losses(*dense("big", 32)), atol=1e-5)
    np.testing.assert_allclose(by_route[1], losses(*dense("small", 4)), atol=1e-5)
    cfg, params = dense("big", 32)
    down = params["layers"]["feedforward"]["down"]["kernel"]
    params["layers"]["feedforward"] = {**params["layers"]["feedforward"], "down": {"kernel": 0 * down}}
    np.testing.assert_allclose(by_route[2], losses(cfg, params), atol=1e-5)
    # Without a key, and nothing said, every token takes the big module.
    np.testing.assert_allclose(losses(CFG, PARAMS), by_route[0], atol=1e-5)


@partial(jax.jit, static_argnums=0)
def loss_and_gradients(cfg, params, key, modules=None):
    ctx = Context(key=key, sample_ids=jnp.arange(2), modules=modules)
    run = lambda params: decoder.loss(cfg, params, INPUTS, TARGETS, None, ctx).loss_sum
    return jax.value_and_grad(run)(params)


def choices(key, skip):
    """By hand: the module of each token in each layer, [L, B, T]."""
    fold = jax.random.fold_in
    found = np.empty((3, 2, 8), int)
    for layer, row, place in np.ndindex(3, 2, 8):
        u = jax.random.uniform(fold(fold(fold(fold(key, layer), 3), row), place))
        found[layer, row, place] = BIG if u < 0.5 else SKIP if u < 0.5 + skip else SMALL
    return found


def test_chance_routes_every_token_in_every_layer_by_itself():
    cfg = CFG.replace(feedforward=replace(CFG.feedforward, skip=0.25))
    key = jax.random.key(7)
    modules = choices(key, 0.25)
    assert set(modules.ravel()) == {SMALL, BIG, SKIP}
    chance = loss_and_gradients(cfg, PARAMS, key)
    named = loss_and_gradients(cfg, PARAMS, key, jnp.asarray(modules))
    for a, b in zip(jax.tree.leaves(chance), jax.tree.leaves(named), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert all(np.any(g) for g in jax.tree.leaves(chance[1]["layers"]["feedforward"]["small"]))
    assert not np.allclose(loss_and_gradients(cfg, PARAMS, jax.random.key(8))[0], chance[0])


LEARNED, WITH_ROUTERS = with_routers(CFG, PARAMS, jax.random.key(3), budget=0.25, strength=10.0)


@partial(jax.jit, static_argnums=0)
def mixed(cfg, params, key):
    """Cross-entropy of a training pass by its logits, and what its routers counted."""
    ctx = Context(key=key, sample_ids=jnp.arange(2))
    state, aux = decoder.through(cfg, params, decoder.embed(cfg, params, INPUTS, ctx), ctx)
    return oracle.token_losses(decoder.head(cfg, params, state, ctx), TARGETS).sum(), aux.tally


def test_routers_mix_in_training_and_hold_the_budget():
    """The loss is the cross-entropy of the mixed model, and each row's distance from the budget."""
    key = jax.random.key(0)
    for sign in (0.0, 1.0):  # P = 1/2 everywhere, then as drawn
        params = jax.tree.map(lambda x: x, WITH_ROUTERS)
        params["layers"]["feedforward"]["router"] = sign * params["layers"]["feedforward"]["router"]
        total, grads = loss_and_gradients(LEARNED, params, key)
        plain, tally = mixed(LEARNED, params, key)
        # 2 rows of 8 tokens in 3 layers, strength 10, budget 1/4.
        np.testing.assert_array_equal(tally.tokens, [24, 24])
        by_hand = 10 * 8 * np.square(np.asarray(tally.big) / 24 - 0.25).sum()
        assert float(total - plain) == pytest.approx(by_hand, rel=1e-3)
        assert sign or by_hand == pytest.approx(10 * 16 * 0.25**2)
        assert np.any(grads["layers"]["feedforward"]["router"])
    # Where the budget is what the routers do, nothing is added.
    weights = jnp.ones((2, 8))
    assert Duo(budget=0.5).penalty(CFG, Tally(jnp.full(2, 12.0), jnp.full(2, 24.0)), Context(), weights) == 0


def test_a_hard_temperature_is_the_argmax_and_decoding_is_the_whole_text_at_once():
    hard = LEARNED.replace(feedforward=replace(LEARNED.feedforward, temperature=1e-6))
    whole = jax.jit(lambda p: decoder.apply(LEARNED, p, INPUTS).logits)(WITH_ROUTERS)
    soft, _ = mixed(hard, WITH_ROUTERS, jax.random.key(0))
    np.testing.assert_allclose(soft, oracle.token_losses(whole, TARGETS).sum(), rtol=1e-4)
    cache = kv.empty(LEARNED, 2, 8)
    step = jax.jit(partial(decoder.forward, LEARNED))
    for t in range(8):
        logits, cache = step(WITH_ROUTERS, INPUTS[:, t : t + 1], cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=1e-4)


def test_flops_match_the_routes():
    """Of a decoding step only the chosen modules run; training runs both."""
    cache, token = kv.empty(CFG, 1, 8), INPUTS[:1, :1]
    small, big, none = CFG.feedforward.flops_of(CFG)

    def cost(route):
        modules = jnp.asarray(route)[:, None, None]
        run = lambda params: decoder.advance(CFG, params, token, Context(cache=cache, modules=modules))[0]
        return executed_flops(run, PARAMS)

    rest = cost([SKIP] * 3)
    assert cost([SMALL, BIG, SKIP]) - rest == small + big + none
    assert cost([BIG] * 3) - rest == 3 * big
    assert (small, big, none) == (2 * 3 * 16 * 4, 2 * 3 * 16 * 32, 0)
    assert flops.forward(CFG, 8).feedforward == 3 * (small + big)
    assert LEARNED.feedforward.flops(LEARNED) == small + big + 2 * 16 * 2


def test_the_uniform_oracle_is_below_every_fixed_route_and_more_routes_never_hurt():
    every = np.asarray(losses_of(CFG, PARAMS, INPUTS, TARGETS, ALL))
    for b in range(4):
        mine = every[(ALL == BIG).sum(1) == b]
        assert len(mine) == oracle.count(3, b) == len(oracle.routes(3, b))
        assert mine.min(0).mean() <= mine.mean((1, 2)).min() + 1e-6
        assert every.min(0).mean() <= mine.min(0).mean() + 1e-6
    hard = oracle.difficulty(every[0], every.min(0))
    assert (hard >= 0).all()
    assert (hard > 0).any()
    np.testing.assert_array_equal(hard == 0, every.argmin(0) == 0)
    assert len(oracle.routes(3, skip=True)) == oracle.count(3, None, skip=True) == 27
    assert len(oracle.routes(3, 1, skip=True)) == oracle.count(3, 1, skip=True) == 12


def test_the_sequential_oracle_is_brute_force_over_prefixes():
    """Every prefix run anew with the modules taken so far: no cache, no batch of routes."""
    candidates = oracle.routes(3, 1)
    run = jax.jit(partial(oracle.sequential, CFG))
    found, taken = run(PARAMS, INPUTS[:, :4], TARGETS[:, :4], candidates)
    forward = jax.jit(lambda tokens, modules: decoder.apply(CFG, PARAMS, tokens, Context(modules=modules)).logits)
    for row in range(2):
        modules = np.full((3, 1, 4), SMALL)
        for t in range(4):
            by_route = []
            for candidate in candidates:
                modules[:, 0, t] = candidate
                logits = forward(INPUTS[row : row + 1, :4], jnp.asarray(modules))
                by_route.append(float(oracle.token_losses(logits, TARGETS[row : row + 1, :4])[0, t]))
            assert int(taken[row, t]) == int(np.argmin(by_route))
            assert float(found[row, t]) == pytest.approx(min(by_route), abs=1e-4)
            modules[:, 0, t] = candidates[int(np.argmin(by_route))]


def test_the_null_control_is_the_big_model_with_noise_of_a_given_size():
    run = jax.jit(partial(oracle.perturbed, CFG), static_argnums=5)
    at = lambda sigma: np.asarray(run(PARAMS, INPUTS, TARGETS, sigma, jax.random.key(5), 4))
    np.testing.assert_allclose(at(0.0), np.tile(losses(CFG, PARAMS), (4, 1, 1)), atol=1e-5)
    noisy = at(0.3)
    assert len({float(x) for x in noisy.mean((1, 2))}) == 4
    assert noisy.min(0).mean() < noisy.mean()
    assert oracle.spread(noisy) == pytest.approx(noisy.std(0).mean(), rel=1e-5)
    assert oracle.matched(lambda sigma: sigma**2, 0.09) == pytest.approx(0.3, abs=1e-5)
    assert oracle.matched(lambda sigma: sigma, 7.0, high=2.0) == 2.0


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Duo(budget=1.5), "budget = 1.5 is outside 0 to 1"),
        (lambda: Duo(big=0.8, skip=0.4), "together 1.2"),
        (lambda: Duo(small=0.0), "small = 0.0"),
        (lambda: Duo(temperature=0.0), "temperature = 0.0 must be above 0"),
        (lambda: CFG.replace(hidden=4, feedforward=Duo(small=1 / 16)), "small module of 0 units"),
        (lambda: oracle.routes(3, 4), "budget of 4 big modules is outside 0 to the model's 3 layers"),
    ],
)
def test_bad_input_is_one_sentence(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.quick
def test_both_modules_may_be_plain():
    cfg = CFG.replace(feedforward=Duo(small=1 / 8, module=MLP()))
    specs = decoder.spec(cfg)["layers"]["feedforward"]
    assert specs["small"]["up"]["kernel"].shape == (3, 16, 4)
    assert specs["big"]["up"]["bias"].shape == (3, 32)
