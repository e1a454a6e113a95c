"""Decoding through exits: plain decoding where none fires; exactly what the exits say where some do; exact or propagated keys
and values; and work that is really left out."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import generation
from jaxpar.adaptive import decode
from jaxpar.adaptive.confidence import Learned, Maximum, Similarity, TopTwo, fit
from jaxpar.adaptive.decode import exit_early
from jaxpar.adaptive.policy import ExitEarly, Propagate, Recompute, Speculate
from jaxpar.adaptive.prompts import Stack, prepared
from jaxpar.adaptive.seen import judged, seen
from jaxpar.adaptive.threshold import Threshold
from jaxpar.errors import UserError
from jaxpar.executed import executed_flops
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.models.exits.config import Exits, OwnNorm
from jaxpar.sampling import Sampler

CFG = ModelConfig(
    vocabulary=61,
    layers=4,
    width=32,
    heads=4,
    kv_heads=2,
    hidden=48,
    context=128,
    init_std=0.3,
    exits=Exits((1, 3), OwnNorm()),
)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3]]
NEW = 20
RECOMPUTE, PROPAGATE = ExitEarly(remedy=Recompute(3)), ExitEarly(remedy=Propagate())
MIDDLE = 0.15
"""A threshold at which tokens leave by every exit."""


@cache
def params():
    return jax.jit(decoder.init, static_argnums=0)(CFG, jax.random.key(1))


def at(policy, value, **more):
    return replace(policy, threshold=Threshold(value), **more)


def run(policy, prompts=PROMPTS, stop=(999,), **more):
    return exit_early(CFG, params(), prompts, policy, new_tokens=NEW, stop=stop, **more)


asked = jax.jit(seen, static_argnums=(0, 3))
"""Every exit at every token of whole texts."""


def caches_behind(policy, value, prompts):
    """The parts' caches at the end, and the rows (prompt and new tokens, the last of which was never run)."""
    rows = prepared(CFG, prompts, NEW, (999,), policy.remedy.window + 1)
    stack = Stack(CFG, (1, 3), Ops(), CFG.vocabulary)
    fixed = at(policy, 0.5)
    limit, key = jnp.asarray(NEW, jnp.int32), jax.random.key(0)
    out, *_, caches = decode._run(
        stack, fixed, Sampler(), rows.capacity, rows.room, params(), None, rows.tokens, rows.counts, jnp.float32(value),
        limit, rows.stop, key,
    )  # fmt: skip
    return caches, [[*p, *np.asarray(row)[:NEW].tolist()] for p, row in zip(prompts, out, strict=True)]


@pytest.mark.parametrize("policy", [RECOMPUTE, PROPAGATE], ids=["recompute", "propagate"])
def test_a_threshold_that_never_fires_is_plain_greedy_decoding(policy):
    greedy = lambda stop: generation.generate(CFG, params(), PROMPTS, new_tokens=NEW, stop=stop)
    plain = greedy([999])
    found = run(at(policy, 1.0))
    assert found.rows == plain
    assert found.exits == [0, 0, NEW]
    assert found.depth == 4
    stop = [plain[0][4]]
    assert run(at(policy, 1.0), stop=stop).rows == generation.generate(
        CFG, params(), PROMPTS, new_tokens=NEW, stop=stop
    )


def test_a_threshold_that_always_fires_leaves_by_the_first_exit():
    found = run(at(PROPAGATE, 0.0))
    assert found.exits == [NEW, 0, 0]
    assert found.depth == 1
    # Three may wait: every fourth goes through, with the three before it.
    found = run(at(RECOMPUTE, 0.0))
    assert found.exits == [15, 0, 5]
    assert found.layers_run == NEW * 1 + 5 * 4 * 3


def test_a_row_alone_says_what_its_exits_say():
    """With recomputed keys and values every choice is the full pass's at the exit taken: asked there for the whole text."""
    for prompt in PROMPTS:
        found = run(at(RECOMPUTE, MIDDLE), [prompt])
        assert min(found.exits) > 0, found.exits
        text = [*prompt, *found.rows[0]]
        told = asked(CFG, params(), jnp.asarray([text + [0] * (32 - len(text))]), TopTwo())
        sure, said = np.asarray(told.confidence)[:, 0], np.asarray(told.tokens)[:, 0]
        waiting, used = 0, [0, 0, 0]
        for place in range(len(prompt), len(text) - 1):
            number = next((i for i in range(2) if sure[i, place] > MIDDLE and waiting < 3), 2)
            assert text[place + 1] == said[number, place], (place, number)
            waiting = 0 if number == 2 else waiting + 1
            used[number] += 1
        # The last new token is run as well, and what it says is not asked for.
        assert sum(found.exits) == sum(used) + 1
        assert all(0 <= a - b <= 1 for a, b in zip(found.exits, used, strict=True))


def test_recomputed_keys_and_values_are_those_of_a_full_pass():
    caches, rows = caches_behind(RECOMPUTE, MIDDLE, PROMPTS)
    tokens = jnp.asarray([row + [0] * (32 - len(row)) for row in rows])
    full = jax.jit(decoder.forward, static_argnums=0)(CFG, params(), tokens, kv.empty(CFG, 2, 64))[1]
    for part, (first, last) in zip(caches, [(0, 1), (1, 3), (3, 4)], strict=True):
        for row in range(2):
            n = int(part.lens[row])
            assert len(rows[row]) - 3 <= n <= len(rows[row])  # no more than three wait
            for name in ("k", "v"):
                ours, theirs = getattr(part, name)[:, row, :n], getattr(full, name)[first:last, row, :n]
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_propagated_keys_and_values_are_those_of_layers_that_add_nothing():
    caches, rows = caches_behind(PROPAGATE, 0.0, PROMPTS)  # every new token left behind layer 1
    silent = jax.tree.map(lambda x: x, params())
    for branch, name in (("attention", "out"), ("feedforward", "down")):
        kernel = silent["layers"][branch][name]["kernel"]
        silent["layers"][branch][name] = {"kernel": kernel.at[1:].set(0.0)}
    tokens = jnp.asarray([row + [0] * (32 - len(row)) for row in rows])
    found = jax.jit(decoder.forward, static_argnums=0)(CFG, silent, tokens, kv.empty(CFG, 2, 64))[1]
    for part, (first, last) in zip(caches, [(0, 1), (1, 3), (3, 4)], strict=True):
        for row, prompt in enumerate(PROMPTS):
            assert int(part.lens[row]) == len(rows[row])
            # The prompt had its full pass. New tokens saw its keys below the exit only.
            new = slice(len(prompt), len(rows[row]))
            for name in ("k", "v"):
                ours, theirs = getattr(part, name)[:, row, new], getattr(found, name)[first:last, row, new]
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("confidence", [Learned()], ids=lambda c: type(c).__name__)
def test_every_confidence_decides_as_it_does_when_asked(confidence):
    own = {"weight": 0.3 * jax.random.normal(jax.random.key(2), (2, 32)), "bias": jnp.array([-1.0, 0.5])}
    policy = replace(at(RECOMPUTE, 0.5), confidence=confidence)
    found = run(policy, PROMPTS[:1], own=own if policy.learns else None)
    text = [*PROMPTS[0], *found.rows[0]]
    tokens = jnp.asarray([text + [0] * (32 - len(text))])
    told = asked(CFG, params(), tokens, confidence, own if policy.learns else None)
    sure, said = np.asarray(told.confidence)[:, 0], np.asarray(told.tokens)[:, 0]
    waiting = 0
    for place in range(3, len(text) - 1):
        number = next((i for i in range(2) if sure[i, place] > 0.5 and waiting < 3), 2)
        assert text[place + 1] == said[number, place]
        waiting = 0 if number == 2 else waiting + 1


def test_work_is_really_left_out():
    """Executed FLOPs of 2 tokens that leave behind layer 1 and of 2 that do not: the difference by hand."""
    cfg = CFG.replace(layers=3, exits=Exits((1,)))
    weights = jax.tree.map(lambda x: x[:3], params()["layers"])
    rows = prepared(cfg, [[3, 1, 4]], 2, (), 1)
    stack = Stack(cfg, (1,), Ops(), cfg.vocabulary)
    fixed = (stack, at(PROPAGATE, 0.5), Sampler(), rows.capacity, rows.room)
    limit, key = jnp.asarray(2, jnp.int32), jax.random.key(0)
    work = lambda value: executed_flops(
        lambda p: decode._run.__wrapped__(*fixed, p, None, rows.tokens, rows.counts, value, limit, rows.stop, key)[0],
        {**params(), "layers": weights},
    )
    D, H, K, S, F, V = 32, 4, 8, rows.capacity, 48, 61
    layer = 2 * D * H * K + 2 * H * K * D + 4 * H * K * S + 3 * 2 * D * F  # all but keys and values
    head = 2 * D * V  # of the last layer; the exit's has run
    saved = work(jnp.float32(1.0)) - work(jnp.float32(0.0))
    assert saved == 2 * (2 * layer + head)


@pytest.mark.quick
def test_thresholds_and_their_decay():
    np.testing.assert_allclose(Threshold(0.8).at(7, 10), 0.8, rtol=1e-6)
    falling = Threshold(0.8, decay=0.1, temperature=4.0)  # CALM's
    np.testing.assert_allclose(falling.at(0, 100), 0.8, rtol=1e-6)
    np.testing.assert_allclose(falling.at(50, 100), 0.9 * 0.8 + 0.1 * 0.8 * np.exp(-2), rtol=1e-6)


@pytest.mark.quick
def test_confidences_by_hand():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.8, 0.1]]))
    x, before = jnp.array([[3.0, 4.0], [1.0, 0.0]]), jnp.array([[4.0, 3.0], [0.0, 2.0]])
    np.testing.assert_allclose(TopTwo()(logits, x, before, None), [0.2, 0.7], rtol=1e-5)
    np.testing.assert_allclose(Maximum()(logits, x, before, None), [0.5, 0.8], rtol=1e-5)
    np.testing.assert_allclose(Similarity()(None, x, before, None), [24 / 25, 0], atol=1e-6)
    own = {"weight": jnp.array([1.0, -1.0]), "bias": jnp.float32(0.5)}
    np.testing.assert_allclose(Learned()(None, x, before, own), 1 / (1 + np.exp([0.5, -1.5])), rtol=1e-5)


@pytest.mark.quick
def test_the_learned_confidence_is_the_logistic_regression():
    """Beside scipy's minimiser of the same objective."""
    optimize = pytest.importorskip("scipy.optimize")
    draw = np.random.default_rng(0)
    x = draw.standard_normal((300, 4))
    y = x @ [1.0, -2.0, 0.5, 0.0] + 0.7 + draw.logistic(size=300) > 0

    def objective(w):
        z = x @ w[:-1] + w[-1]
        return np.mean(np.logaddexp(0, z) - y * z) + 0.5e-3 * np.sum(w[:-1] ** 2)

    expected = optimize.minimize(objective, np.zeros(5), method="BFGS", options={"gtol": 1e-8}).x
    found = jax.jit(fit)(jnp.asarray(x, jnp.float32), jnp.asarray(y))
    np.testing.assert_allclose([*found["weight"], found["bias"]], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.quick
def test_what_a_threshold_would_do_by_hand():
    from jaxpar.adaptive.seen import Seen

    said = Seen(
        x=None,
        tokens=np.array([[[1, 1, 1, 1]], [[2, 1, 1, 2]], [[2, 1, 3, 3]]]),
        confidence=np.array([[[0.9, 0.2, 0.9, 0.1]], [[0.9, 0.7, 0.9, 0.2]]]),
    )
    wrong, depth = judged(said, [0.05, 0.5, 0.95])
    np.testing.assert_allclose(wrong, [[0.75, 0.5, 0.0]])
    np.testing.assert_allclose(depth, [[0.0, (0 + 1 + 0 + 2) / 4, 2.0]])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Threshold(1.2), "threshold.value = 1.2 would never fire"),
        (lambda: Threshold(-0.1), "threshold.value = -0.1 would always fire"),
        (lambda: Threshold(0.5, decay=2.0), "threshold.decay = 2.0"),
        (lambda: Recompute(0), "remedy.window = 0"),
        (lambda: ExitEarly().exits(CFG.replace(exits=Exits())), "the model has no exits; name some of its 4 layers"),
        (lambda: ExitEarly(at=(2, 4)).exits(CFG), r"behind the layers \(2, 4\) must rise within 1 to 3, of 4 layers"),
        (lambda: Speculate().behind(CFG.replace(exits=Exits())), "no exits to draft with.*--decoding.layer 2"),
        (lambda: run(replace(RECOMPUTE, confidence=Learned())), "Learned has parameters: fit them"),
    ],
)
def test_bad_input_is_one_sentence(make, words):
    with pytest.raises(UserError, match=words):
        make()
