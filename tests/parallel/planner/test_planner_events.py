"""The event simulator: by hand, against closed forms, against one written in another way, and what a timeline must keep."""

import itertools
import math
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxpar.parallel.planner.events import Simulator, dispatch
from jaxpar.parallel.planner.network import Network, Node
from jaxpar.parallel.planner.plan import Plan, lower_bound
from jaxpar.parallel.planner.problem import Arrangement, Problem, Rules, Workload
from tests.parallel.planner import brute_force

pytestmark = pytest.mark.quick


def even(
    size: int, stages: int, microbatches: int, workload: Workload, memory: int = 3, latency: float = 0.0
) -> Problem:
    """Equal machines, and links of a latency alone."""
    nodes = tuple(Node(f"n{i}", memory=memory) for i in range(size))
    matrix = lambda value: ((value,) * size,) * size
    return Problem(
        Network("even", nodes, matrix(latency), matrix(math.inf)), workload, Rules(stages, stages), microbatches
    )


def test_by_hand():
    """Forward 1 s, backward 2, loss 0.5, links 1. Node 0 ends its second forward pass at 2, and node 1 at 4; losses are at
    4 and 5, backward passes on node 1 at 5.5 and 7.5, and on node 0 at 8.5 and 10.5."""
    problem = even(2, 2, 2, Workload(1.0, 2.0, 0.5), latency=1.0)
    events = dispatch(problem, [(0, 1)] * 2)
    assert events.tasks == (
        ((0, 1, 0, 0), (1, 2, 1, 0), (4, 4.5, 0, 2), (5, 5.5, 1, 2), (8.5, 10.5, 0, 4), (10.5, 12.5, 1, 4)),
        ((2, 3, 0, 1), (3, 4, 1, 1), (5.5, 7.5, 0, 3), (7.5, 9.5, 1, 3)),
    )
    assert (events.seconds, events.ends) == (12.5, (10.5, 12.5))
    assert events.waited == 1 + 1  # the second microbatch before its forward pass, and before node 1's backward pass
    # With room for one, the second is let in when the first has ended.
    alone = dispatch(even(2, 2, 2, Workload(1.0, 2.0, 0.5), memory=1, latency=1.0), [(0, 1)] * 2)
    assert alone.ends == (10.5, 21)


@pytest.mark.parametrize("microbatches", [1, 4, 9])
def test_closed_forms(microbatches):
    """One stage: all work, one after another. Equal stages and free links: GPipe's and 1F1B's (M + S - 1)(F + B), and at
    most a forward pass more, for which the loss, which is at the first node, can be in the way."""
    work = Workload(1.0, 1.5, 0.25)
    assert dispatch(even(2, 1, microbatches, work), [(0,)] * microbatches).seconds == microbatches * 2.75
    for stages in (2, 3, 4):
        problem = even(stages, stages, microbatches, replace(work, loss=0.0), memory=microbatches)
        seconds = dispatch(problem, [tuple(range(stages))] * microbatches).seconds
        assert 0 <= seconds - (microbatches + stages - 1) * 2.5 <= 1.0
        assert microbatches > 1 or seconds == stages * 2.5


@st.composite
def iterations(draw):
    """A network, and paths over it that need not keep any rule but that a path visits a node once."""
    size = draw(st.integers(2, 6))
    seed = draw(st.integers(0, 10_000))
    problem = brute_force.problem(size, 2, 2, draw(st.integers(1, 8)), seed, memory=(1, 3))
    order = random.Random(seed)
    return problem, [tuple(order.sample(range(size), order.randint(1, size))) for _ in range(problem.microbatches)]


@settings(max_examples=150, deadline=None)
@given(iterations())
def test_against_one_written_in_another_way(iteration):
    problem, paths = iteration
    events = dispatch(problem, paths)
    seconds, passes = brute_force.simulated(problem, paths)
    assert events.seconds == pytest.approx(seconds, rel=1e-12)
    found = [(node, m, step, start, end) for node, tasks in enumerate(events.tasks) for start, end, m, step in tasks]
    assert len(found) == len(passes)
    for mine, other in zip(sorted(found), sorted(passes), strict=True):
        assert mine == pytest.approx(other, rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(iterations())
def test_what_a_timeline_keeps(iteration):
    problem, paths = iteration
    events = dispatch(problem, paths)
    times = {}
    for node, tasks in enumerate(events.tasks):
        for start, end, m, step in tasks:
            assert (m, step) not in times
            times[m, step] = (node, start, end)
        # A node runs one task at a time.
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(tasks))
        # It holds a microbatch from its forward to the end of its backward pass, never more than fit.
        held = [(end, -1) for _, end, m, step in tasks if step > len(paths[m])]
        held += [(start, 1) for start, _, m, step in tasks if step < len(paths[m])]
        now = 0
        for _, change in sorted(held):
            now += change
            assert now <= problem.memory[node]
    for m, path in enumerate(paths):
        # Every forward pass, one loss, every backward pass, each behind the one before and its link.
        nodes = [*path, path[0], *reversed(path)]
        for step, node in enumerate(nodes):
            assert times[m, step][0] == node
            if step:
                before = nodes[step - 1]
                assert times[m, step][1] >= times[m, step - 1][2] + problem.link[before][node] * (node != before) - 1e-9
        assert events.ends[m] == times[m, 2 * len(path)][2]
        assert events.ends[m] >= brute_force.alone(problem, path) - 1e-9
    assert len(times) == sum(2 * len(path) + 1 for path in paths)
    arrangement = Arrangement(tuple((n,) for n in range(problem.network.size)))
    assert events.seconds >= lower_bound(Plan("any", problem, arrangement, tuple(paths), len(paths))) - 1e-9


@settings(max_examples=50, deadline=None)
@given(iterations())
def test_it_gives_up_only_where_more_is_sure(iteration):
    problem, paths = iteration
    seconds = dispatch(problem, paths).seconds
    simulator = Simulator(problem)
    assert simulator.run(paths, seconds + 1e-6).seconds == seconds
    assert simulator.run(paths, seconds * 0.999) is None


@settings(max_examples=30, deadline=None)
@given(iterations())
def test_the_pipeline_simulator_agrees(iteration):
    """The same order of tasks, priced by `pipeline/simulate.py`, which runs each as early as it can."""
    problem, paths = iteration
    arrangement = Arrangement(tuple((n,) for n in range(problem.network.size)))
    plan = Plan("any", problem, arrangement, tuple(paths), len(paths))
    assert plan.simulation.makespan <= plan.seconds + 1e-9
    if min(problem.memory) >= len(paths):
        assert plan.simulation.makespan == pytest.approx(plan.seconds)
