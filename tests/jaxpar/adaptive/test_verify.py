"""Drafts of a model with parts left out, verified by the whole one: the tokens of plain greedy decoding."""

import jax
import pytest

from jaxpar import generation
from jaxpar.adaptive.generate import continued
from jaxpar.adaptive.policy import ExitEarly, Speculate
from jaxpar.adaptive.verify import verified
from jaxpar.errors import UserError
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.routing.skip import FFNSkip, FixedSkip, RandomSkip
from jaxpar.sampling import Sampler

CFG = ModelConfig(
    vocabulary=61, layers=4, width=32, heads=4, kv_heads=2, hidden=48, context=128, init_std=0.1, layer_loop="scan"
)
PARAMS = jax.jit(decoder.init, static_argnums=0)(CFG, jax.random.key(1))
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3]]
NEW = 18


def greedy(stop=(999,)):
    return generation.generate(CFG, PARAMS, PROMPTS, new_tokens=NEW, stop=stop, vocabulary=50)


def drafted(skip, stop=(999,), draft=3, **more):
    return verified(CFG, PARAMS, PROMPTS, skip, new_tokens=NEW, draft=draft, stop=stop, vocabulary=50, **more)


@pytest.mark.parametrize(
    "skip",
    [RandomSkip(0.5, "layer", warmup=0), FixedSkip(2, "layer", warmup=2), FFNSkip(-1.0, warmup=0)],
    ids=lambda skip: type(skip).__name__,
)
def test_tokens_are_those_of_plain_greedy_decoding(skip):
    found, plain = drafted(skip), greedy()
    assert found.rows == plain
    assert 0 < found.acceptance < 1, "parts are left out, and some drafts are right all the same"
    for row, rounds, right in zip(found.rows, found.rounds, found.accepted, strict=True):
        assert NEW <= rounds + right <= NEW + 3, "a round gives its right drafts and one token more"
        assert len(row) == NEW
    for at in (0, 2, 5):
        stop = (plain[0][at], plain[1][at + 1])
        assert drafted(skip, stop).rows == greedy(stop)


def test_drafts_that_leave_nothing_out_are_all_right():
    found = drafted(RandomSkip(0.0, "layer"))
    assert found.acceptance == 1.0
    assert found.rounds == [-(-NEW // 4)] * 2


@pytest.mark.quick
def test_what_is_not_combined_is_one_sentence():
    ask = lambda decoding, skip, t=0.0: continued(
        CFG, PARAMS, PROMPTS, sampler=Sampler(temperature=t), decoding=decoding, skip=skip, new_tokens=4
    )
    skip = FixedSkip(1, "layer", "mask")
    for decoding, more, words in (
        (Speculate(), (skip,), "skip.keys = 'mask' hides a draft's token"),
        (Speculate(layer=1), (FixedSkip(1),), "not combined"),
        (ExitEarly(at=(1,)), (FixedSkip(1),), "not combined"),
        (Speculate(draft=0), (FixedSkip(1),), "draft = 0"),
        (Speculate(), (FixedSkip(1), 0.8), "temperature = 0.8"),
        (Speculate(), (FixedSkip(3),), "leaves 2 where this takes 3"),
    ):
        with pytest.raises((UserError, ValueError), match=words):
            ask(decoding, *more)
