"""Thresholds with a guarantee: Learn-then-Test (Angelopoulos et al. 2021), as CALM uses it (Schuster et al. 2022, §4.1).

For losses in [0, 1] of n independent texts at each of K thresholds, the threshold that is returned keeps

    P( expected loss at it ≤ risk ) ≥ 1 - delta

over the draw of the texts, whatever the model, as long as the texts it is used on come from where these came from. Each
threshold is a null hypothesis "the expected loss is above `risk`", with a p-value; they are tested from the safest (the
highest) down, each at level delta, until one is not rejected. As no one goes on behind a test that fails, the first false
rejection is the only one that counts, and the level needs no correction for K (fixed-sequence testing).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from jaxpar.errors import UserError


def binomial_tail(k: int, n: int, p: float) -> float:
    """P(Binomial(n, p) ≤ k)."""
    if k >= n:
        return 1.0
    if k < 0:
        return 0.0
    log = lambda i: (
        math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) + i * math.log(p) + (n - i) * math.log1p(-p)
    )
    return min(1.0, math.fsum(math.exp(log(i)) for i in range(k + 1)))


def hoeffding_bentkus(mean: float, n: int, risk: float) -> float:
    """A p-value for "the expectation of losses in [0, 1] is above `risk`", from the mean of n (Bates et al. 2021, prop. 5):

        min( exp(-n · h(min(mean, risk), risk)),  e · P(Binomial(n, risk) ≤ ⌈n · mean⌉) )

    with h(a, b) = a·log(a/b) + (1-a)·log((1-a)/(1-b)).
    """
    a = min(mean, risk)
    part = lambda x, y: x * math.log(x / y) if x > 0 else 0.0
    hoeffding = math.exp(-n * (part(a, risk) + part(1 - a, 1 - risk)))
    # The mean times n is a whole number up to rounding where losses are 0 or 1.
    bentkus = math.e * binomial_tail(math.ceil(n * mean - 1e-9), n, risk)
    return min(1.0, hoeffding, bentkus)


def learn_then_test(
    losses_nxK,
    thresholds_K,
    *,
    risk: float,
    delta: float,
    test: Literal["hoeffding_bentkus", "binomial"] = "hoeffding_bentkus",
) -> float | None:
    """The lowest threshold whose expected loss is at most `risk` with probability at least 1 - delta.

    Args:
      losses_nxK: of n texts at each threshold, in [0, 1].
      thresholds_K: in any order; chosen before the losses were seen.
      test: `binomial` is exact where losses are 0 or 1, and is refused elsewhere.

    Returns:
      The threshold; None where not even the highest passes: with so few texts, or so small a risk, nothing can be said.

    Raises:
      UserError: numbers outside their range, or shapes that do not belong together.
    """
    losses, thresholds = np.asarray(losses_nxK, np.float64), np.asarray(thresholds_K, np.float64)
    for name, value in (("risk", risk), ("delta", delta)):
        if not 0 < value < 1:
            raise UserError(f"{name} = {value} is outside (0, 1)")
    if losses.ndim != 2 or losses.shape[1:] != thresholds.shape or not len(losses):
        raise UserError(
            f"losses of n texts at {thresholds.size} thresholds have the shape (n, {thresholds.size}) with n at least 1, but "
            f"these have {losses.shape}"
        )
    if not ((losses >= 0) & (losses <= 1)).all():
        raise UserError(f"losses lie between 0 and 1, but these between {losses.min():g} and {losses.max():g}")
    n = len(losses)
    if test == "binomial":
        if not np.isin(losses, (0, 1)).all():
            raise UserError("test = 'binomial' is for losses that are 0 or 1; take 'hoeffding_bentkus' for these")
        p_value = lambda mean: binomial_tail(round(n * mean), n, risk)
    else:
        p_value = lambda mean: hoeffding_bentkus(mean, n, risk)
    chosen = None
    for k in np.argsort(-thresholds, kind="stable"):
        if p_value(float(losses[:, k].mean())) > delta:
            break
        chosen = float(thresholds[k])
    return chosen
