"""Decoding through exits where the residual operator looks at earlier tokens: what it keeps of tokens that left is there for those
behind them, exactly or propagated as keys and values are."""

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
from jaxpar.adaptive.threshold import Threshold
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.models.exits.config import Exits, OwnNorm
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.residual.short_window import ShortWindow
from jaxpar.models.spec import path_name
from jaxpar.sampling import Sampler

WINDOW = ModelConfig(
    vocabulary=61,
    layers=4,
    width=16,
    heads=2,
    hidden=24,
    context=128,
    init_std=0.4,
    exits=Exits((1, 3), OwnNorm()),
    residual=ShortWindow(3),
)
TOKENS = WINDOW.replace(residual=DeepDelta(channels=2, compressor="tokens", embedding="convolution"))
PARTS = [(0, 1), (1, 3), (3, 4)]
PROMPTS, NEW, LENGTH = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3]], 20, 32
RECOMPUTE, PROPAGATE = ExitEarly(remedy=Recompute(3)), ExitEarly(remedy=Propagate())
MIDDLE = 0.15
"""A threshold at which tokens leave by every exit."""
every_model = pytest.mark.parametrize("cfg", [WINDOW, TOKENS], ids=lambda cfg: type(cfg.residual).__name__)


@cache
def params(cfg):
    """Initial parameters, with noise on the operator's so that no convolution is the identity."""
    draw = np.random.default_rng(1)
    noise = lambda path, x: ("residual/" in path_name(path)) * 0.3 * draw.standard_normal(x.shape).astype(np.float32)
    fresh = jax.jit(decoder.init, static_argnums=0)(cfg, jax.random.key(1))
    return jax.tree_util.tree_map_with_path(lambda path, x: x + noise(path, x), fresh)


def silent(cfg):
    """Those of a model whose layers behind the first exit leave the stream as it is."""
    found = jax.tree.map(lambda x: x, params(cfg))
    layers = found["layers"]
    kernels = [layers["attention"]["out"], layers["feedforward"]["down"]]
    names = ["kernel"] * 2
    if isinstance(cfg.residual, ShortWindow):
        kernels, names = [*kernels, layers["residual"]], [*names, "value"]
    for own, name in zip(kernels, names, strict=True):
        own[name] = own[name].at[1:].set(0.0)
    return found


def at(policy, value):
    return replace(policy, threshold=Threshold(value))


def caches_behind(cfg, policy, value, own):
    """The parts' caches at the end, and the rows (prompt and new tokens, the last of which was never run)."""
    rows = prepared(cfg, PROMPTS, NEW, (999,), policy.remedy.window + 1)
    stack = Stack(cfg, (1, 3), Ops(), cfg.vocabulary)
    limit, key = jnp.asarray(NEW, jnp.int32), jax.random.key(0)
    out, *_, caches = decode._run(
        stack, at(policy, 0.5), Sampler(), rows.capacity, rows.room, own, None, rows.tokens, rows.counts,
        jnp.float32(value), limit, rows.stop, key,
    )  # fmt: skip
    return caches, [[*p, *np.asarray(row)[:NEW].tolist()] for p, row in zip(PROMPTS, out, strict=True)]


def padded(rows):
    return jnp.asarray([row + [0] * (LENGTH - len(row)) for row in rows])


asked = jax.jit(seen, static_argnums=(0, 3))
forward = jax.jit(decoder.forward, static_argnums=0)


def full_pass(cfg, own, rows):
    return forward(cfg, own, padded(rows), kv.empty(cfg, 2, 64))[1]


def assert_kept(part, whole, layers, row, slots):
    """Keys, values and what the operator keeps, of some slots of a row, are those of these layers in a full pass."""
    (first, last), kept = layers, lambda cache: jax.tree.leaves((cache.k, cache.v, cache.behind))
    for ours, theirs in zip(kept(part), kept(whole), strict=True):
        np.testing.assert_allclose(ours[:, row, slots], theirs[first:last, row, slots], rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("policy", [RECOMPUTE, PROPAGATE], ids=["recompute", "propagate"])
def test_a_threshold_that_never_fires_is_plain_greedy_decoding(cfg, policy):
    found = exit_early(cfg, params(cfg), PROMPTS, at(policy, 1.0), new_tokens=NEW, stop=(999,))
    assert found.rows == generation.generate(cfg, params(cfg), PROMPTS, new_tokens=NEW, stop=(999,))
    assert found.exits == [0, 0, NEW]


@every_model
def test_recomputed_tokens_keep_what_a_full_pass_keeps(cfg):
    caches, rows = caches_behind(cfg, RECOMPUTE, MIDDLE, params(cfg))
    full = full_pass(cfg, params(cfg), rows)
    for row, text in enumerate(rows):
        for part, layers in zip(caches, PARTS, strict=True):
            n = int(part.lens[row])
            assert len(text) - 3 <= n <= len(text)  # no more than three wait
            assert_kept(part, full, layers, row, slice(n))
        if cfg is TOKENS:  # every token is noted, whatever layer it left behind
            assert caches[0].tokens[row, : len(text)].tolist() == text


@every_model
def test_a_row_alone_says_what_its_exits_say(cfg):
    """With recomputed streams every choice is the full pass's at the exit taken: asked there for the whole text."""
    prompt = PROMPTS[1]
    found = exit_early(cfg, params(cfg), [prompt], at(RECOMPUTE, MIDDLE), new_tokens=NEW, stop=(999,))
    assert min(found.exits) > 0, found.exits
    text = [*prompt, *found.rows[0]]
    told = asked(cfg, params(cfg), padded([text]), TopTwo())
    sure, said = np.asarray(told.confidence)[:, 0], np.asarray(told.tokens)[:, 0]
    waiting = 0
    for place in range(len(prompt), len(text) - 1):
        number = next((i for i in range(2) if sure[i, place] > MIDDLE and waiting < 3), 2)
        assert text[place + 1] == said[number, place], (place, number)
        waiting = 0 if number == 2 else waiting + 1


@every_model
def test_propagated_streams_are_those_of_layers_that_add_nothing(cfg):
    """Every new token leaves behind layer 1, after a full pass of the prompt."""
    own = silent(cfg)
    caches, rows = caches_behind(cfg, PROPAGATE, 0.0, own)
    full = full_pass(cfg, own, rows)
    for row, prompt in enumerate(PROMPTS):
        for part, layers in zip(caches, PARTS, strict=True):
            assert int(part.lens[row]) == len(rows[row])
            assert_kept(part, full, layers, row, slice(len(prompt), len(rows[row])))


@every_model
def test_the_layer_behind_the_exit_has_exact_keys_and_the_next_has_not(cfg):
    """Keys are made of what the operator reads of the exit's states: the first layer above is given just those."""
    caches, rows = caches_behind(cfg, PROPAGATE, 0.0, params(cfg))
    full = full_pass(cfg, params(cfg), rows)
    for row, prompt in enumerate(PROMPTS):
        new = slice(len(prompt), len(rows[row]))
        first, second = (np.abs(caches[1].k[i, row, new] - full.k[1 + i, row, new]).max() for i in (0, 1))
        assert first < 1e-4
        assert second > 0.1
