"""The paged cache against lists of tokens, page by page, while rows come, grow and go; and read by the decoding op."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.models import paged
from jaxpar.models.config import ModelConfig
from jaxpar.pallas_kernels.decode import decode_attention
from jaxpar.pallas_kernels.decode.xla import gathered
from jaxpar.pallas_kernels.formats.quantised import Quantised, dequantise, quantise

CFG = ModelConfig(vocabulary=16, layers=2, width=16, heads=4, kv_heads=2, head_size=8, hidden=16, context=32)
B, MOST, PAGES, PAGE, T = 4, 20, 9, 4, 6


@jax.jit
def step(cache, gone_B, counts_B, k_LxBxTxGxK, v_LxBxTxGxK):
    """Rows end, rows that find room take `counts_B` more tokens."""
    cache, granted_B = paged.reserve(paged.release(cache, gone_B), counts_B)
    for layer in range(CFG.layers):
        cache = paged.write(cache, k_LxBxTxGxK[layer], v_LxBxTxGxK[layer], layer)
    return cache.replace(lens=cache.lens + jnp.where(granted_B, counts_B, 0)), granted_B


@pytest.mark.parametrize("form", [None, "int4_g8"])
def test_it_holds_what_lists_hold(form):
    rng = np.random.default_rng(0)
    cache = paged.empty(CFG, B, MOST, PAGES, PAGE, form=form)
    read = jax.jit(lambda pool, layer, table: gathered(pool, layer, table, jnp.float32))
    held = [[] for _ in range(B)]
    refused = reused = 0
    rounded = jax.jit(lambda x: x if form is None else dequantise(quantise(x, form)))
    for _ in range(16):
        gone, counts = rng.random(B) < 0.15, rng.integers(0, T + 1, B).astype(np.int32)
        k, v = (rng.standard_normal((CFG.layers, B, T, 2, 8)).astype(np.float32) for _ in range(2))
        reused += sum(bool(held[b]) for b in range(B) if gone[b])
        cache, granted = step(cache, gone, counts, k, v)
        held = [[] if gone[b] else held[b] for b in range(B)]
        left = PAGES - sum(-(-len(row) // PAGE) for row in held)
        for b in range(B):
            new = -(-(len(held[b]) + counts[b]) // PAGE) - -(-len(held[b]) // PAGE)
            fits = len(held[b]) + counts[b] <= MOST
            assert bool(granted[b]) == (fits and (new == 0 or new <= left)), (b, new, left)
            if fits:
                # Whoever found no room is waited for.
                left -= new
            if granted[b]:
                held[b] = held[b] + [(k[:, b, t], v[:, b, t]) for t in range(counts[b])]
            refused += not granted[b]
        assert [len(row) for row in held] == np.asarray(cache.lens).tolist()
        owned = np.asarray(cache.table)[np.asarray(cache.table) >= 0].tolist()
        assert sorted(owned + np.flatnonzero(cache.free).tolist()) == list(range(PAGES))
        for n, pool in enumerate((cache.k, cache.v)):
            for layer in range(CFG.layers):
                found = np.asarray(read(pool, layer, cache.table))
                for b, row in enumerate(held):
                    if row:
                        rest = [row[0][n][layer]] * (MOST - len(row))
                        expected = rounded(jnp.asarray(np.stack([pair[n][layer] for pair in row] + rest)))
                        np.testing.assert_array_equal(found[b, : len(row)], np.asarray(expected)[: len(row)])
    assert refused > 3
    assert reused > 3
    assert isinstance(cache.k, Quantised) == (form is not None)


def test_decoding_reads_it_as_a_dense_cache_to_the_bit():
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    cache = paged.empty(CFG, B, MOST, PAGES, PAGE)
    counts, nobody = np.array([6, 1, 4, 0], np.int32), np.zeros(B, bool)
    k, v = draw(2, 2, B, T, 2, 8)
    cache, _ = step(cache, nobody, counts, k, v)
    more_k, more_v = draw(2, 2, B, T, 2, 8)
    cache, granted = step(cache, nobody, np.array([3, 6, 0, 2], np.int32), more_k, more_v)
    assert np.asarray(granted).all()
    lens = np.array([9, 7, 4, 2])
    dense = np.zeros((2, 2, B, MOST, 2, 8), np.float32)
    for n, (first, second) in enumerate(((k, more_k), (v, more_v))):
        for b in range(B):
            dense[n][:, b, : lens[b]] = np.concatenate([first[:, b, : counts[b]], second[:, b]], axis=1)[:, : lens[b]]
    q = draw(B, 1, 4, 8)
    run = jax.jit(partial(decode_attention, scale=0.4, layer=1))
    found = run(q, cache.k, cache.v, cache.lens, table_BxP=cache.table)
    np.testing.assert_array_equal(found, run(q, *dense, jnp.asarray(lens, jnp.int32)))


@pytest.mark.quick
def test_bad_sizes_are_one_sentence():
    with pytest.raises(ValueError, match="a paged cache needs pages of at least 1, got 0"):
        paged.empty(CFG, B, MOST, 0, PAGE)
    with pytest.raises(ValueError, match="keys and values of heads of 8"):
        paged.empty(CFG, B, MOST, PAGES, PAGE, form="int4_g32")
