"""Exits of models whose layers route: tokens of plain decoding where exits never fire or drafts are verified, what the full pass
says at the exit where they do, and holes where the model has them."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import generation
from jaxpar.adaptive import decode
from jaxpar.adaptive.confidence import TopTwo
from jaxpar.adaptive.decode import exit_early
from jaxpar.adaptive.policy import ExitEarly, Propagate, Recompute
from jaxpar.adaptive.prompts import Stack, prepared
from jaxpar.adaptive.seen import seen
from jaxpar.adaptive.speculate import speculate
from jaxpar.adaptive.threshold import Threshold
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.models.exits.config import Exits, OwnNorm
from jaxpar.models.feedforward.duo import Duo
from jaxpar.models.routing.depth import MixtureOfDepths
from jaxpar.sampling import Sampler

PLAIN = ModelConfig(
    vocabulary=61, layers=4, width=32, heads=4, kv_heads=2, hidden=48, context=64, init_std=0.3,
    exits=Exits((2,), OwnNorm()),
)  # fmt: skip
MODELS = {
    "two modules": PLAIN.replace(feedforward=Duo(small=1 / 8, routing="learned", skip=0.2)),
    "mixture of depths": PLAIN.replace(depth=MixtureOfDepths(capacity=0.5, predictor=8)),
}
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3]]
NEW, MIDDLE = 12, 0.15
"""New tokens, and a threshold at which they leave by the exit and by the last layer."""
RECOMPUTE, PROPAGATE = ExitEarly(remedy=Recompute(3)), ExitEarly(remedy=Propagate())
each_model = pytest.mark.parametrize("name", MODELS)


@cache
def params(name):
    return jax.jit(decoder.init, static_argnums=0)(MODELS[name], jax.random.key(1))


@cache
def greedy(name):
    return generation.generate(MODELS[name], params(name), PROMPTS, new_tokens=NEW, stop=[999])


def left(name, policy, value, prompts=PROMPTS):
    policy = replace(policy, threshold=Threshold(value))
    return exit_early(MODELS[name], params(name), prompts, policy, new_tokens=NEW, stop=(999,))


@each_model
def test_what_never_leaves_and_what_is_verified_is_plain_greedy_decoding(name):
    for policy in (RECOMPUTE, PROPAGATE):
        found = left(name, policy, 1.0)
        assert found.rows == greedy(name)
        assert found.exits == [0, NEW]
    drafted = speculate(MODELS[name], params(name), PROMPTS, new_tokens=NEW, layer=2, draft=3, stop=(999,))
    assert drafted.rows == greedy(name)
    assert 0 < drafted.acceptance < 1


@each_model
def test_a_row_alone_says_what_its_exits_say(name):
    """With recomputed keys and values, every choice is the full pass's at the exit taken, routers' choices included: a router
    looks at one token alone, so tokens that waited are routed as they would have been."""
    [prompt, _] = PROMPTS
    found = left(name, RECOMPUTE, MIDDLE, [prompt])
    assert min(found.exits) > 0, found.exits
    text = [*prompt, *found.rows[0]]
    told = jax.jit(seen, static_argnums=(0, 3))(MODELS[name], params(name), jnp.asarray([text]), TopTwo())
    sure, said, waiting = np.asarray(told.confidence)[:, 0], np.asarray(told.tokens)[:, 0], 0
    for place in range(len(prompt), len(text) - 1):
        leaves = sure[0, place] > MIDDLE and waiting < 3
        assert text[place + 1] == said[0 if leaves else 1, place], place
        waiting = waiting + 1 if leaves else 0


def test_propagated_tokens_have_holes_where_layers_that_add_nothing_would_not_pick_them():
    """Every new token left behind layer 2 of 4: keys, values and holes of the others are those of a model where they add nothing."""
    cfg, own = MODELS["mixture of depths"], params("mixture of depths")
    rows = prepared(cfg, PROMPTS, NEW, (999,), 1)
    fixed = Stack(cfg, (2,), Ops(), 61), replace(PROPAGATE, threshold=Threshold(0.5)), Sampler()
    limit, key = jnp.asarray(NEW, jnp.int32), jax.random.key(0)
    out, *_, caches = decode._run(
        *fixed, rows.capacity, rows.room, own, None, rows.tokens, rows.counts, jnp.float32(0.0), limit, rows.stop, key
    )
    silent = {**own["layers"]}
    for branch, name in (("attention", "out"), ("feedforward", "down")):
        kernel = silent[branch][name]["kernel"]
        silent[branch] = {**silent[branch], name: {"kernel": kernel.at[2:].set(0.0)}}
    texts = [[*p, *np.asarray(row)[:NEW].tolist()] for p, row in zip(PROMPTS, out, strict=True)]
    tokens = jnp.asarray([text + [0] * (32 - len(text)) for text in texts])
    forward = jax.jit(decoder.forward, static_argnums=0)
    full = forward(cfg, {**own, "layers": silent}, tokens, kv.empty(cfg, 2, 64))[1]
    for row, prompt in enumerate(PROMPTS):
        new = slice(len(prompt), len(texts[row]))
        there = np.asarray(full.there[2:, row, new])
        np.testing.assert_array_equal(caches[1].there[:, row, new], there)
        assert there[0].all()  # of the two the last picks its tokens
        assert 0 < there[1].mean() < 1
        for name in ("k", "v"):
            ours, theirs = getattr(caches[1], name)[:, row, new], getattr(full, name)[2:, row, new]
            np.testing.assert_allclose(ours[there], theirs[there], rtol=1e-4, atol=1e-5)
