"""Self-speculation gives plain greedy decoding's tokens, whatever the draft: exits that are always right, never right, and
in between; ragged rows; stops anywhere in a round."""

from functools import cache

import jax
import numpy as np
import pytest

from jaxpar import generation
from jaxpar.adaptive.speculate import _run, speculate
from jaxpar.errors import UserError
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.exits.config import Exits, OwnNorm
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.residual.mudd import MuddFormer

CFG = ModelConfig(
    vocabulary=61,
    layers=3,
    width=32,
    heads=4,
    kv_heads=2,
    hidden=48,
    context=128,
    init_std=0.3,
    exits=Exits((1, 2), OwnNorm()),
)
DELTA = CFG.replace(
    residual=DeepDelta(channels=2, compressor="tokens", embedding="convolution"), window=6, window_pattern=(True, False)
)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [58]]
NEW = 20
VOCABULARY = 50
"""Of the 61 ids, those behind are padding, and are never chosen: neither by the model nor by the draft."""
NEVER = (998, 999)
"""Ids that end no row: as many as elsewhere end some, so that one program serves both."""


@cache
def first(cfg):
    return jax.jit(decoder.init, static_argnums=0)(cfg, jax.random.key(0))


@cache
def params_of(cfg, kind):
    """right: layers behind the first add nothing, so that every exit says what the last layer says; near: they add little;
    wrong: exits see the stream turned around."""
    params = first(cfg)
    share = {"right": 0.0, "near": 0.25, "wrong": 1.0, "as it is": 1.0}[kind]
    fade = lambda x: x.at[1:].multiply(share)
    layers = params["layers"]
    for branch, name in (("attention", "out"), ("feedforward", "down")):
        kernel = fade(layers[branch][name]["kernel"])
        layers = {**layers, branch: {**layers[branch], name: {**layers[branch][name], "kernel": kernel}}}
    head = params["head"]
    if kind == "wrong":
        head = {**head, "exits": jax.tree.map(lambda x: -x, head["exits"])}
    return {**params, "layers": layers, "head": head}


def run(kind, layer, draft, *, cfg=CFG, prompts=PROMPTS, stop=NEVER, new=NEW):
    options = dict(new_tokens=new, layer=layer, draft=draft, stop=stop, vocabulary=VOCABULARY)
    return speculate(cfg, params_of(cfg, kind), prompts, **options)


@cache
def greedy(cfg, kind, stop=NEVER):
    options = dict(new_tokens=NEW, stop=stop, vocabulary=VOCABULARY)
    return generation.generate(cfg, params_of(cfg, kind), PROMPTS, **options)


@pytest.mark.parametrize(("layer", "draft"), [(1, 2), (2, 5)])
def test_greedy_tokens_for_every_exit_and_draft_length(layer, draft):
    found = {kind: run(kind, layer, draft) for kind in ("right", "near", "wrong", "as it is")}
    for kind, one in found.items():
        assert one.rows == greedy(CFG, kind), kind
        assert np.max(one.rows) < VOCABULARY
    # All drafts are right: a round gives one token more than it has drafts.
    assert found["right"].rounds == [-(-NEW // (draft + 1))] * 3
    assert found["right"].acceptance == 1.0
    assert found["wrong"].accepted == [0, 0, 0]
    assert found["wrong"].rounds == [NEW] * 3
    assert 0 < found["near"].acceptance < 1
    # Stops in the middle of a round, at another place in each row.
    for at in (0, 3, 4):
        stop = tuple(greedy(CFG, "near")[row][at + row] for row in range(2))
        stop = stop if len(set(stop)) == 2 else (stop[0], 999)
        expected = greedy(CFG, "near", stop)
        assert run("near", layer, draft, stop=stop).rows == expected
        assert min(map(len, expected)) < NEW


def test_rows_accept_unequal_numbers_and_do_not_see_each_other():
    together = run("near", 1, 2)
    assert len(set(together.accepted)) > 1
    assert together.tokens_per_round == pytest.approx(3 * NEW / sum(together.rounds))
    alone = run("near", 1, 2, prompts=PROMPTS[1:2])
    assert (alone.rows[0], alone.rounds[0], alone.accepted[0]) == (
        together.rows[1],
        together.rounds[1],
        together.accepted[1],
    )


def test_another_residual_operator_and_windows():
    """The state that goes from draft to verification is the operator's: [B, T, D, channels] here."""
    found = run("near", 1, 3, cfg=DELTA)
    assert found.rows == greedy(DELTA, "near")
    assert found.acceptance > 0


def test_one_compile_for_all_lengths_within_a_bucket():
    run("near", 1, 2)
    before = _run._cache_size()
    assert [len(row) for row in run("near", 1, 2, prompts=[[5] * 9, [1], [2, 3]], new=7).rows] == [7, 7, 7]
    assert _run._cache_size() == before


@pytest.mark.quick
@pytest.mark.parametrize(
    ("cfg", "layer", "draft", "words"),
    [
        (CFG, 3, 2, "behind layer 3 of a model with 3 layers: choose 1 to 2, best one of its exits, 1, 2"),
        (CFG, 0, 2, "behind layer 0"),
        (CFG, 1, 0, "draft = 0 tokens"),
        (CFG.replace(exits=Exits(), residual=MuddFormer()), 1, 2, "MuddFormer reads a source of every layer"),
    ],
)
def test_bad_input_is_one_sentence(cfg, layer, draft, words):
    with pytest.raises(UserError, match=words):
        speculate(cfg, None, PROMPTS, new_tokens=4, layer=layer, draft=draft)
