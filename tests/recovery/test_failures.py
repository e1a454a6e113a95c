"""Traces of failures: the same everywhere, with the rates that were asked for, and refused in one sentence where they
cannot be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxpar.errors import UserError
from jaxpar.recovery.checkfree import CheckFree
from jaxpar.recovery.checkfree_plus import CheckFreePlus
from jaxpar.recovery.checkpoint_rollback import CheckpointRollback
from jaxpar.recovery.composite import Composite
from jaxpar.recovery.config import FailureConfig, parse_events
from jaxpar.recovery.copy_neighbour import CopyNeighbour
from jaxpar.recovery.failures import FailureTrace, read_csv
from jaxpar.recovery.no_failure import NoFailure
from jaxpar.recovery.plan import MOST, walk
from jaxpar.recovery.redundant import Redundant
from jaxpar.recovery.snapshot import Snapshot
from jaxpar.recovery.uniform_average import UniformAverage
from jaxpar.skipping.paths import SwapEnds

pytestmark = pytest.mark.quick


def philox(seed: int, counter: int) -> list[int]:
    """Philox4x64-10 as published (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", figure 1)."""
    low = (1 << 64) - 1
    x, k = [counter & low, counter >> 64 & low, counter >> 128 & low, counter >> 192], [seed & low, seed >> 64]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [b >> 64 ^ x[1] ^ k[0], b & low, a >> 64 ^ x[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B97F4A7C15) & low, (k[1] + 0xBB67AE8584CAA73B) & low]
    return x


@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_the_draws_are_philox(seed):
    """By an implementation of our own, so that a change of the stream is seen."""
    rates = (0.1, 0.3, 0.5, 0.0, 1.0, 0.2)
    trace = FailureTrace(6, rates, seed)
    for step in (1, 2, 1000):
        # NumPy counts once before each block of four words.
        words = philox(seed, (step << 64) + 1) + philox(seed, (step << 64) + 2)
        expected = [(w >> 11) * 2.0**-53 < rate for w, rate in zip(words, rates, strict=False)]
        assert trace.lost(step).tolist() == expected


def test_a_draw_depends_on_seed_step_and_stage_alone():
    """Not on how many stages there are, on the order of asking, or on the other stages' rates."""
    trace = FailureTrace.bernoulli(0.3, 8, seed=1)
    every = trace.array(50)
    assert every.shape == (50, 8)
    for t in (50, 3, 17):
        np.testing.assert_array_equal(trace.lost(t), every[t - 1])
    np.testing.assert_array_equal(FailureTrace.bernoulli(0.3, 5, seed=1).array(50), every[:, :5])
    assert (FailureTrace.bernoulli(0.3, 8, seed=2).array(50) != every).any()
    # A higher rate loses what the lower one loses, and more: runs at several rates are paired too.
    assert (FailureTrace.bernoulli(0.5, 8, seed=1).array(50) >= every).all()


def test_rates_are_met_and_neighbours_fail_together():
    rates = (0.0, 0.02, 0.1, 0.5, 1.0)
    steps = 20000
    found = FailureTrace(5, rates, seed=3).array(steps)
    for s, rate in enumerate(rates):
        assert abs(found[:, s].mean() - rate) <= 5 * (rate * (1 - rate) / steps) ** 0.5
    both = (found[:, 2] & found[:, 3]).mean()  # simultaneous and adjacent: independent, so the product
    assert abs(both - 0.05) <= 5 * (0.05 * 0.95 / steps) ** 0.5


@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.integers(0, 2**32), st.integers(1, 10**6))
def test_thinning_leaves_no_two_neighbours_and_nothing_new(rates, seed, step):
    plain = FailureTrace(len(rates), tuple(rates), seed).lost(step)
    thin = FailureTrace(len(rates), tuple(rates), seed, thin=True).lost(step)
    assert not (thin[1:] & thin[:-1]).any()
    assert (thin <= plain).all()
    assert thin.any() == plain.any()


def test_lists_and_files_are_the_same_trace(tmp_path):
    events = [(2, 1), (2, 2), (5, 0)]
    listed = FailureTrace(3, (0.0,) * 3, listed=frozenset(events))
    assert listed.events(10) == events
    listed.write_csv(tmp_path / "f.csv", 10)
    assert read_csv(tmp_path / "f.csv") == events
    config = FailureConfig(file=str(tmp_path / "f.csv"), at=parse_events("7:2, 7:1"))
    assert config.trace(3, 10).events(10) == [*events, (7, 1), (7, 2)]
    # Drawn ones come on top.
    both = FailureConfig(failure_rate=0.2, at=((4, 1),)).trace(3, 10).array(10)
    assert both[3, 1]
    assert (both >= FailureTrace.bernoulli(0.2, 3).array(10)).all()


def test_only_the_middle():
    found = FailureConfig(failure_rate=1.0, fallible="middle").trace(5, 3).array(3)
    assert found.tolist() == [[False, True, True, True, False]] * 3


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda p: FailureConfig(failure_rate=1.5), ("failure_rate = 1.5", "[0, 1]")),
        (lambda p: FailureConfig(failure_rate=float("nan")), ("nan", "[0, 1]")),
        (lambda p: FailureConfig(rates=(0.1, -0.1)), ("rates = -0.1", "[0, 1]")),
        (lambda p: FailureConfig(failure_rate=0.1, rates=(0.1,)), ("both given",)),
        (lambda p: FailureConfig(rates=(0.1, 0.1)).trace(3, 10), ("2 rates", "3 stages")),
        (lambda p: FailureConfig(at=((3, 4),)).trace(4, 10), ("failures.at", "stage 4", "4 stages", "0 to 3")),
        (lambda p: FailureConfig(at=((11, 1),)).trace(4, 10), ("step 11", "1 to 10")),
        (lambda p: FailureConfig(at=((0, 1),)).trace(4, 10), ("step 0", "1 to 10")),
        (lambda p: FailureConfig(stages=0), ("failures.stages", "0")),
        (lambda p: parse_events("3:1,4"), ("'4'", "step:stage")),
        (lambda p: FailureConfig(file=str(p / "no.csv")).trace(4, 10), ("no.csv", "No such file")),
        (lambda p: FailureConfig(file=str(p / "torn.csv")).trace(4, 10), ("line 3", "torn.csv", "'7,'", "step,stage")),
        (lambda p: FailureConfig(file=str(p / "other.csv")).trace(4, 10), ("other.csv", "stage 9", "4 stages")),
        (lambda p: FailureTrace(3, (0.1,)), ("3 stages", "got 1")),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, make, parts):
    (tmp_path / "torn.csv").write_text("step,stage\n3,1\n7,")
    (tmp_path / "other.csv").write_text("3,9\n")
    with pytest.raises(UserError) as error:
        make(tmp_path)
    text = str(error.value)
    assert "\n" not in text
    for part in parts:
        assert part in text


# -- a run walked through ------------------------------------------------------------------------------------------------


def at(stages, *events):
    return FailureTrace(stages, (0.0,) * stages, listed=frozenset(events))


@pytest.mark.parametrize(
    ("strategy", "trace", "parts"),
    [
        (NoFailure(), at(4, (3, 1)), ("step 3 loses stage 1 of 4", "recovers nothing", "--recovery")),
        (CheckFree(), at(2), ("check-free needs at least 3 stages, got 2",)),
        (UniformAverage(), at(1), ("uniform-average needs at least 3 stages, got 1",)),
        (CheckFreePlus(), at(3), ("check-free-plus needs at least 4 stages, got 3",)),
        (CopyNeighbour(), at(1), ("copy-neighbour needs at least 2 stages, got 1",)),
        (CheckFree(), at(4, (5, 0)), ("step 5 loses stage 0", "first", "last", "--failures.fallible middle")),
        (CheckFree(), at(6, (5, 2), (5, 3)), ("step 5 loses stages 2 and 3 of 6", "adjacent")),
        (CheckFreePlus(), at(6, (5, 0), (5, 1)), ("stages 0 and 1", "lost with it")),
        (CopyNeighbour(), at(6, (5, 2), (5, 3)), ("stages 2 and 3", "previous stage")),
        (Redundant(), at(6, (5, 0), (5, 5)), ("stages 0 and 5", "lost with it")),
        (Composite(CheckFree(), CopyNeighbour()), at(4, (5, 1), (5, 2)), ("and then:",)),
        (Snapshot(every=50), FailureTrace.bernoulli(0.5, 4), ("snapshot", "of 20", "go back less far")),
    ],
)
def test_what_cannot_be_recovered_is_refused(strategy, trace, parts):
    with pytest.raises(UserError) as error:
        walk(strategy, trace, 20)
    assert "\n" not in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_what_can_be_recovered_goes_through():
    assert walk(CheckFree(), at(6, (5, 1), (5, 3), (9, 4)), 20).losses == 3
    assert walk(CheckFreePlus(), at(6, (5, 0), (5, 5)), 20).iterations == 20
    assert walk(CheckFreePlus(edge_pairs="both-ways"), at(4, (5, 1), (5, 2)), 20).failures == 1
    assert (
        walk(Composite(), at(6, (5, 2), (5, 3)), 20, saved=2).iterations == 20 + 1
    )  # back to step 4, which just ended
    assert walk(Composite(), at(6, (5, 2)), 20, saved=None).iterations == 20  # the first member recovers it
    assert walk(CheckpointRollback(), at(6, (8, 2)), 20, saved=None).iterations == 20 + 8  # from the beginning


@pytest.mark.parametrize(("strategy", "saved"), [(Snapshot(every=10), None), (CheckpointRollback(), 10)])
def test_going_back_takes_as_long_as_the_closed_form_says(strategy, saved):
    """((1-P)^-k - 1)/(kP) iterations a step (the expected trials to k successes in a row, divided by k)."""
    stages, rate, every, steps = 4, 0.01, 10, 4000
    p = 1 - (1 - rate) ** stages
    expected = ((1 - p) ** -every - 1) / (every * p)
    found = [walk(strategy, FailureTrace.bernoulli(rate, stages, s), steps, saved=saved).iterations for s in range(6)]
    assert np.mean(found) / steps == pytest.approx(expected, rel=0.03)
    assert expected < MOST


@given(st.integers(4, 20), st.integers(2, 9))
def test_half_of_the_microbatches_swap_both_ends(stages, microbatches):
    orders = np.array(SwapEnds(microbatches, stages).paths())
    assert orders.shape == (microbatches, stages)
    assert (np.sort(orders, axis=1) == np.arange(stages)).all()
    swapped = (orders != np.arange(stages)).any(axis=1)
    assert swapped.sum() == microbatches // 2
    assert ((orders != np.arange(stages)).sum(axis=1) == 4 * swapped).all()
