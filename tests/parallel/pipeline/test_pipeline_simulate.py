"""Makespans against a search through all orders, links, memory, the choice of ticks, and pictures."""

import itertools
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.parallel.pipeline import draw, orders
from jaxpar.parallel.pipeline.choose import candidates, choose, compare, fsdp_seconds
from jaxpar.parallel.pipeline.simulate import Costs, lockstep, simulate
from jaxpar.parallel.pipeline.table import compile_table
from jaxpar.parallel.pipeline.tasks import Kind
from tests.parallel.pipeline.brute_force import shortest
from tests.parallel.pipeline.strategies import any_order

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("p", "m", "b"), [(2, 2, 1), (2, 3, 2), (2, 4, 1), (3, 2, 1), (3, 3, 1), (3, 2, 2)])
def test_no_order_is_faster_than_1f1b(p, m, b):
    """Where B is not split, over all orders there are: and none that holds as little is either."""
    found = simulate(orders.one_f_one_b(p, m), Costs(backward=b))
    assert found.makespan == shortest(p, m, b) == (m + p - 1) * (1 + b)
    assert found.makespan == shortest(p, m, b, [min(p - s, m) for s in range(p)])
    if p > 1 and m > 1:
        tight = [1] * p
        assert shortest(p, m, b, tight) > found.makespan


@settings(max_examples=60, deadline=None)
@given(any_order(), st.floats(0.1, 4), st.floats(0.1, 4), st.floats(0.1, 4), st.floats(0, 2))
def test_what_every_simulation_keeps(order, f, i, w, latency):
    costs = Costs(forward=f, backward_input=i, backward_weight=w, latency=latency)
    found = simulate(order, costs)
    assert found.makespan >= found.ideal * (1 - 1e-9)
    assert found.makespan == max(found.end.values())
    assert 0 <= found.idle < 1
    for device, row in enumerate(order.tasks):
        for a, b in itertools.pairwise(row):
            assert found.start[b] >= found.end[a] - 1e-9
        for task in row:
            assert found.end[task] - found.start[task] == pytest.approx(costs.seconds(task.kind, task.stage))
            for need in order.dependencies(task):
                away = order.device(need) != device
                assert found.start[task] >= found.end[need] + latency * away - 1e-9
    # What a device has room for in a table is what the simulation says that it holds.
    table = compile_table(order)
    assert table.slots["residual"] == max(found.activations)
    assert lockstep(table, costs) >= found.makespan * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 12), st.floats(0.5, 3), st.floats(0.5, 6))
def test_one_kind_reaches_the_ideal_time_of_1f1b(p, m, f, b):
    """(m + p - 1)(F + B) in lock step, with the double warm-up."""
    table = compile_table(orders.one_f_one_b(p, m, "double"), "one-kind")
    assert lockstep(table, Costs(forward=f, backward=b)) == pytest.approx((m + p - 1) * (f + b))
    assert table.slots["residual"] == min(2 * p - 1, m)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(2, 3), st.floats(0.5, 3), st.floats(0.5, 6))
def test_one_kind_reaches_the_ideal_time_of_interleaved(p, groups, v, f, b):
    order = orders.interleaved(p, groups * p, v)
    costs = Costs(forward=f, backward=b).per_chunk(v)
    assert lockstep(compile_table(order, "one-kind"), costs) == pytest.approx(simulate(order, costs).makespan)


def test_the_measured_example():
    """p = 4, m = 8, B = 2F: 33 at best, 40 in mixed lock step."""
    costs = Costs(forward=1, backward=2)
    assert simulate(orders.one_f_one_b(4, 8), costs).makespan == 33
    assert lockstep(compile_table(orders.one_f_one_b(4, 8), "mixed"), costs) == 40
    choice = choose("1f1b", 4, 8, costs=costs)
    assert (choice.ticks, choice.warm_up, choice.seconds) == ("one-kind", "double", 33)
    interleaved = choose("interleaved", 4, 8, 2, costs=costs.per_chunk(2))
    assert (interleaved.ticks, interleaved.seconds) == ("one-kind", 28.5)


def test_zero_bubble_wants_mixed_ticks():
    choice = choose("zb-h1", 4, 8)
    assert (choice.ticks, choice.seconds) == ("mixed", 3 * 8 + 3)  # (p-1)(F + Bi - Bw) more than the work
    assert [c.ticks for c in candidates("zb-h1", 4, 8)] == ["mixed", "one-kind"]


def test_links_may_change_the_choice():
    """A mixed tick pays for both directions, so slow links speak for one kind a tick."""
    fast, slow = (choose("1f1b", 4, 8, costs=Costs(1, 1, 0, latency=x)) for x in (0.0, 5.0))
    assert (fast.seconds, fast.ticks) == (22, "one-kind")  # as fast as mixed ticks, and without a switch
    assert slow.ticks == "one-kind"
    found = {(c.ticks, c.warm_up): c.seconds for c in candidates("1f1b", 4, 8, costs=Costs(1, 1, 0, latency=5.0))}
    assert found["one-kind", "double"] == 22 * (1 + 5)
    assert found["mixed", "least"] == 22 * (1 + 2 * 5)


def test_a_choice_within_memory():
    choice = choose("1f1b", 4, 16, costs=Costs(backward=2), keep="inputs", most_slots=4)
    assert choice.slots <= 4
    assert choice.warm_up == "least"
    with pytest.raises(ValueError, match="gpipe needs 16 slots for inputs and residuals, and 4 are allowed"):
        choose("gpipe", 4, 16, keep="inputs", most_slots=4)


def test_links_and_uneven_stages():
    """Two stages, one microbatch: F0, the link, F1, B1, the link, B0."""
    costs = Costs(forward=(1, 2), backward=(3, 4), latency=0.5, message=10, bandwidth=20)
    found = simulate(orders.gpipe(2, 1), costs)
    assert found.makespan == 1 + 1 + 2 + 4 + 1 + 3
    assert found.busy == (4, 6)
    assert found.bubble == 12 / 6 - 1


def test_bytes():
    """A split backward holds the weights' part from BI on, next to the activation while BI runs."""
    costs = Costs(activation=10, weight=4)
    assert simulate(orders.gpipe(2, 3), costs).bytes == (30, 30)
    found = simulate(orders.zb_h1(1, 2), costs)  # F Bi Bw F Bi Bw
    assert found.bytes == (14,)
    assert (found.activations, found.held) == ((1,), (1,))


def test_chunks_share_a_stage():
    costs = Costs(forward=2, backward_input=4, backward_weight=6, message=5, activation=8).per_chunk(2)
    assert (costs.forward, costs.backward_input, costs.backward_weight, costs.activation) == (1, 2, 3, 4)
    assert costs.message == 5
    assert Costs(forward=(1, 2)).per_chunk(1).forward == (1, 2)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Costs(forward=-1), "forward = -1; a cost is a number of at least 0"),
        (lambda: Costs(activation=math.nan), "activation = nan; a cost is a number of at least 0"),
        (lambda: Costs(bandwidth=0), "bandwidth above 0"),
        (
            lambda: Costs(forward=(1, 2)).per_chunk(2),
            "forward is given for 2 stages; with 2 chunks give one number, or",
        ),
        (lambda: simulate(orders.gpipe(3, 1), Costs(forward=(1, 2))), "forward has 2 numbers for 3 virtual stages"),
    ],
)
def test_bad_costs(make, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        make()


def test_the_comparison():
    rows, refused = compare(4, 8, 2, Costs(backward=2))
    assert {row.name for row in rows} == set(orders.SCHEDULES)
    assert not refused
    assert [r.choice.seconds for r in rows] == sorted(r.choice.seconds for r in rows)
    own = {row.name: row.simulation.makespan for row in compare(6, 12, 2, Costs(backward=2))[0]}
    apart = [simulate(orders.checkfree_plus(6, 12, w), Costs(backward=2)).makespan for w in ("least", "double")]
    assert own["checkfree+"] == min(apart) < max(apart)
    _, refused = compare(3, 4)
    assert set(refused) == {"interleaved", "checkfree+"}
    assert "nearest: 3 or 6 microbatches" in refused["interleaved"]


def test_fsdp():
    """m·(F + B) while the links are fast; three times the weights over a link when they are not."""
    assert fsdp_seconds(4, 8, Costs(backward=2), 0) == 24
    assert fsdp_seconds(4, 8, Costs(backward=2, bandwidth=10), 1000) == 3 * 0.75 * 100
    assert fsdp_seconds(4, 9, Costs(backward=2), 0) == 36  # one device has three microbatches
    assert fsdp_seconds(2, 4, Costs(forward=(1, 2), backward=(3, 4)), 0) == 20


# -- pictures ------------------------------------------------------------------------------------------------------------


def test_text():
    table = compile_table(orders.one_f_one_b(2, 2))
    assert draw.text(table).splitlines() == [
        "tick      0  1  2  3  4  5",
        "device 0 F0 F1  . B0  . B1",
        "device 1  . F0 B0 F1 B1  .",
    ]
    assert draw.text(table, 2, 4).splitlines()[1] == "device 0  . B0"
    assert "Bw0'" in draw.text(compile_table(orders.zb_v(2, 3)))


def test_picture(tmp_path):
    for name in ("1f1b", "zb-v"):
        file = tmp_path / f"{name}.png"
        draw.plot(simulate(orders.make(name, 3, 6)), file)
        assert file.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="not supported"):
        draw.plot(simulate(orders.gpipe(2, 2)), tmp_path / "x.word")


def test_colours_cover_the_kinds():
    assert set(draw.COLOUR) == set(draw.MEANING) == set(Kind) - {Kind.IDLE}
