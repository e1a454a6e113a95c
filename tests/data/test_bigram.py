"""The bigram baseline against a dictionary, and against entropies that are known."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.data import bigram
from jaxpar.data.cache import Stream
from jaxpar.data.packing import Examples

pytestmark = pytest.mark.quick


def stream_of(documents):
    starts = np.cumsum([0, *map(len, documents)]).astype(np.int64)
    tokens = np.concatenate([np.asarray(d, np.uint16) for d in documents])
    return Stream(tokens, starts, np.ones(len(documents), np.float32))


def by_hand(documents, vocabulary, alpha):
    """P(b | a), by dictionaries."""
    pairs, firsts, seconds = Counter(), Counter(), Counter()
    for document in documents:
        for a, b in itertools.pairwise(document):
            pairs[a, b] += 1
            firsts[a] += 1
            seconds[b] += 1
    count = sum(seconds.values())
    unigram = lambda b: (seconds[b] + 1) / (count + vocabulary)
    return lambda a, b: (pairs[a, b] + alpha * unigram(b)) / (firsts[a] + alpha)


V = 7
texts = st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=30), min_size=1, max_size=5).filter(
    lambda documents: any(len(d) > 1 for d in documents)
)


@settings(deadline=None, max_examples=60)
@given(texts)
def test_equals_dictionaries(documents):
    model = bigram.fit(stream_of(documents), V)
    expected = by_hand(documents, V, model.alpha)
    a, b = np.divmod(np.arange(V * V), V)
    found = np.exp(model.log_probability(a, b)).reshape(V, V)
    np.testing.assert_allclose(found.ravel(), [expected(int(i), int(j)) for i, j in zip(a, b, strict=True)], rtol=1e-12)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)


@settings(deadline=None, max_examples=30)
@given(texts)
def test_counts_without_a_table_equal_those_with_one(documents):
    # Beyond 2048 ids there is no dense table; the pairs that occur and their counts must not change by that.
    small, large = bigram.fit(stream_of(documents), V), bigram.fit(stream_of(documents), 4000)
    pairs = lambda m: {divmod(int(p), m.vocabulary): int(c) for p, c in zip(m.pairs, m.counts, strict=True)}
    assert pairs(small) == pairs(large)
    np.testing.assert_array_equal(small.firsts, large.firsts[:V])
    assert (np.diff(large.pairs) > 0).all()
    expected = by_hand(documents, 4000, large.alpha)
    logp = large.log_probability(np.array([0, 1, 3999]), np.array([2, 3999, 3999]))
    np.testing.assert_allclose(np.exp(logp), [expected(0, 2), expected(1, 3999), expected(3999, 3999)], rtol=1e-12)


def test_loss_is_the_weighted_mean_over_the_rows():
    documents = [[0, 1, 2, 1, 0, 6], [3, 3, 3, 6], [4, 6]]
    stream = stream_of(documents)
    stream = Stream(stream.tokens, stream.starts, np.array([1.0, 2.5, 0.0], np.float32))
    model = bigram.fit(stream, V)
    p = by_hand(documents, V, model.alpha)
    for packing in ("stream", "document"):
        examples = Examples(stream, 4, packing, 6, "it")
        total = weight = 0.0
        for document, w in zip(documents, stream.weights.tolist(), strict=True):
            for a, b in itertools.pairwise(document):
                total, weight = total - w * np.log(p(a, b)), weight + w
        found = bigram.loss(model, examples.rows(np.arange(len(examples))))
        np.testing.assert_allclose(found, total / weight, rtol=1e-6)


def chain(rng, count, stay):
    """A walk over two states that stays with the given probability, in documents of 1000."""
    turns = rng.random(count) >= stay
    return (np.cumsum(turns) % 2).reshape(-1, 1000)


def test_reaches_the_entropy_of_a_markov_chain():
    rng = np.random.default_rng(0)
    stay = 0.9
    model = bigram.fit(stream_of(chain(rng, 100_000, stay)), 300)
    rows = Examples(stream_of(chain(rng, 50_000, stay)), 100, "stream", 0, "it")
    entropy = -(stay * np.log(stay) + (1 - stay) * np.log(1 - stay))
    # 50,000 draws: the mean of -log p has a standard error of 0.003.
    assert abs(bigram.loss(model, rows.rows(np.arange(len(rows)))) - entropy) < 0.012


def test_uniform_text_cannot_be_guessed():
    rng = np.random.default_rng(1)
    vocabulary = 64
    draw = lambda count: stream_of(rng.integers(0, vocabulary, (count // 1000, 1000)))
    model = bigram.fit(draw(20_000), vocabulary)
    rows = Examples(draw(20_000), 100, "stream", 0, "it")
    found = bigram.loss(model, rows.rows(np.arange(len(rows))))
    # 5 counts a pair: without smoothing it would be far worse; better than uniform would be an error.
    assert np.log(vocabulary) - 0.005 < found < np.log(vocabulary) + 0.05
    assert model.alpha >= 100


def test_text_beyond_the_most_is_not_counted(monkeypatch):
    documents = [[0, 1, 2, 3], [4, 5]]
    monkeypatch.setattr(bigram, "MOST", 3)
    assert bigram.fit(stream_of(documents), V).counts.sum() == 2


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 100])
def test_counted_in_parts(monkeypatch, chunk):
    documents = [[0, 1, 2, 3, 0], [4], [4, 5, 4, 5], [1, 1]]
    whole = bigram.fit(stream_of(documents), 4000)
    monkeypatch.setattr(bigram, "CHUNK", chunk)
    parts = bigram.fit(stream_of(documents), 4000)
    np.testing.assert_array_equal(parts.pairs, whole.pairs)
    np.testing.assert_array_equal(parts.counts, whole.counts)
    assert parts.counts.sum() == 4 + 3 + 1
    assert parts.alpha == whole.alpha


@pytest.mark.parametrize("documents", [[[1, 2]], [[1], [2]], [[3]]])
def test_tiny_text(documents):
    model = bigram.fit(stream_of(documents), V)
    logp = model.log_probability(np.arange(V), np.arange(V))
    assert np.isfinite(logp).all()
