"""Parts of layers left out token by token, against straight-line NumPy, and what that saves in executed FLOPs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.executed import executed_flops
from jaxpar.generation import continued, generate
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.positions import NoPositions, Rope
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.routing.record import Skip
from jaxpar.models.routing.skip import FFNSkip, FixedSkip, RandomSkip
from tests.models.residual.straight import Decoder, rms, softmax

CFG = ModelConfig(
    vocabulary=32, layers=6, width=16, heads=2, hidden=24, context=64, positions=NoPositions(), init_std=0.25
)
PARAMS = jax.jit(decoder.init, static_argnums=0)(CFG, jax.random.key(0))
EXACT = jax.tree.map(lambda x: np.asarray(x, np.float64), PARAMS)
TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (2, 10), 0, 32))
ACTIVE = np.arange(10)[None] >= np.array([[2], [4]])


@partial(jax.jit, static_argnums=0)
def at_once(policy, active):
    """Every token in one pass, without a cache."""
    ctx = Context(skip=Skip(active, policy))
    state, aux = decoder.through(CFG, PARAMS, decoder.embed(CFG, PARAMS, TOKENS, ctx), ctx)
    return decoder.head(CFG, PARAMS, state, ctx), aux.record


def attention(m, i, x, present):
    """As `Decoder.attention`, where `present` tokens alone have keys."""
    p = m.layers["attention"]
    x = rms(x, m.cfg.norm.epsilon) * p["norm"]["scale"][i]
    q, k, v = (np.einsum("btd,dhk->bhtk", x, p[n]["kernel"][i]) for n in ("query", "key", "value"))
    seen = np.tril(np.ones((x.shape[1],) * 2, bool))[None, None] & present[:, None, None, :]
    s = np.where(seen, np.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(q.shape[-1]), -1e30)
    return np.einsum("bhts,bhsk,hkd->btd", softmax(s), v, p["out"]["kernel"][i])


def cosine(a, b):
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def straight(policy, active, draws=None):
    """Logits, how many parts each token left out, and the cosines: token by token, from the definition."""
    m = Decoder(CFG, EXACT)
    x = EXACT["embedding"]["tokens"][TOKENS]
    left, skipped = np.zeros(TOKENS.shape, int), np.zeros(TOKENS.shape, int)
    cosines = np.full((CFG.layers, *TOKENS.shape), np.nan)
    for layer in range(CFG.layers):
        may = active & (policy.first <= layer < CFG.layers - policy.last)
        if isinstance(policy, FFNSkip):
            skip = may & (left > 0)
        elif isinstance(policy, FixedSkip):
            skip = may & (layer >= CFG.layers - policy.last - policy.layers)
        else:
            skip = may & draws[layer]
        before = x
        if policy.site == "feedforward":
            before = x + attention(m, layer, x, np.ones(TOKENS.shape, bool))
            after = before + m.feedforward(layer, before)
        else:
            present = ~skip if policy.keys == "mask" else np.ones(TOKENS.shape, bool)
            after = x + attention(m, layer, x, present)
            after = after + m.feedforward(layer, after)
        if isinstance(policy, FFNSkip):
            cos = cosine(before, after)
            assert np.abs(cos - policy.threshold).min() > 1e-5, "too near to be the same in float32"
            left = np.where(skip, left - 1, np.where(may & (cos >= policy.threshold), policy.run, 0))
        cosines[layer] = np.where(skip, np.nan, cosine(before, after))
        skipped += skip
        x = np.where(skip[..., None], before, after)
    x = rms(x, CFG.norm.epsilon) * EXACT["head"]["norm"]["scale"]
    return x @ EXACT["embedding"]["tokens"].T, skipped, cosines


@pytest.mark.quick
@pytest.mark.parametrize("run", [1, 3])
def test_feed_forward_layers_behind_a_redundant_one_are_left_out(run):
    policy = FFNSkip(threshold=0.9, run=run)
    logits, record = at_once(policy, ACTIVE)
    expected, skipped, cosines = straight(policy, ACTIVE)
    np.testing.assert_array_equal(record.skipped, skipped)
    np.testing.assert_allclose(record.cosines, cosines, atol=1e-5)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    assert len(set(skipped[ACTIVE])) > 1, "tokens differ in what they leave out"
    assert not skipped[~ACTIVE].any()
    # The first and last layers ran for all.
    assert np.isfinite(np.asarray(record.cosines)[[0, -1]]).all()


@pytest.mark.parametrize("keys", ["propagate", "mask"])
def test_whole_layers_left_out_leave_keys_or_holes(keys):
    policy = RandomSkip(share=0.5, site="layer", keys=keys, first=0)
    logits, record = at_once(policy, ACTIVE)
    draws = np.stack([policy.decide(None, i, np.broadcast_to(np.arange(10), (2, 10))) for i in range(6)])
    expected, skipped, _ = straight(policy, ACTIVE, draws)
    np.testing.assert_array_equal(record.skipped, skipped)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    share = skipped[ACTIVE].mean() / 5
    assert 0.3 < share < 0.7


@partial(jax.jit, static_argnums=0)
def next_token(policy, tokens, cache, active):
    ctx = Context(cache=cache, skip=Skip(active, policy))
    logits, cache, aux = decoder.advance(CFG, PARAMS, tokens, ctx)
    return logits[:, 0], cache, aux.record


@pytest.mark.parametrize(
    "policy",
    [FFNSkip(threshold=0.9, run=3), RandomSkip(share=0.5, site="layer", keys="mask", first=0)],
    ids=["feed-forward", "layers with holes"],
)
def test_token_by_token_is_all_at_once_and_a_row_is_what_it_is_alone(policy):
    whole, told = at_once(policy, ACTIVE)
    for rows in (slice(0, 2), slice(1, 2)):
        cache = kv.empty(CFG, len(TOKENS[rows]), 12, there=policy.keys == "mask")
        for t in range(10):
            logits, cache, record = next_token(policy, TOKENS[rows, t : t + 1], cache, ACTIVE[rows, t : t + 1])
            np.testing.assert_allclose(logits, whole[rows, t], atol=1e-4)
            np.testing.assert_array_equal(record.skipped[:, 0], told.skipped[rows, t])
            # What no row needs did not run.
            assert record.spared == np.isnan(record.cosines[..., 0]).all(1).sum()
        holes = ~np.asarray(cache.k[:, :, :10]).any((-1, -2))
        assert holes.any() == (policy.site == "layer"), "every token has keys in every layer, unless it left layers out"


def test_a_hole_stays_one_where_a_slot_is_used_again():
    """Padding of a prompt, and what was rolled back, once had keys in the slot of a token that has none."""
    policy = FixedSkip(layers=4, site="layer", keys="mask")
    off, on = np.zeros((2, 1), bool), np.ones((2, 1), bool)
    fresh = kv.empty(CFG, 2, 12, there=True)
    _, fresh, _ = next_token(policy, TOKENS[:, :1], fresh, off)
    _, used, _ = next_token(policy, TOKENS[:, 5:6], fresh, off)
    used = used.replace(lens=fresh.lens)
    found = []
    for cache in (fresh, used):
        _, cache, record = next_token(policy, TOKENS[:, 1:2], cache, on)
        assert record.spared == 4
        found.append(next_token(policy, TOKENS[:, 2:3], cache, off)[0])
    np.testing.assert_array_equal(*found)


@pytest.mark.quick
def test_what_is_left_out_is_not_executed_and_what_is_masked_is():
    """A token's decoding step in FLOPs of products: layers of it fall by exactly what is left out."""
    cache = kv.empty(CFG, 1, 8, there=True)
    token = jnp.asarray(TOKENS[:1, :1])

    def cost(policy, active=True):
        ctx = Context(cache=cache, skip=Skip(jnp.full((1, 1), active), policy))
        return executed_flops(lambda p, t: decoder.advance(CFG, p, t, ctx)[0], PARAMS, token)

    D, F, S = CFG.width, CFG.hidden, 8
    feedforward, key_value, attention = 2 * 3 * D * F, 2 * 2 * D * D, 2 * 4 * D * D + 2 * 2 * D * S
    whole = cost(FixedSkip(layers=3), active=False)
    assert whole == CFG.layers * (feedforward + attention) + 2 * D * CFG.vocabulary
    assert whole - cost(FixedSkip(layers=3)) == 3 * feedforward
    assert whole - cost(FixedSkip(layers=3, site="layer", keys="mask")) == 3 * (feedforward + attention)
    assert whole - cost(FixedSkip(layers=3, site="layer")) == 3 * (feedforward + attention - key_value)
    assert cost(FixedSkip(layers=3, simulate=True)) == whole
    # Every look at a cosine costs the layer: of layers 1 to 4, the first runs, three are left out.
    assert whole - cost(FFNSkip(threshold=-1.0, run=3)) == 3 * feedforward


ROTARY = CFG.replace(positions=Rope(), kv_heads=1)


def test_generation_leaves_out_and_says_how_much():
    params = jax.jit(decoder.init, static_argnums=0)(ROTARY, jax.random.key(0))
    prompts = [[3, 1, 4], [7, 7]]
    run = lambda policy: continued(ROTARY, params, prompts, new_tokens=12, skip=policy)
    never = run(FFNSkip(threshold=1.0))
    assert never.rows == generate(ROTARY, params, prompts, new_tokens=12)
    assert (never.skipped, never.spared) == (0, 0)
    # After 4 tokens, of layers 1 to 4: one runs, two are left out, one runs. 8 of 12 tokens, 2 of 6 layers.
    always = run(FFNSkip(threshold=-1.0, run=2, warmup=4))
    assert always.skipped == always.spared == pytest.approx(8 * 2 / (12 * 6))
    assert [row[:5] for row in always.rows] == [row[:5] for row in never.rows]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FFNSkip(threshold=1.5), "threshold = 1.5 is no cosine"),
        (lambda: FFNSkip(run=0), "run = 0 layers"),
        (lambda: FFNSkip(warmup=-1), "skip.warmup = -1"),
        (lambda: RandomSkip(share=1.2), "share = 1.2 is no probability"),
        (lambda: FixedSkip(layers=0), "layers = 0"),
        (
            lambda: (FFNSkip(first=3, last=3), CFG),
            "first = 3 and skip.last = 3 of the model's 6 layers.*leaves 0 where this takes 2",
        ),
        (lambda: (FFNSkip(first=3, last=2), CFG), "leaves 1 where this takes 2"),
        (lambda: (RandomSkip(first=3, last=3), CFG), "leaves 0 where this takes 1"),
        (lambda: (FixedSkip(layers=5), CFG), "leaves 4 where this takes 5"),
        (lambda: (FFNSkip(), CFG.replace(residual=DeepDelta())), "DeepDelta keeps more than one stream"),
    ],
)
def test_bad_input_is_one_sentence(make, words):
    def ask():
        policy, cfg = make()
        continued(cfg, None, [[1]], new_tokens=2, skip=policy)

    with pytest.raises(ValueError, match=words):
        ask()
