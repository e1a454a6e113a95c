"""The fastest path of one route under limits: A* over prefixes of paths.

The low level of conflict-based search (Sharon et al. 2015, "Conflict-based search for optimal multi-agent pathfinding"),
with SkipPipe's rules of a path (`problem.Rules`). A path's time is what it would take alone on the network, but for the
windows in which it may not use a node: forward passes and links out, the loss at the start, backward passes and links back.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field, replace

from jaxpar.parallel.planner.problem import Arrangement, Problem, Route

Window = tuple[int, float, float]
"""A node, and from when to when a route may not use it."""


@dataclass(frozen=True)
class Limits:
    """What a route may not do, or must.

    Attributes:
      stages: it may not visit.
      wanted: stages it must visit.
      nodes: it may not visit.
      windows: in which a node is taken; a visit that would overlap waits for the end.
    """

    stages: frozenset[int] = frozenset()
    wanted: frozenset[int] = frozenset()
    nodes: frozenset[int] = frozenset()
    windows: tuple[Window, ...] = ()

    def without_stage(self, stage: int) -> Limits:
        return replace(self, stages=self.stages | {stage})

    def with_stage(self, stage: int) -> Limits:
        return replace(self, wanted=self.wanted | {stage})

    def without_node(self, node: int) -> Limits:
        return replace(self, nodes=self.nodes | {node})

    def with_window(self, window: Window) -> Limits:
        return replace(self, windows=tuple(sorted({*self.windows, window})))

    @property
    def key(self) -> tuple:
        """Sortable, and equal where the limits are."""
        return (*(tuple(sorted(s)) for s in (self.stages, self.wanted, self.nodes)), self.windows)


@dataclass(frozen=True)
class Found:
    """A path with its times.

    Attributes:
      route: its nodes.
      seconds: when its last backward pass ends.
      visits: (node, enter, exit) of each forward pass, the loss, and each backward pass, in order of time.
    """

    route: Route
    seconds: float
    visits: tuple[tuple[int, float, float], ...]


@dataclass
class PathFinder:
    """Finds fastest paths on an arrangement. What was found is kept: routes of the same start ask the same again."""

    problem: Problem
    arrangement: Arrangement
    _bounds: dict[int, dict] = field(default_factory=dict)
    _known: dict[tuple, Found | None] = field(default_factory=dict)

    def __post_init__(self):
        rules, stages = self.problem.rules, self.arrangement.stages
        link = self.problem.link
        self._stage = self.arrangement.stage_of
        # What a step to a node costs in all: its two passes, and the link there and back.
        size = range(self.problem.network.size)
        self._both = [[link[a][b] + link[b][a] for b in size] for a in size]
        self._work = [f + b for f, b in zip(self.problem.forward, self.problem.backward, strict=True)]
        # For each stage that a path can stand at, `lag` below its frontier: the stages it may go to, and the lag there.
        self._next: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for stage in range(rules.stages):
            for lag in range(rules.swap_distance + 1):
                frontier = stage + lag
                self._next[stage, lag] = [
                    (q, max(0, frontier - q))
                    for q in range(max(1, frontier - rules.swap_distance), min(rules.stages, frontier + rules.jump + 1))
                    if q not in (stage, frontier) and stages[q]
                ]

    def find(self, start: int, limits: Limits = Limits(), begin: float = 0.0) -> Found | None:
        """The fastest path from a start node, or None where the limits leave none.

        Args:
          start: a node of stage 0.
          limits: of this route.
          begin: seconds at which it starts.
        """
        at = begin if limits.windows else 0.0  # without windows a path is the same whenever it starts
        key = (start, limits, at)
        if key not in self._known:
            self._known[key] = self._search(start, limits, at)
        found = self._known[key]
        if found is None or at == begin:
            return found
        return self.timed(found.route, limits, begin)

    def _bound(self, start: int) -> dict[tuple[int, int, int], float]:
        """(nodes still to visit, node, lag) -> the least that the rest of a path can cost, whatever it has visited.

        Limits, repeated stages and sums of swaps are left out, so it is never too high.
        """
        if start not in self._bounds:
            rules, stages = self.problem.rules, self.arrangement.stages
            loss = self.problem.loss[start]
            bound = {
                (0, node, lag): self._both[node][start] + loss
                for node in range(self.problem.network.size)
                for lag in range(rules.swap_distance + 1)
            }
            for left in range(1, rules.length):
                for stage, nodes in enumerate(stages):
                    for lag in range(rules.swap_distance + 1):
                        after = [(n, b) for q, b in self._next[stage, lag] for n in stages[q]]
                        for node in nodes:
                            bound[left, node, lag] = min(
                                (self._both[node][n] + self._work[n] + bound[left - 1, n, b] for n, b in after),
                                default=math.inf,
                            )
            self._bounds[start] = bound
        return self._bounds[start]

    def _search(self, start: int, limits: Limits, begin: float) -> Found | None:
        rules, link = self.problem.rules, self.problem.link
        forward, backward = self.problem.forward, self.problem.backward
        stages, bound = self.arrangement.stages, self._bound(start)
        allowed = [
            () if q in limits.stages else tuple(n for n in nodes if n not in limits.nodes)
            for q, nodes in enumerate(stages)
        ]
        count = itertools.count()
        leave = _wait(limits, start, begin, forward[start]) + forward[start]
        back = backward[start]
        # (estimate, tie, time of leaving the last node, cost of the way back so far, path, visited, lag, total, swaps)
        heap: list[tuple] = [
            (leave + back + bound[rules.length - 1, start, 0], next(count), leave, back, (start,), 1, 0, 0, 0)
        ]
        best: dict[tuple, float] = {}
        while heap:
            _, _, now, back, path, visited, lag, total, swaps = heapq.heappop(heap)
            if isinstance(path, Found):
                return path
            node = path[-1]
            left = rules.length - len(path)
            if left == 0:
                found = self.timed(path, limits, begin)
                heapq.heappush(heap, (found.seconds, next(count), 0.0, 0.0, found, 0, 0, 0, 0))
                continue
            for q, behind in self._next[self._stage[node], lag]:
                if visited >> q & 1 or total + behind > rules.swap_total or swaps + (behind > 0) > rules.swap_count:
                    continue
                seen = visited | 1 << q
                if sum(not seen >> w & 1 for w in limits.wanted) > left - 1:
                    continue
                for n in allowed[q]:
                    enter = _wait(limits, n, now + link[node][n], forward[n])
                    leave = enter + forward[n]
                    home = back + link[n][node] + backward[n]
                    if not limits.windows:
                        state = (n, seen, behind, total + behind, swaps + (behind > 0))
                        if best.get(state, math.inf) <= leave + home:
                            continue
                        best[state] = leave + home
                    rest = leave + home + bound[left - 1, n, behind]
                    if rest < math.inf:
                        item = (rest, next(count), leave, home, (*path, n), seen, behind, total + behind)
                        heapq.heappush(heap, (*item, swaps + (behind > 0)))
        return None

    def timed(self, route: Route, limits: Limits = Limits(), begin: float = 0.0) -> Found:
        """The times of a path alone on the network."""
        problem, start = self.problem, route[0]
        visits: list[tuple[int, float, float]] = []
        now, place = begin, start

        def visit(node: int, seconds: float) -> None:
            nonlocal now, place
            enter = _wait(limits, node, now + problem.link[place][node], seconds)
            now, place = enter + seconds, node
            visits.append((node, enter, now))

        for node in route:
            visit(node, problem.forward[node])
        visit(start, problem.loss[start])
        for node in reversed(route):
            visit(node, problem.backward[node])
        return Found(route, now, tuple(visits))


def _wait(limits: Limits, node: int, enter: float, seconds: float) -> float:
    """When a visit that arrives at `enter` can begin, so that it overlaps no window."""
    for where, begin, end in limits.windows:  # in order of their ends below, node by node
        if where == node and enter < end and begin < enter + seconds:
            return _wait(limits, node, end, seconds)
    return enter
