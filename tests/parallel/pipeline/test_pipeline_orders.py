"""The schedules: they run, they are what their papers say, and what cannot be made is refused with the numbers."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.parallel.pipeline import orders
from jaxpar.parallel.pipeline.simulate import Costs, simulate
from jaxpar.parallel.pipeline.table import assign_ticks
from jaxpar.parallel.pipeline.tasks import Kind, Placement, Task, check_paths
from jaxpar.parallel.pipeline.validate import validate_order
from tests.parallel.pipeline.strategies import any_order

pytestmark = pytest.mark.quick

F, B, BI, BW = Kind.F, Kind.B, Kind.BI, Kind.BW


@settings(max_examples=150, deadline=None)
@given(any_order())
def test_every_order_is_complete_and_runs(order):
    validate_order(order)
    visits = sum(map(len, order.paths))
    halves = sum(task.kind is BI for row in order.tasks for task in row)
    assert sum(map(len, order.tasks)) == 2 * visits + halves
    assert halves == {"zb-h1": visits, "zb-v": visits}.get(order.name, halves if order.name == "dualpipe-v" else 0)


def written(order, device):
    return " ".join(f"{t.kind}{t.microbatch}" for t in order.tasks[device])


def test_one_f_one_b_as_drawn():
    """Narayanan et al. 2021, figure 3 (top), with 4 devices."""
    order = orders.one_f_one_b(4, 8)
    assert written(order, 0).startswith("F0 F1 F2 F3 B0 F4 B1 F5 B2")
    assert written(order, 3).startswith("F0 B0 F1 B1 F2 B2")
    assert written(order, 2).endswith("F6 B5 F7 B6 B7")


def test_interleaved_as_megatron_runs_it():
    order = orders.interleaved(2, 4, 2)
    stages = " ".join(f"{t.kind}{t.microbatch}@{t.stage}" for t in order.tasks[0])
    assert stages == (
        "F0@0 F1@0 F0@2 F1@2 F2@0 B0@2 F3@0 B1@2 F2@2 B0@0 F3@2 B1@0 B2@2 B3@2 B2@0 B3@0"
    )  # warm-up 2(p-1-s) + (v-1)p = 4, then pairs


def test_zero_bubble_as_drawn():
    """Qi et al. 2023, figure 2 (ZB-H1): the last device starts Bw one cycle late, the first one at the end."""
    order = orders.zb_h1(4, 8)
    assert written(order, 0).startswith("F0 F1 F2 F3 Bi0 Bw0 F4 Bi1 Bw1 F5")
    assert written(order, 3).startswith("F0 Bi0 F1 Bi1 F2 Bi2 F3 Bi3 Bw0 F4 Bi4 Bw1")


def test_a_v_returns_the_loss_to_the_first_device():
    placement = Placement.v_shaped(4)
    assert placement.grid == ((0, 7), (1, 6), (2, 5), (3, 4))
    assert [placement.device(s) for s in range(8)] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [placement.chunk(s) for s in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_round_robin():
    assert Placement.round_robin(3, 2).grid == ((0, 3), (1, 4), (2, 5))


@settings(deadline=None)
@given(st.integers(1, 7), st.integers(1, 20))
def test_gpipe_and_1f1b_activations(p, m):
    assert simulate(orders.gpipe(p, m)).activations == (m,) * p
    assert simulate(orders.one_f_one_b(p, m)).activations == tuple(min(p - s, m) for s in range(p))
    double = simulate(orders.one_f_one_b(p, m, "double")).activations
    assert double == tuple(min(2 * (p - s) - 1, m) for s in range(p))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 16), st.floats(0.1, 9), st.floats(0.1, 9))
def test_bubble_of_gpipe_and_1f1b(p, m, f, b):
    costs = Costs(forward=f, backward=b)
    for order in (orders.gpipe(p, m), orders.one_f_one_b(p, m), orders.one_f_one_b(p, m, "double")):
        found = simulate(order, costs)
        assert found.bubble == pytest.approx((p - 1) / m)
        assert found.idle == pytest.approx((p - 1) / (m + p - 1))


@settings(deadline=None)
@given(st.integers(2, 5), st.integers(1, 4), st.integers(1, 4), st.floats(0.1, 9), st.floats(0.1, 9))
def test_bubble_of_interleaved(p, groups, v, f, b):
    """(p-1)/(v·m), whatever the kinds take: Narayanan et al. 2021, section 2.2.2."""
    found = simulate(orders.interleaved(p, groups * p, v), Costs(forward=f, backward=b).per_chunk(v))
    assert found.ideal == pytest.approx(groups * p * (f + b))
    assert found.bubble == pytest.approx((p - 1) / (v * groups * p))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 8), st.sampled_from([(1, 1, 1), (3, 3, 2), (2, 3, 2)]))
def test_bubble_and_memory_of_zb_h1(p, more, costs):
    """(p-1)(F + Bi - Bw), and p microbatches everywhere: Qi et al. 2023, table 2. Given enough microbatches."""
    f, i, w = costs
    m = 2 * p + more
    found = simulate(orders.zb_h1(p, m), Costs(forward=f, backward_input=i, backward_weight=w))
    assert found.makespan - found.ideal == pytest.approx((p - 1) * (f + i - w))
    assert found.held == (p,) * p
    assert found.activations == tuple(p - s for s in range(p))


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 8))
def test_bubble_and_memory_of_zb_v(p, more):
    """With F = Bi = Bw nothing but the way to the last device is lost: p-1 ticks of a chunk, at 2p chunks held."""
    m = 2 * p + more
    found = simulate(orders.zb_v(p, m))
    assert found.makespan - found.ideal == p - 1
    assert max(found.held) <= 2 * p
    whole = simulate(orders.one_f_one_b(p, m), Costs(2, 2, 2))
    assert found.bubble < whole.bubble or p == 1


def test_dualpipe_v_loses_less_than_1f1b():
    p, m = 4, 16
    found = simulate(orders.dualpipe_v(p, m))
    assert found.bubble < simulate(orders.one_f_one_b(p, m)).bubble
    assert {t.kind for row in found.order.tasks for t in row} == {F, B, BI, BW}
    # As many weights' gradients on their own as devices, after the steady state, and those of its third step.
    for s, row in enumerate(found.order.tasks):
        assert sum(t.kind is BW for t in row) == p + (p - 1 - s)


@pytest.mark.parametrize(("stages", "more"), [(4, -2), (5, 0), (8, 0)])
@pytest.mark.parametrize("microbatches", [2, 4, 8])
def test_swaps_cost_one_tick(stages, more, microbatches):
    """Forwards alone: M + S ticks against M + S - 1 of the plain pipeline. With 4 stages all are swapped, a pair of
    microbatches fills all devices from its first tick, and one tick is won."""
    paths = orders.swapped_paths(stages, microbatches)
    order = orders.greedy("forward", Placement.round_robin(stages), paths, policy="forward")
    rows = assign_ticks(order)
    last = max(t for t, row in enumerate(rows) for task in row if task and task.kind is F)
    assert last + 1 == microbatches + stages + more


@pytest.mark.parametrize(("stages", "microbatches"), [(5, 8), (6, 12), (8, 16)])
def test_swaps_cost_one_pair_of_ticks(stages, microbatches):
    """With forwards and backwards in turns: m + p pairs of ticks, where 1F1B has m + p - 1; about 2p held as there."""
    order = orders.checkfree_plus(stages, microbatches, "double")
    assert len(assign_ticks(order, "one-kind")) == 2 * (microbatches + stages)
    assert max(simulate(order).activations) <= 2 * stages


def test_half_of_the_microbatches_are_swapped():
    order = orders.checkfree_plus(6, 4)
    assert order.paths == ((0, 1, 2, 3, 4, 5), (1, 0, 2, 3, 5, 4)) * 2
    assert order.is_first(Task(F, 1, 1))
    assert order.is_last(Task(F, 4, 3))
    assert not order.is_last(Task(F, 5, 3))


@settings(deadline=None)
@given(st.integers(2, 8), st.integers(1, 20), st.data())
def test_even_skips(stages, microbatches, data):
    skipped = data.draw(st.integers(0, stages - 1))
    paths = orders.even_skips(stages, microbatches, skipped)
    assert all(len(path) == stages - skipped and path[0] == 0 and list(path) == sorted(path) for path in paths)
    loads = [sum(s in path for path in paths) for s in range(stages)]
    assert loads[0] == microbatches
    assert max(loads[1:]) - min(loads[1:]) <= 1


def test_skipping_saves_its_share():
    """A quarter of the stages less, but for the first, which every path visits: the others are never the slowest."""
    full = simulate(orders.one_f_one_b(4, 12))
    found = simulate(orders.skippipe(4, orders.even_skips(4, 12)))
    assert sum(found.busy) == pytest.approx(0.75 * sum(full.busy))
    assert found.makespan < full.makespan


def test_skipping_in_turns_waits_for_the_first_stage_only():
    """Stage 0 stands in every path: no schedule is faster than its m microbatches and the way to the last stage."""
    order = orders.skippipe(8, orders.even_skips(8, 32), "double")
    assert len(assign_ticks(order, "one-kind")) == 2 * (32 + 8 - 1)
    assert max(simulate(order).activations) <= 16


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 7), st.integers(1, 12), st.integers(1, 6), st.sampled_from(["least", "double"]))
def test_in_flight_bounds_the_activations(p, m, window, warm_up):
    found = simulate(orders.checkfree_plus(p, m, warm_up, in_flight=window))
    assert max(found.activations) <= window


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: orders.gpipe(0, 4), "devices = 0; give a whole number of at least 1"),
        (lambda: orders.gpipe(2, 1.5), "microbatches = 1.5; give a whole number"),
        (lambda: orders.make("1f2b", 2, 4), "unknown schedule '1f2b' (did you mean '1f1b'?); schedules: gpipe, 1f1b, "),
        (lambda: orders.interleaved(4, 10), "and 10 is no multiple of 4; nearest: 8 or 12 microbatches"),
        (lambda: orders.make("1f1b", 4, 3, 2), "and 3 is no multiple of 4; nearest: 4 microbatches"),
        (lambda: orders.interleaved(1, 4, 2), "2 chunks on 1 device interleave with nothing"),
        (lambda: orders.make("zb-v", 4, 8, 3), "zb-v has 2 chunk(s) on a device, not 3"),
        (lambda: orders.make("gpipe", 4, 8, 2), "gpipe has 1 chunk(s) on a device, not 2"),
        (lambda: orders.checkfree_plus(3, 8), "3 stages cannot swap their first two and their last two; nearest: 4"),
        (lambda: orders.even_skips(4, 8, 4), "4 of 4 stages cannot be skipped: the first stays; give 0 to 3"),
        (lambda: orders.skippipe(3, [(0, 3)]), "microbatch 0 visits stage 3; stages are 0 to 2"),
        (lambda: orders.skippipe(3, [(0, 1), (0, 2, 0)]), "microbatch 1 visits stage 0 twice (path (0, 2, 0))"),
        (lambda: orders.skippipe(3, [()]), "the path of microbatch 0 is empty"),
        (lambda: check_paths([], 3), "there is no microbatch; give at least 1 path"),
        (lambda: orders.one_f_one_b(2, 2, "more"), "warm_up = 'more'; it is 'least' or 'double'"),
        (lambda: Placement(((0, 1), (2,))), "devices hold 2, 1 stages; give every device the same number of chunks"),
        (lambda: Placement(((0,), (0,))), "stages [0, 0] are placed; each of 0 to 1 (2 devices × 1 chunks)"),
    ],
)
def test_what_cannot_be_made(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()
