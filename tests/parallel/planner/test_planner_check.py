"""The validator: plans that keep every rule pass, and each broken rule is named with its numbers."""

import itertools
import re
from dataclasses import replace
from functools import cache

import pytest

from jaxpar.parallel.planner.check import check, check_stages
from jaxpar.parallel.planner.files import load
from jaxpar.parallel.planner.plan import Plan
from jaxpar.parallel.planner.problem import Arrangement, Problem, Rules, Workload
from jaxpar.parallel.planner.search import plan
from tests.parallel.planner.brute_force import keeps_the_rules, stage_paths

pytestmark = pytest.mark.quick

RULES = Rules(6, 4)


@cache
def good() -> Plan:
    """Twelve equal machines, two a stage, twelve microbatches at once: each stage but the first gets 36 / 5 visits."""
    problem = Problem(load("homogeneous12"), Workload(), RULES, 6)
    return plan(problem, arrangement=pairs(12), steps=100).skippipe


def pairs(nodes: int) -> Arrangement:
    return Arrangement(tuple((n, n + 1) for n in range(0, nodes, 2)))


def by_stages(*paths: tuple[int, ...], nodes: tuple[int, ...] = (0, 1) * 3) -> Plan:
    """Microbatches along stages, on the first or second node of each by turns."""
    routes = tuple(tuple(2 * s + k for s in path) for path, k in zip(paths, nodes, strict=False))
    made = good()
    return replace(made, problem=replace(made.problem, microbatches=len(routes)), paths=routes, wave=len(routes))


EVEN = ((0, 1, 2, 3), (0, 1, 4, 5), (0, 2, 3, 4), (0, 1, 2, 5), (0, 3, 4, 5))
"""Three visits to each of the stages 1 to 5."""


def test_good_plans():
    check(good())
    check(by_stages(*EVEN))
    check(by_stages((0, 2, 1, 3), (0, 1, 5, 4), *EVEN[2:]))  # swaps that are allowed


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        ((0, 1, 2), "visits 3 stages ([0, 1, 2]), and a path has 4"),
        ((0, 1, 2, 3, 4), "visits 5 stages ([0, 1, 2, 3, 4]), and a path has 4"),
        ((1, 2, 3, 4), "starts at stage 1; stage 0, which embeds, comes first"),
        ((0, 1, 2, 1), "visits stage 1 2 times ([0, 1, 2, 1]); once is the most"),
        ((0, 3, 1, 2), "swaps over a distance of 2 ([0, 3, 1, 2]), and 1 is the most"),
        ((0, 5, 1, 2), "swaps over a distance of 4"),
    ],
)
def test_the_rules_of_a_path(stages, sentence):
    with pytest.raises(ValueError, match=re.escape(f"SkipPipe: microbatch 1 {sentence}")):
        check(by_stages(EVEN[0], stages, *EVEN[2:]))


@pytest.mark.parametrize(
    ("rules", "stages", "sentence"),
    [
        (Rules(8, 4), (0, 1, 6, 7), "jumps 5 stages ahead ([0, 1, 6, 7]), and 4 is the most"),
        (Rules(4, 2, jump=3), (0, 4), "visits stage 4 ([0, 4]); stages are 0 to 3"),
        (Rules(6, 4, swap_total=1), (0, 2, 1, 3), None),
        (Rules(6, 5, swap_total=1), (0, 2, 1, 4, 3), "swaps over 2 stages in all ([0, 2, 1, 4, 3]), and 1 is the most"),
        (Rules(6, 5, swap_count=1), (0, 2, 1, 4, 3), "swaps 2 times ([0, 2, 1, 4, 3]), and 1 is the most"),
        (Rules(6, 4, swap_distance=2), (0, 3, 1, 4), None),
        (Rules(6, 4, swap_distance=0), (0, 2, 1, 3), "swaps over a distance of 1 ([0, 2, 1, 3]), and 0 is the most"),
    ],
)
def test_limits_can_be_set(rules, stages, sentence):
    assert rules.allows(stages) == keeps_the_rules(stages, rules) == (sentence is None)
    if sentence is None:
        check_stages(stages, rules)
    else:
        with pytest.raises(ValueError, match=re.escape(f"the path {sentence}")):
            check_stages(stages, rules)


@pytest.mark.parametrize("rules", [RULES, Rules(5, 5), Rules(6, 3, jump=3), Rules(6, 5, swap_distance=2, swap_count=1)])
def test_every_path_by_brute_force(rules):
    """`Rules.allows`, which the search asks, and `check_stages`, which is written apart, by the words of the rules."""
    allowed = 0
    for path in itertools.product(range(rules.stages), repeat=rules.length):
        right = keeps_the_rules(path, rules)
        assert rules.allows(path) == right
        if right:
            check_stages(path, rules)
            allowed += 1
        else:
            with pytest.raises(ValueError, match="the path"):
                check_stages(path, rules)
    assert allowed == len(stage_paths(rules)) > 1


def test_the_rules_of_a_wave():
    one_too_many = ((0, 1, 2, 3), (0, 1, 4, 5), (0, 1, 3, 4), (0, 1, 2, 5), (0, 3, 4, 5))
    with pytest.raises(ValueError, match=r"0 to 4, 4 visit stage 1, and 3 is the most \(\[4, 2, 3, 3, 3\] visit"):
        check(by_stages(*one_too_many))
    # 6 paths: 18 visits, 3 or 4 for each stage.
    too_few = (*EVEN, (0, 1, 3, 4))
    check(by_stages(*too_few, nodes=(0, 1, 0, 1, 0, 1)))
    too_few = ((0, 1, 3, 4), (0, 1, 4, 5), (0, 2, 3, 4), (0, 1, 2, 5), (0, 3, 4, 5), (0, 1, 3, 5))
    with pytest.raises(ValueError, match="2 visit stage 2, and 3 is the least"):
        check(by_stages(*too_few))
    with pytest.raises(ValueError, match="5 visit node 'here-0' of stage 0, which has memory for 3"):
        check(by_stages(*EVEN, nodes=(0,) * 5))
    check(replace(by_stages(*EVEN, *EVEN, nodes=(0, 1, 0, 1, 0) * 2), wave=5))
    with pytest.raises(ValueError, match="of microbatches 5 to 9, 4 visit node 'here-0' of stage 0"):
        check(replace(by_stages(*EVEN, *EVEN, nodes=(0, 1, 0, 1, 0, 0, 0, 0, 1, 0)), wave=5))


def test_a_stage_that_nobody_visits():
    with pytest.raises(ValueError, match="SkipPipe: no microbatch visits stage 4; every stage must be trained"):
        check(by_stages((0, 1, 2, 3)))


def test_memory_in_time():
    """Waves keep it, and yet too many are held: microbatches of the next wave came in before others had ended."""
    made = by_stages(*EVEN, *EVEN, nodes=(0, 1, 0, 1, 0) * 2)
    roomy = replace(made, wave=5)
    check(roomy)
    network = roomy.problem.network
    tight = replace(network, nodes=tuple(replace(node, memory=2) for node in network.nodes))
    events = roomy.events
    tight = replace(roomy, problem=replace(roomy.problem, network=tight), wave=1)
    object.__setattr__(tight, "events", events)  # the timeline of nodes with more memory
    with pytest.raises(ValueError, match=r"holds 3 microbatches at a time, and has memory for 2"):
        check(tight)


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)), "the arrangement has 5 stages, and the rules 6"),
        (((0, 1), (2, 3), (4, 5), (6, 7), (8, 9), (10, 10)), "each of 0 to 11 must stand exactly once"),
        (((0, 1), (2, 3), (4, 5), (6, 7), (8, 9, 10, 11), ()), "stage 5 has no node; give each stage one at least"),
    ],
)
def test_arrangements(stages, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check(replace(good(), arrangement=Arrangement(stages)))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan(good().problem, arrangement=Arrangement(stages), steps=1)


def test_paths_and_nodes_that_are_not_there():
    made = good()
    with pytest.raises(ValueError, match="has 5 paths for 6 microbatches; each has one"):
        check(replace(made, paths=made.paths[:5]))
    with pytest.raises(ValueError, match="microbatch 0 visits node 12, which holds no stage"):
        check(replace(made, paths=((12, *made.paths[0][1:]), *made.paths[1:])))
