"""The planner: an arrangement, then paths that get better until the steps or the seconds are used up."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from jaxpar.parallel.planner import arrangement as arranging
from jaxpar.parallel.planner import baselines
from jaxpar.parallel.planner.check import check, check_arrangement
from jaxpar.parallel.planner.conflicts import Branch, Routes, avoid, search
from jaxpar.parallel.planner.events import Simulator
from jaxpar.parallel.planner.improve import improve
from jaxpar.parallel.planner.paths import PathFinder
from jaxpar.parallel.planner.plan import Plan
from jaxpar.parallel.planner.problem import Arrangement, Capacity, Problem, Route

RULES_STEPS = 600
"""Branches of the search under hard rules alone, at least; it goes on until it has a first set."""
COLLISION_STEPS = 200
"""Branches of the search that avoids collisions."""

Phase = Literal["arranging", "rules", "collisions", "improving"]


@dataclass(frozen=True)
class Progress:
    """What a callback gets.

    Attributes:
      phase: what the planner is at.
      step: steps done, those of the arrangement not counted.
      elapsed: seconds since the planner began.
      best: the best iteration time so far in seconds; None before the first.
    """

    phase: Phase
    step: int
    elapsed: float
    best: float | None


@dataclass(frozen=True)
class Outcome:
    """Plans by all methods, on one arrangement, each checked (`check.py`).

    Attributes:
      dtfm: whole pipelines.
      dtfm_skip: stages left out in turns, with no eye to links.
      without_tc2: SkipPipe's paths by their own times alone: conflict-based search under the hard rules.
      skippipe: the best by the event simulator of all sets of paths that were seen; never slower than `without_tc2`.
      optimal: whether `without_tc2` is proven to be the best by (slowest path, sum of paths).
      steps: how many were done, those of the arrangement not counted.
      history: (step, elapsed seconds, iteration time) whenever `skippipe` became better.
    """

    dtfm: Plan
    dtfm_skip: Plan
    without_tc2: Plan
    skippipe: Plan
    optimal: bool
    steps: int
    history: tuple[tuple[int, float, float], ...]

    @property
    def plans(self) -> tuple[Plan, ...]:
        return (self.dtfm, self.dtfm_skip, self.without_tc2, self.skippipe)


def plan(
    problem: Problem,
    *,
    arrangement: Arrangement | None = None,
    seed: int = 0,
    steps: int | None = None,
    seconds: float | None = None,
    arranging_steps: int = arranging.STEPS,
    tell: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Plans until `steps` or `seconds` are used up, whichever is first, or nothing is left to try.

    The steps are the same whatever the limit: a longer run does those of a shorter one first, so it is never worse, and a
    number of steps always gives the same plan (on one version of Python: 3.12 rounds sums of floats otherwise). A step is a
    branch of the conflict-based search or a changed set of routes. The arrangement, and the search for a first set of
    paths, are not cut short.

    Raises:
      ValueError: no limit, or a problem that has no paths.
    """
    if steps is None and seconds is None:
        raise ValueError("a plan can always be improved; give steps, seconds, or both")
    for name, value in (("steps", steps), ("seconds", seconds)):
        if value is not None and not value >= 0:
            raise ValueError(f"{name} = {value}; give a number of at least 0")
    began = clock()
    state = _State(problem, steps, seconds, tell, clock, began)
    if arrangement is None:
        saying = lambda step, _: state.say("arranging")
        arrangement = arranging.arrange(problem, seed=seed, steps=arranging_steps, tell=saying)
    check_arrangement(problem, arrangement)
    capacity = Capacity.of(problem, arrangement)
    capacity.check(problem)
    state.begin(capacity)
    finder = PathFinder(problem, arrangement)
    branch, optimal = _rules(state, finder, capacity)
    _collisions(state, finder, capacity, branch)
    _improving(state, problem, arrangement, capacity, seed)
    state.say(state.phase)

    whole, wave = baselines.dtfm(problem, arrangement)
    make = lambda name, routes: Plan(name, problem, arrangement, state.spread(routes), capacity.routes)
    unrouted = make("DT-FM with skip", baselines.dtfm_skip(problem, arrangement, capacity))
    without, best = make("SkipPipe without TC2", branch.routes), make("SkipPipe", state.routes)
    # Whole pipelines have all stages, whatever the rules say of paths that skip.
    unskipped = replace(problem, rules=replace(problem.rules, length=problem.rules.stages))
    plans = (Plan("DT-FM", unskipped, arrangement, whole, wave), unrouted, without, best)
    for made in plans:
        check(made)
    return Outcome(*plans, optimal, state.step, tuple(state.history))


class _State:
    """The best set of routes so far, the budget, and who is told."""

    def __init__(self, problem, steps, seconds, tell, clock, began):
        self.problem, self.steps, self.seconds = problem, steps, seconds
        self.tell, self.clock, self.began = tell, clock, began
        self.step, self.phase = 0, "arranging"
        self.best, self.routes = float("inf"), ()
        self.history: list[tuple[int, float, float]] = []
        self.simulator = Simulator(problem)

    def begin(self, capacity: Capacity) -> None:
        self.capacity = capacity

    def spread(self, routes: Routes) -> tuple[Route, ...]:
        """The path of each microbatch."""
        return tuple(routes[m % len(routes)] for m in range(self.problem.microbatches))

    def score(self, routes: Routes, most: float = math.inf) -> float:
        """Seconds of an iteration; infinity where it is sure to take more than `most`."""
        events = self.simulator.run(self.spread(routes), most)
        return math.inf if events is None else events.seconds

    def offer(self, routes: Routes, seconds: float | None = None) -> None:
        seconds = self.score(routes) if seconds is None else seconds
        if seconds < self.best:
            self.best, self.routes = seconds, routes
            self.history.append((self.step, self.clock() - self.began, seconds))

    def took(self, phase: Phase) -> None:
        self.step += 1
        self.phase = phase
        self.say(phase)

    def say(self, phase: Phase) -> None:
        if self.tell is not None:
            best = None if self.best == float("inf") else self.best
            self.tell(Progress(phase, self.step, self.clock() - self.began, best))

    @property
    def over(self) -> bool:
        if self.steps is not None and self.step >= self.steps:
            return True
        return self.seconds is not None and self.clock() - self.began >= self.seconds


def _rules(state: _State, finder: PathFinder, capacity: Capacity) -> tuple[Branch, bool]:
    best: Branch | None = None
    for taken, found in enumerate(search(finder, capacity), 1):
        if found is not None:
            best = found
            state.offer(found.routes)
        state.took("rules")
        if best is not None and (state.over or taken >= RULES_STEPS):
            return best, False
    if best is None:
        raise ValueError(
            f"no set of {capacity.routes} paths of {finder.problem.rules.length} of {finder.problem.rules.stages} stages "
            f"visits each stage {capacity.least} to {capacity.most} times within the nodes' memory; give nodes more memory, "
            "allow longer jumps, or skip less"
        )
    return best, True


def _collisions(state: _State, finder: PathFinder, capacity: Capacity, start: Branch) -> None:
    looked: Iterator = avoid(finder, capacity, start, state.score)
    for _ in range(COLLISION_STEPS):
        if state.over:
            return
        routes = next(looked, ())
        if routes == ():
            return
        if routes is not None:
            state.offer(routes)
        state.took("collisions")


def _improving(state: _State, problem: Problem, arrangement: Arrangement, capacity: Capacity, seed: int) -> None:
    if state.over:
        return
    for seconds, routes in improve(problem, arrangement, capacity, state.routes, state.score, seed=seed):
        state.offer(routes, seconds)
        state.took("improving")
        if state.over:
            return
