"""Generation against a plain loop over the full forward pass, and the samplers against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import generation
from jaxpar.errors import UserError
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.feedforward.dense import MLP
from jaxpar.models.norms import LayerNorm
from jaxpar.models.positions import Learned
from jaxpar.sampling import Sampler

LLAMA = ModelConfig(vocabulary=61, layers=2, width=32, heads=4, kv_heads=2, hidden=48, context=128, init_std=0.3)
GPT2 = LLAMA.replace(kv_heads=4, norm=LayerNorm(), positions=Learned(), feedforward=MLP(), qkv_bias=True)
SLIDING = LLAMA.replace(window=6, window_pattern=(True, False))
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [58]]


init = jax.jit(decoder.init, static_argnums=0)
full_forward = jax.jit(lambda cfg, params, t: decoder.apply(cfg, params, t).logits, static_argnums=0)


def greedy_by_full_forward(cfg, params, prompt, n):
    row = list(prompt)
    for _ in range(n):
        padded = jnp.asarray([row + [0] * (48 - len(row))])
        row.append(int(full_forward(cfg, params, padded)[0, len(row) - 1].argmax()))
    return row[len(prompt) :]


@pytest.mark.parametrize("cfg", [LLAMA, GPT2, SLIDING], ids=["llama", "gpt2", "sliding"])
def test_greedy_equals_the_full_forward_pass_token_by_token(cfg):
    params = init(cfg, jax.random.key(0))
    found = generation.generate(cfg, params, PROMPTS, new_tokens=20)
    assert found == [greedy_by_full_forward(cfg, params, p, 20) for p in PROMPTS]
    assert len({tuple(row) for row in found}) == 3


@pytest.mark.quick
def test_stop_tokens_end_their_row_only():
    params = init(LLAMA, jax.random.key(0))
    free = generation.generate(LLAMA, params, PROMPTS, new_tokens=20)
    stop = free[0][4]
    found = generation.generate(LLAMA, params, PROMPTS, new_tokens=20, stop=[stop])
    for row, whole in zip(found, free, strict=True):
        assert row == (whole[: whole.index(stop)] if stop in whole else whole)
    first = free[0][0]
    assert generation.generate(LLAMA, params, PROMPTS[:1], new_tokens=5, stop=[first]) == [[]]


def test_one_compile_for_all_lengths_within_a_bucket():
    params = init(LLAMA, jax.random.key(0))
    sizes = lambda: generation._run._cache_size()
    generation.generate(LLAMA, params, [[1, 2, 3]], new_tokens=5, stop=[7])
    before = sizes()
    for length, new in [(1, 9), (17, 2), (32, 31)]:
        generation.generate(LLAMA, params, [[5] * length], new_tokens=new, stop=[length])
    assert sizes() == before
    generation.generate(LLAMA, params, [[5] * 33], new_tokens=5, stop=[7])
    assert sizes() == before + 1


def test_a_row_draws_the_same_whatever_else_is_in_the_batch():
    params = init(LLAMA, jax.random.key(0))
    sampler = Sampler(temperature=1.0, top_p=0.9)
    run = lambda prompts, seed: generation.generate(
        LLAMA, params, prompts, new_tokens=12, sampler=sampler, key=jax.random.key(seed)
    )
    together = run(PROMPTS, 1)
    assert run(PROMPTS[:1], 1)[0] == together[0]
    assert run(PROMPTS, 1) == together
    assert run(PROMPTS, 2) != together


def test_ids_beyond_the_tokenizer_are_never_chosen():
    params = init(LLAMA, jax.random.key(0))
    rows = generation.generate(
        LLAMA, params, PROMPTS, new_tokens=30, sampler=Sampler(temperature=5.0), vocabulary=10, key=jax.random.key(3)
    )
    assert max(map(max, rows)) < 10


def kept(sampler, logits):
    return set(np.flatnonzero(np.isfinite(sampler.filtered(jnp.asarray([logits]))[0])))


@pytest.mark.quick
def test_what_each_cut_keeps():
    logits = np.log([0.05, 0.5, 0.15, 0.3])
    assert kept(Sampler(1.0), logits) == {0, 1, 2, 3}
    assert kept(Sampler(1.0, top_k=2), logits) == {1, 3}
    assert kept(Sampler(1.0, top_p=0.79), logits) == {1, 3}
    assert kept(Sampler(1.0, top_p=0.81), logits) == {1, 2, 3}
    assert kept(Sampler(1.0, top_p=0.01), logits) == {1}
    assert kept(Sampler(1.0, min_p=0.25), logits) == {1, 2, 3}
    assert kept(Sampler(1.0, min_p=0.35), logits) == {1, 3}
    assert kept(Sampler(0.5, min_p=0.35), logits) == {1, 3}
    assert kept(Sampler(0.5, min_p=0.37), logits) == {1}


def test_draws_follow_the_probabilities():
    sampler = Sampler(temperature=0.7)
    logits = jnp.asarray([1.0, 0.0, -1.0, 2.0])
    n = 20_000
    keys = jax.random.split(jax.random.key(0), n)
    drawn = sampler(keys, jnp.broadcast_to(logits, (n, 4)))
    expected = np.asarray(jax.nn.softmax(logits / 0.7))
    np.testing.assert_allclose(np.bincount(drawn, minlength=4) / n, expected, atol=4 * 0.5 / n**0.5)


@pytest.mark.quick
def test_bad_input_is_one_sentence():
    params = None  # refused before it is looked at
    for prompts, new, words in [
        ([], 5, "no prompt"),
        ([[]], 5, "prompt 0 is empty"),
        ([[61]], 5, "id 61, but the model's vocabulary has 61"),
        ([[1] * 128], 5, "has 128 tokens and 5 new ones"),
        ([[1]], 0, "new_tokens = 0"),
    ]:
        with pytest.raises(UserError, match=words):
            generation.generate(LLAMA, params, prompts, new_tokens=new)
    for bad, words in [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k = 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p = 1.5"),
        ({"top_k": 5}, "temperature = 0 is greedy"),
    ]:
        with pytest.raises(UserError, match=words):
            Sampler(**bad)
