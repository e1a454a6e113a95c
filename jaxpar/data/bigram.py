"""The baseline that every run is measured against: a bigram model, counted on the training split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxpar.data.cache import Stream

MOST = 10_000_000
"""Tokens of the training split that are counted: a few seconds, and less than a gigabyte with any vocabulary."""
CHUNK = 2**22
DENSE = 2**22
"""Up to so many possible pairs (2048 ids) there is a table of all; beyond, the pairs that occur are sorted."""
ALPHAS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)


@dataclass(frozen=True)
class Bigram:
    """`P(b | a) = (count(a, b) + alpha · P(b)) / (count(a) + alpha)`, with `P(b) = (count(b) + 1) / (n + V)`.

    Attributes:
      vocabulary: V.
      pairs: int64, sorted codes a·V + b of the pairs that occur.
      counts: int64, how often.
      firsts: int64 [V], count(a).
      unigram: float64 [V], P(b).
      alpha: how many counts the unigram model is worth.
    """

    vocabulary: int
    pairs: np.ndarray
    counts: np.ndarray
    firsts: np.ndarray
    unigram: np.ndarray
    alpha: float

    def log_probability(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Natural logarithm of P(second | first), elementwise."""
        first, second = first.astype(np.int64), second.astype(np.int64)
        count = _look_up(self.pairs, self.counts, first * self.vocabulary + second)
        return np.log((count + self.alpha * self.unigram[second]) / (self.firsts[first] + self.alpha))


def fit(stream: Stream, vocabulary: int) -> Bigram:
    """Count pairs within documents. alpha is chosen on the last twentieth, which is then counted as well."""
    codes = _codes(stream, vocabulary)
    held = max(0, len(codes) - max(len(codes) // 20, 1))
    tail = np.sort(codes[held:])
    part = _count(codes[:held], vocabulary, 1.0)
    # As `log_probability`, with what does not depend on alpha done once.
    first, second = np.divmod(tail, vocabulary)
    count, unigram, firsts = _look_up(part.pairs, part.counts, tail), part.unigram[second], part.firsts[first]
    score = lambda alpha: np.log((count + alpha * unigram) / (firsts + alpha)).sum()
    return _count(codes, vocabulary, max(ALPHAS, key=score))


def _codes(stream: Stream, vocabulary: int) -> np.ndarray:
    """int64, the code of each pair of neighbours in a document, in their order."""
    n = min(len(stream.tokens), MOST)
    parts = []
    for begin in range(0, max(n - 1, 0), CHUNK):
        end = min(begin + CHUNK, n - 1)
        tokens = np.asarray(stream.tokens[begin : end + 1]).astype(np.int64)
        inside = np.ones(end - begin, bool)
        # A pair whose second token begins a document stands in two.
        low, high = np.searchsorted(stream.starts, [begin + 1, end + 1])
        inside[stream.starts[low:high] - begin - 1] = False
        parts.append((tokens[:-1] * vocabulary + tokens[1:])[inside])
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def _look_up(pairs: np.ndarray, counts: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """How often each code was counted."""
    if not len(pairs):
        return np.zeros(codes.shape, np.int64)
    # In ascending order the search runs through memory once: eight times as fast for a large table.
    flat = codes.reshape(-1)
    order = np.argsort(flat)
    at = np.empty(len(flat), np.int64)
    at[order] = np.minimum(np.searchsorted(pairs, flat[order]), len(pairs) - 1)
    at = at.reshape(codes.shape)
    return np.where(pairs[at] == codes, counts[at], 0)


def _count(codes: np.ndarray, vocabulary: int, alpha: float) -> Bigram:
    """The model of these pairs. Sorts `codes` in place."""
    if vocabulary**2 <= DENSE:
        dense = np.bincount(codes, minlength=vocabulary**2)
        pairs = np.flatnonzero(dense)
        counts = dense[pairs]
    else:
        # np.unique(return_counts=True) does the same in six times the time.
        codes.sort()
        first = np.flatnonzero(np.concatenate([[True], codes[1:] != codes[:-1]])) if len(codes) else codes
        pairs, counts = codes[first], np.diff(first, append=len(codes))
    a, b = np.divmod(pairs, vocabulary)
    # Sums of whole numbers below 2^53: exact in float64.
    add = lambda ids: np.bincount(ids, counts, minlength=vocabulary)
    unigram = (add(b) + 1.0) / (len(codes) + vocabulary)
    return Bigram(vocabulary, pairs, counts, add(a).astype(np.int64), unigram, alpha)


def loss(model: Bigram, rows: dict[str, np.ndarray]) -> float:
    """The weighted mean loss of these rows (fields of a batch), in nats per token."""
    weights = rows["weights"].astype(np.float64)
    at = weights > 0
    logp = model.log_probability(rows["tokens"][at], rows["targets"][at])
    return float(-(logp * weights[at]).sum() / max(weights.sum(), 1e-30))
