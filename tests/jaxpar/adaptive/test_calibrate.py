"""Learn-then-Test: p-values beside scipy's binomial, and the guarantee by simulation and in closed form."""

import numpy as np
import pytest

from jaxpar.adaptive.calibrate import binomial_tail, hoeffding_bentkus, learn_then_test
from jaxpar.errors import UserError

stats = pytest.importorskip("scipy.stats")


@pytest.mark.quick
@pytest.mark.parametrize(("n", "p"), [(1, 0.5), (20, 0.1), (300, 0.03), (2000, 0.4)])
def test_binomial_tails_are_scipys(n, p):
    for k in {0, 1, n // 10, n // 3, n - 1, n}:
        np.testing.assert_allclose(binomial_tail(k, n, p), stats.binom.cdf(k, n, p), rtol=1e-9)
    assert binomial_tail(-1, n, p) == 0


@pytest.mark.quick
def test_hoeffding_bentkus_by_the_formula():
    for mean, n, risk in [(0.02, 100, 0.1), (0.0, 50, 0.05), (0.08, 400, 0.1), (0.3, 30, 0.1)]:
        a = min(mean, risk)
        kl = (a * np.log(a / risk) if a else 0.0) + (1 - a) * np.log((1 - a) / (1 - risk))
        bentkus = np.e * stats.binom.cdf(np.ceil(n * mean - 1e-9), n, risk)
        np.testing.assert_allclose(hoeffding_bentkus(mean, n, risk), min(1, np.exp(-n * kl), bentkus), rtol=1e-9)
    assert hoeffding_bentkus(0.3, 30, 0.1) == 1.0  # above the risk: nothing speaks against the null


@pytest.mark.quick
def test_p_values_are_valid():
    """P(p ≤ u) ≤ u where the expectation is the risk itself: over all outcomes of n trials, exactly."""
    n, risk = 60, 0.1
    k = np.arange(n + 1)
    mass = stats.binom.pmf(k, n, risk)
    p = np.array([hoeffding_bentkus(i / n, n, risk) for i in k])
    for u in (0.01, 0.05, 0.1, 0.3):
        assert mass[p <= u].sum() <= u


@pytest.mark.quick
def test_the_guarantee_by_simulation():
    """Thresholds from harmless to harmful. How often the one that is chosen has too large a risk, and how often in closed
    form where the first one tested is already at the border."""
    draw = np.random.default_rng(0)
    thresholds = np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    true = np.array([0.02, 0.06, 0.101, 0.15, 0.3])  # risk 0.1 ends behind 0.8
    n, risk, delta, trials = 200, 0.1, 0.1, 2000
    uniform = draw.uniform(size=(trials, n, 1))
    for test in ("binomial", "hoeffding_bentkus"):
        chosen = [learn_then_test(u < true, thresholds, risk=risk, delta=delta, test=test) for u in uniform]
        too_low = np.mean([c is not None and c < 0.75 for c in chosen])
        assert too_low <= delta + 3 * np.sqrt(delta * (1 - delta) / trials)
        assert np.mean([c == 0.8 for c in chosen]) > 0.5  # and it is not idle
    at_border = [learn_then_test(u < 0.1, [0.5], risk=risk, delta=delta, test="binomial") for u in uniform]
    most = max(k for k in range(n) if stats.binom.cdf(k, n, risk) <= delta)
    exact = stats.binom.cdf(most, n, risk)
    found = np.mean([c is not None for c in at_border])
    assert abs(found - exact) <= 3 * np.sqrt(exact * (1 - exact) / trials)


@pytest.mark.quick
def test_testing_stops_at_the_first_threshold_that_fails():
    losses = np.zeros((200, 3))
    losses[:, 1] = 1.0
    assert learn_then_test(losses, [0.9, 0.5, 0.1], risk=0.05, delta=0.1) == 0.9
    assert learn_then_test(losses[:, ::-1], [0.1, 0.5, 0.9], risk=0.05, delta=0.1) == 0.9
    assert learn_then_test(losses[:3], [0.9, 0.5, 0.1], risk=0.05, delta=0.1) is None  # three texts say nothing


@pytest.mark.quick
@pytest.mark.parametrize(
    ("losses", "options", "words"),
    [
        (np.zeros((5, 2)), {"risk": 0.0}, "risk = 0.0 is outside"),
        (np.zeros((5, 2)), {"delta": 1.0}, "delta = 1.0 is outside"),
        (np.zeros((5, 3)), {}, r"at 2 thresholds have the shape \(n, 2\).*\(5, 3\)"),
        (np.full((5, 2), 1.5), {}, "between 1.5 and 1.5"),
        (np.full((5, 2), 0.5), {"test": "binomial"}, "losses that are 0 or 1"),
    ],
)
def test_bad_input_is_one_sentence(losses, options, words):
    with pytest.raises(UserError, match=words):
        learn_then_test(losses, [0.9, 0.5], **{"risk": 0.1, "delta": 0.1, **options})
