"""The baseline that every run is measured against: a bigram model, counted on the training split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxpar.data.cache import Stream

MOST = 50_000_000
"""Tokens of the training split that are counted: more does not move a bigram model's loss."""
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
        code = first * self.vocabulary + second
        at = np.minimum(np.searchsorted(self.pairs, code), max(len(self.pairs) - 1, 0))
        count = np.where(self.pairs[at] == code, self.counts[at], 0) if len(self.pairs) else np.zeros(code.shape)
        return np.log((count + self.alpha * self.unigram[second]) / (self.firsts[first] + self.alpha))


def fit(stream: Stream, vocabulary: int) -> Bigram:
    """Count pairs within documents. alpha is chosen on the last twentieth, which is then counted as well."""
    n = min(len(stream.tokens), MOST)
    tokens = np.asarray(stream.tokens[:n]).astype(np.int64)
    document = np.searchsorted(stream.starts, np.arange(n), side="right")
    inside = document[:-1] == document[1:]
    first, second = tokens[:-1][inside], tokens[1:][inside]
    held = len(first) - max(len(first) // 20, 1)
    part = _count(first[:held], second[:held], vocabulary, 1.0)
    score = lambda alpha: _with(part, alpha).log_probability(first[held:], second[held:]).sum()
    best = max(ALPHAS, key=score)
    return _count(first, second, vocabulary, best)


def _with(model: Bigram, alpha: float) -> Bigram:
    return Bigram(model.vocabulary, model.pairs, model.counts, model.firsts, model.unigram, alpha)


def _count(first: np.ndarray, second: np.ndarray, vocabulary: int, alpha: float) -> Bigram:
    codes = first * vocabulary + second
    if vocabulary**2 <= 2**22:
        # A dense table is many times faster to count than to sort.
        dense = np.bincount(codes, minlength=vocabulary**2)
        pairs = np.flatnonzero(dense)
        counts = dense[pairs]
    else:
        pairs, counts = np.unique(codes, return_counts=True)
    seconds = np.bincount(second, minlength=vocabulary)
    unigram = (seconds + 1.0) / (len(second) + vocabulary)
    return Bigram(vocabulary, pairs, counts, np.bincount(first, minlength=vocabulary), unigram, alpha)


def loss(model: Bigram, rows: dict[str, np.ndarray]) -> float:
    """The weighted mean loss of these rows (fields of a batch), in nats per token."""
    weights = rows["weights"].astype(np.float64)
    at = weights > 0
    logp = model.log_probability(rows["tokens"][at], rows["targets"][at])
    return float(-(logp * weights[at]).sum() / max(weights.sum(), 1e-30))
