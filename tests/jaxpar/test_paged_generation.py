"""Generation through pages gives each request what it is given alone, while rows wait, are evicted and make room."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import generation, paged_generation
from jaxpar.errors import UserError
from jaxpar.models import decoder, paged
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.models.residual.short_window import ShortWindow
from jaxpar.models.routing.depth import MixtureOfDepths
from jaxpar.models.steering import Steering
from jaxpar.paged_generation import generate_paged
from jaxpar.paging import Paged
from jaxpar.sampling import Sampler

# Grouped heads.
LLAMA = ModelConfig(vocabulary=61, layers=2, width=32, heads=4, kv_heads=2, hidden=48, context=128, init_std=0.3)
SLIDING = LLAMA.replace(window=6, window_pattern=(True, False))
ROOMY = Paged(rows=2, pages=40, page=4, chunk=4)
TIGHT = Paged(rows=3, pages=9, page=4, chunk=20)
"""Three rows of up to 33 tokens, which are nine pages; and chunks beyond what a decoding kernel takes."""
rng = np.random.default_rng(0)
PROMPTS = [rng.integers(0, 61, n).tolist() for n in (3, 21, 1, 9, 14)]
init = jax.jit(decoder.init, static_argnums=0)


@pytest.fixture(scope="module")
def params():
    return init(LLAMA, jax.random.key(0))


def test_more_requests_than_rows_and_prompts_longer_than_a_chunk(params):
    alone = generation.generate(LLAMA, params, PROMPTS, new_tokens=12)
    found = generate_paged(LLAMA, params, PROMPTS, paging=ROOMY, new_tokens=12)
    assert found.rows == alone
    assert len({tuple(row) for row in alone}) == len(PROMPTS)
    # In the twelfth turn, its last, the first request holds 14 tokens; the second, whose prompt took six turns, 27.
    assert (found.evictions, found.peak) == (0, 4 + 7)
    # Stop tokens; others of the same bucket are of the same program.
    stop = alone[1][3]
    generate_paged(LLAMA, params, PROMPTS, paging=ROOMY, new_tokens=12, stop=[60])
    before = paged_generation._run._cache_size()
    ended = generate_paged(LLAMA, params, PROMPTS[::-1], paging=ROOMY, new_tokens=9, stop=[stop]).rows[::-1]
    assert paged_generation._run._cache_size() == before
    assert ended == [row[: row.index(stop)] if stop in row[:9] else row[:9] for row in alone]
    assert ended[1] == alone[1][:3]


@pytest.mark.parametrize(("cfg", "form"), [(SLIDING, "int8_row"), (LLAMA, "int4_g8")], ids=["sliding, int8", "int4"])
def test_rows_that_wait_and_are_evicted(params, cfg, form):
    """Drawn, so that it is seen whose key a request has after its row was another's."""
    options = dict(new_tokens=13, sampler=Sampler(1.0), key=jax.random.key(5), vocabulary=60, ops=Ops(cache=form))
    found = generate_paged(cfg, params, PROMPTS, paging=TIGHT, **options)
    assert found.rows == generation.generate(cfg, params, PROMPTS, **options)
    assert found.evictions > 0
    assert found.peak == TIGHT.pages


def test_steering_goes_on_where_a_request_was_evicted(params):
    vectors = np.zeros((2, 32), np.float32)
    vectors[0] = rng.standard_normal(32)
    steering = Steering(jnp.asarray(vectors))
    found = generate_paged(LLAMA, params, PROMPTS, paging=TIGHT, new_tokens=13, steering=steering)
    assert found.evictions > 0
    assert found.rows == generation.continued(LLAMA, params, PROMPTS, new_tokens=13, steering=steering).rows
    assert found.rows != generation.generate(LLAMA, params, PROMPTS, new_tokens=13)


@pytest.mark.quick
def test_what_pages_cannot_hold_is_one_sentence():
    params = None  # refused before it is looked at
    run = lambda cfg, paging: generate_paged(cfg, params, PROMPTS, paging=paging, new_tokens=13)
    # The longest takes all nine pages, and fits.
    words = r"prompt 1 has 21 tokens and 13 new ones .* take 9 pages of 4 tokens, but pages.pages = 8; set it to 9"
    with pytest.raises(UserError, match=words):
        run(LLAMA, replace(TIGHT, pages=8))
    with pytest.raises(ValueError, match=r"MixtureOfDepths leaves tokens without keys .* without --pages"):
        run(LLAMA.replace(depth=MixtureOfDepths()), TIGHT)
    with pytest.raises(ValueError, match=r"ShortWindow looks at earlier tokens' streams, .* without --pages"):
        paged.empty(LLAMA.replace(residual=ShortWindow()), 1, 8, 2, 4)
    with pytest.raises(UserError, match=r"pages\.rows = 0 must be at least 1"):
        Paged(rows=0)
