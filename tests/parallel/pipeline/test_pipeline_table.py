"""Tables against a second construction by brute force, and mutants that the validator must find."""

import dataclasses
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jaxpar.parallel.pipeline import orders
from jaxpar.parallel.pipeline.segments import PASSED, constants, passed_on, segments
from jaxpar.parallel.pipeline.table import BUFFERS, assign_ticks, colour, compile_table
from jaxpar.parallel.pipeline.tasks import Kind, Order, Placement, Task
from jaxpar.parallel.pipeline.validate import find_cycle, validate_order, validate_table
from tests.parallel.pipeline.brute_force import earliest_ticks, most_alive
from tests.parallel.pipeline.strategies import any_order

pytestmark = pytest.mark.quick

F, B, BI, BW = Kind.F, Kind.B, Kind.BI, Kind.BW
TICKS, KEEP = st.sampled_from(["mixed", "one-kind"]), st.sampled_from(["inputs", "residuals"])


def ticks_of(table):
    return {
        task: t for t in range(table.length) for d in range(table.devices) if (task := table.action(t, d)) is not None
    }


@settings(max_examples=60, deadline=None)
@given(any_order(devices=4, microbatches=5), TICKS, KEEP)
def test_as_built_by_brute_force(order, ticks, keep):
    """Ticks are the earliest there are, and each buffer has exactly as many slots as are ever wanted at once."""
    table = compile_table(order, ticks, keep)
    found = ticks_of(table)
    if ticks == "mixed":
        assert found == earliest_ticks(order)
    for buffer in BUFFERS:
        assert table.slots[buffer] == most_alive(order, found, buffer, keep), buffer


@settings(max_examples=60, deadline=None)
@given(any_order(), TICKS, KEEP)
def test_every_table_is_valid(order, ticks, keep):
    table = compile_table(order, ticks, keep)  # validates
    assert sorted(ticks_of(table)) == sorted(task for row in order.tasks for task in row)
    assert (table.row_kind is not None) or ticks == "mixed"
    idle = table.kind == 0
    for name in ("stage", "microbatch", "chunk", "first", "last"):
        assert not getattr(table, name)[idle].any()
    for buffer in BUFFERS:
        assert (table.slot[buffer][idle] == table.slots[buffer]).all()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), max_size=12))
def test_colours(lives):
    """No two that live at once share a slot, and there are no more slots than live at once."""
    intervals = [(start, start + span, (0, k)) for k, (start, span) in enumerate(lives)]
    slot_of, count = colour(intervals)
    for t in range(20):
        alive = [slot_of[key] for start, end, key in intervals if start <= t <= end]
        assert len(set(alive)) == len(alive)
    most = max((sum(start <= t <= end for start, end, _ in intervals) for t in range(20)), default=0)
    assert count == most


@pytest.mark.parametrize("p", [2, 4, 8])
def test_slots_do_not_grow_with_the_microbatches(p):
    sizes = [compile_table(orders.one_f_one_b(p, m, "double"), "one-kind").slots for m in (2 * p, 4 * p, 8 * p)]
    assert sizes[0] == sizes[1] == sizes[2]
    assert sizes[0]["residual"] == 2 * p - 1
    assert compile_table(orders.gpipe(p, 4 * p)).slots["residual"] == 4 * p


def test_rings_and_routes():
    """A ring needs a route for each direction, a V also the way to itself, and CheckFree+ two places at once."""
    assert compile_table(orders.one_f_one_b(4, 4)).shifts == (1, 3)
    assert compile_table(orders.one_f_one_b(2, 4)).shifts == (1,)
    assert compile_table(orders.one_f_one_b(1, 4)).shifts == ()
    assert compile_table(orders.zb_v(4, 8)).shifts == (0, 1, 3)
    assert compile_table(orders.checkfree_plus(6, 8)).shifts == (1, 2, 4, 5)
    table = compile_table(orders.one_f_one_b(4, 8, "double"), "one-kind")
    assert (table.shifts_of(F), table.shifts_of(B)) == ((1,), (3,))
    for t in range(table.length):
        assert set(table.shifts_at(t)) <= set(table.shifts_of(Kind(table.row_kind[t])))


def test_columns_are_what_one_device_follows():
    """A machine that knows nothing but its own columns: what it sends and receives is what the order says."""
    table = compile_table(orders.zb_v(3, 5))
    columns = table.columns()
    assert all(a.dtype == np.int32 and a.shape[0] == table.length and a.shape[-1] == 3 for a in columns.values())
    buffers = [{} for _ in range(3)]
    for t in range(table.length):
        sent = [None] * 3
        for d in range(3):
            row = {name: column[t, ..., d] for name, column in columns.items()}
            if row["kind"] == F:
                x = [] if row["first"] else buffers[d]["x", int(row["input"])]
                sent[d] = [*x, int(row["stage"])]
                if row["last"]:
                    assert sent[d] == list(range(6))
        for route, shift in enumerate(table.shifts):
            for d in range(3):
                buffers[d]["x", int(columns["receive_input"][t, route, d])] = sent[(d - shift) % 3]


def test_1f1b_of_one_kind_is_three_loops():
    table = compile_table(orders.one_f_one_b(4, 8, "double"), "one-kind")
    assert [(s.start, s.pattern, s.repeats) for s in segments(table.row_kind)] == [
        (0, (F,), 3),
        (3, (F, B), 8),
        (19, (B,), 3),
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4]), max_size=30), st.integers(0, 4), st.integers(2, 8))
def test_segments_are_the_sequence(kinds, times, longest):
    kinds = kinds * times
    found = segments(np.array(kinds, np.int32), longest)
    assert [k for s in found for k in s.pattern * s.repeats] == kinds
    assert all(s.start == (found[i - 1].stop if i else 0) for i, s in enumerate(found))
    for s in found:
        assert len(s.pattern) <= longest
        assert len(set(s.pattern)) == 1 or s.pattern[0] is F


def test_many_ticks_are_few_segments():
    table = compile_table(orders.one_f_one_b(16, 64, "double"), "one-kind")
    assert len(segments(table.row_kind)) == 3
    assert sum(len(s.pattern) for s in segments(table.row_kind)) == 4


def test_constants_are_what_all_turns_and_devices_have():
    for order in (orders.one_f_one_b(1, 4), orders.one_f_one_b(4, 8, "double"), orders.make("zb-h1", 3, 5)):
        table = compile_table(order, "one-kind")
        for loop in segments(table.row_kind):
            for i, known in enumerate(constants(table, loop)):
                for name, column in table.columns().items():
                    values = [
                        column[loop.start + turn * len(loop.pattern) + i, ..., device].tolist()
                        for turn in range(loop.repeats)
                        for device in range(table.devices)
                    ]
                    same = all(v == values[0] for v in values)
                    assert same == (name in known)
                    assert not same or known[name].tolist() == values[0]


def read_where_they_were_made(table, loops, buffer) -> bool:
    """Replayed: whether each device, which holds no more than what its last action of a kind that writes made in this
    turn, finds there what the next that reads is about."""
    writers, readers = PASSED[buffer]
    for loop in loops:
        for turn in range(loop.repeats):
            for device in range(table.devices):
                held = None
                for i, kind in enumerate(loop.pattern):
                    task = table.action(loop.start + turn * len(loop.pattern) + i, device)
                    if kind in readers and task is not None and held != (task.stage, task.microbatch):
                        return False
                    if kind in writers:
                        held = None if task is None else (task.stage, task.microbatch)
    return True


@settings(max_examples=60, deadline=None)
@given(any_order(devices=4, microbatches=5), KEEP)
def test_what_is_passed_on_is_read_where_it_was_made(order, keep):
    table = compile_table(order, "one-kind", keep)
    loops = segments(table.row_kind)
    expected = {buffer for buffer in PASSED if read_where_they_were_made(table, loops, buffer)}
    received = (table.receive_gradient < table.slots["gradient"]).any()
    assert passed_on(table, loops) == expected - ({"gradient"} if received else set())


def test_one_stage_passes_everything_on_and_four_their_weight_gradients_at_most():
    def passed(name, stages):
        table = compile_table(orders.make(name, stages, 6), "one-kind")
        return passed_on(table, segments(table.row_kind))

    assert passed("1f1b", 1) == passed("zb-h1", 1) == set(PASSED)
    assert passed("gpipe", 1) == passed("1f1b", 4) == {"weight"}, "nothing is split there"
    assert passed("zb-h1", 4) == set()


# -- mutants of orders ---------------------------------------------------------------------------------------------------


def with_row(order, device, row):
    return dataclasses.replace(order, tasks=(*order.tasks[:device], tuple(row), *order.tasks[device + 1 :]))


@settings(max_examples=100, deadline=None)
@given(any_order(), st.data())
def test_a_dropped_task_is_found(order, data):
    device = data.draw(st.sampled_from([d for d, row in enumerate(order.tasks) if row]))
    k = data.draw(st.integers(0, len(order.tasks[device]) - 1))
    row = list(order.tasks[device])
    dropped = row.pop(k)
    with pytest.raises(ValueError, match=rf"(lacks|on no microbatch's path|has) .*stage {dropped.stage}"):
        validate_order(with_row(order, device, row))


@settings(max_examples=100, deadline=None)
@given(any_order(), st.data())
def test_a_doubled_task_is_found(order, data):
    device = data.draw(st.sampled_from([d for d, row in enumerate(order.tasks) if row]))
    task = data.draw(st.sampled_from(order.tasks[device]))
    with pytest.raises(ValueError, match=f"{re.escape(str(task))} twice on device {device}; leave one out"):
        validate_order(with_row(order, device, [*order.tasks[device], task]))


@settings(max_examples=100, deadline=None)
@given(any_order(), st.data())
def test_a_swap_runs_or_is_a_cycle(order, data):
    """Two tasks of a device are swapped: what the validator lets through runs, what it refuses does stop."""
    device = data.draw(st.sampled_from([d for d, row in enumerate(order.tasks) if len(row) > 1]))
    row = list(order.tasks[device])
    i, j = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
    row[i], row[j] = row[j], row[i]
    mutant = with_row(order, device, row)
    cycle = find_cycle(mutant)
    if not cycle:
        compile_table(mutant)
        return
    with pytest.raises(ValueError, match="tasks wait for each other in a circle"):
        validate_order(mutant)
    with pytest.raises(ValueError, match="no device can go on"):
        assign_ticks(mutant)
    # Each of the cycle does wait for the next: as a dependency, or because it stands behind it on a device.
    for task, need in zip(cycle, [*cycle[1:], cycle[0]], strict=True):
        row = mutant.tasks[mutant.device(task)]
        behind = need in row and row.index(need) == row.index(task) - 1
        assert behind or need in mutant.dependencies(task)


def test_a_cycle_is_named():
    order = orders.one_f_one_b(2, 2)
    mutant = with_row(order, 0, [order.tasks[0][k] for k in (2, 0, 1, 3)])
    with pytest.raises(ValueError, match="circle") as caught:
        validate_order(mutant)
    assert str(caught.value) == (
        "1f1b cannot run, because tasks wait for each other in a circle: F of microbatch 0 at stage 0 (device 0), "
        "B of microbatch 0 at stage 0 (device 0), which the first waits for; move one of them ahead on its device"
    )


@pytest.mark.parametrize(
    ("mutant", "sentence"),
    [
        (lambda o: dataclasses.replace(o, tasks=o.tasks[:1]), "1f1b has tasks for 1 devices, and stages on 2"),
        (lambda o: dataclasses.replace(o, tasks=o.tasks[::-1]), "on device 0; the stage lies on device 1"),
        (
            lambda o: with_row(o, 0, [*o.tasks[0], Task(F, 0, 9)]),
            "F of microbatch 9 at stage 0 on device 0, which is on no",
        ),
        (lambda o: with_row(o, 0, [*o.tasks[0], Task(BW, 0, 0)]), "keep the whole or the two halves"),
        (
            lambda o: with_row(o, 0, [Task(BI, 0, 0) if t == Task(B, 0, 0) else t for t in o.tasks[0]]),
            "1f1b lacks Bw of microbatch 0 at stage 0; add it on device 0, which has the other half",
        ),
    ],
)
def test_what_is_wrong_with_an_order(mutant, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        validate_order(mutant(orders.one_f_one_b(2, 3)))


def test_bad_options():
    order = orders.gpipe(2, 2)
    with pytest.raises(ValueError, match="ticks = 'single'; they are 'mixed' or 'one-kind'"):
        compile_table(order, "single")
    with pytest.raises(ValueError, match="keep = 'all'; it is 'inputs' or 'residuals'"):
        compile_table(order, keep="all")


# -- mutants of tables ---------------------------------------------------------------------------------------------------


def changed(table, name, index, value):
    array = getattr(table, name) if isinstance(name, str) else table.slot[name[1]]
    array = array.copy()
    array[index] = value
    if isinstance(name, str):
        return dataclasses.replace(table, **{name: array})
    return dataclasses.replace(table, slot={**table.slot, name[1]: array})


@settings(max_examples=80, deadline=None)
@given(any_order(devices=5, microbatches=6), TICKS, KEEP, st.data())
def test_a_changed_entry_of_a_table_is_found(order, ticks, keep, data):
    """Every entry that an action or a message uses matters: any other number in it is an error."""
    table = compile_table(order, ticks, keep)
    t, d = data.draw(st.sampled_from([tuple(map(int, i)) for i in np.argwhere(table.kind)]))
    plain = ["kind", "stage", "microbatch", "chunk", "first", "last"]
    used = [("slot", b) for b in BUFFERS if table.slot[b][t, d] < table.slots[b]]
    name = data.draw(st.sampled_from(plain + used))
    old = int((getattr(table, name) if isinstance(name, str) else table.slot[name[1]])[t, d])
    highest = {"kind": 4, "stage": order.placement.stages, "microbatch": order.microbatches}
    new = data.draw(st.integers(0, table.slots[name[1]] if isinstance(name, tuple) else highest.get(name, 2)))
    assume(new != old)
    mutant = changed(table, name, (t, d), new)
    with pytest.raises(ValueError, match=r"tick|lacks"):
        validate_table(mutant)


@settings(max_examples=60, deadline=None)
@given(any_order(devices=5, microbatches=6), TICKS, KEEP, st.data())
def test_a_changed_route_is_found(order, ticks, keep, data):
    table = compile_table(order, ticks, keep)
    name = data.draw(st.sampled_from(["receive_input", "receive_gradient"]))
    array, slots = getattr(table, name), table.slots[name.removeprefix("receive_")]
    assume(array.size)
    index = tuple(int(data.draw(st.integers(0, n - 1))) for n in array.shape)
    new = data.draw(st.integers(0, slots))
    assume(new != array[index])
    with pytest.raises(ValueError, match="tick"):
        validate_table(changed(table, name, index, new))


@settings(max_examples=60, deadline=None)
@given(any_order(devices=5, microbatches=8), KEEP, st.data())
def test_a_life_cut_short_is_found(order, keep, data):
    """Two values whose lives overlap are put into one slot, everywhere: the second overwrites the first."""
    table = compile_table(order, "mixed", keep)
    kept = "residual" if keep == "residuals" else "input"
    assume(table.slots[kept] >= 2)
    d = data.draw(st.integers(0, table.devices - 1))
    slot = table.slot[kept].copy()
    receive = table.receive_input.copy()
    slot[:, d] = np.where(slot[:, d] == 1, 0, slot[:, d])
    if kept == "input":
        receive[:, :, d] = np.where(receive[:, :, d] == 1, 0, receive[:, :, d])
    assume((slot != table.slot[kept]).any())
    mutant = dataclasses.replace(table, slot={**table.slot, kept: slot}, receive_input=receive)
    with pytest.raises(ValueError, match=rf"reads {kept} slot 0, which holds microbatch \d+'s of stage \d+ since tick"):
        validate_table(mutant)


def test_a_dropped_tick_and_a_swapped_pair_of_ticks_are_found():
    table = compile_table(orders.one_f_one_b(3, 4))
    names = ("kind", "stage", "microbatch", "chunk", "first", "last", "receive_input", "receive_gradient")
    sentences = (
        "reads gradient slot|lacks|runs before",
        "tick 0, device 1: F of microbatch 0 at stage 1 runs before F of",
    )
    for rows, sentence in zip(
        (np.delete(np.arange(table.length), 5), np.r_[1, 0, 2 : table.length]), sentences, strict=True
    ):
        arrays = {name: getattr(table, name)[rows] for name in names}
        mutant = dataclasses.replace(table, **arrays, slot={b: a[rows] for b, a in table.slot.items()})
        with pytest.raises(ValueError, match=sentence):
            validate_table(mutant)


def test_a_lost_message_is_found_where_it_is_lost():
    table = compile_table(orders.one_f_one_b(3, 4))
    mutant = changed(table, "receive_input", (0, 0, 1), table.slots["input"])
    with pytest.raises(
        ValueError, match="tick 0: nobody receives the result of F of microbatch 0 at stage 0, for which F"
    ):
        validate_table(mutant)


def test_two_kinds_in_a_tick_of_one_kind_are_found():
    table = compile_table(orders.one_f_one_b(3, 4), "mixed")
    with pytest.raises(ValueError, match=r"tick \d+ has two kinds of action in a table of one kind a tick"):
        validate_table(dataclasses.replace(table, ticks="one-kind"))


def test_arrays_of_another_shape_or_type_are_found():
    table = compile_table(orders.one_f_one_b(2, 2))
    with pytest.raises(ValueError, match=r"chunk is int64\[6, 2\]; it must be int32\[6, 2\]"):
        validate_table(dataclasses.replace(table, chunk=table.chunk.astype(np.int64)))
    with pytest.raises(ValueError, match="receive_input is"):
        validate_table(dataclasses.replace(table, receive_input=table.receive_input[:, :0]))


def test_a_mixed_split_is_possible():
    """B for one microbatch and its halves for another, on one device: DualPipe-V does so."""
    rows = ((Task(F, 0, 0), Task(F, 0, 1), Task(B, 0, 0), Task(BI, 0, 1), Task(BW, 0, 1)),)
    order = Order("mixed", rows, Placement.round_robin(1), ((0,), (0,)))
    assert compile_table(order).slots == {"input": 0, "residual": 2, "gradient": 2, "weight": 1}
