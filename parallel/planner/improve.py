"""Better routes by small changes, each scored by the event simulator: late-acceptance hill climbing.

Burke and Bykov 2017, "The late acceptance hill-climbing heuristic": a change is taken where it is no worse than what was
held `HISTORY` steps ago. It needs no schedule, so stopping it early or late is the same search, and more steps are never
worse. After `STALE` steps without a better set it goes on from the best with some slack. Every change keeps the hard rules: loads of nodes and stages stay, or go where there is room.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator

from jaxpar.parallel.planner.conflicts import Routes
from jaxpar.parallel.planner.problem import Arrangement, Capacity, Problem, Route

HISTORY = 200
STALE = 3000
SLACK = 1.03


def improve(
    problem: Problem,
    arrangement: Arrangement,
    capacity: Capacity,
    routes: Routes,
    score: Callable[[Routes, float], float],
    *,
    seed: int = 0,
) -> Iterator[tuple[float, Routes]]:
    """Endless, unless nothing can change: (seconds, routes) that was tried at each step.

    Args:
      score: the seconds of routes, or infinity where they are sure to be more than its second argument.
    """
    draw = random.Random(seed)
    moves = Moves(problem, arrangement, capacity, draw)
    now = best = list(routes)
    cost = least = score(routes, math.inf)
    late = [cost] * HISTORY
    step = stale = failed = 0
    while failed < 1000:
        candidate = moves.change(now)
        if candidate is None:
            failed += 1
            continue
        failed = 0
        at = step % HISTORY
        new = score(tuple(candidate), max(cost, late[at]))
        yield new, tuple(candidate)
        if new <= cost or new <= late[at]:
            now, cost = candidate, new
        late[at] = min(late[at], cost)
        step, stale = step + 1, stale + 1
        if cost < least:
            best, least, stale = now, cost, 0
        if stale == STALE:
            now, cost, stale = best, least, 0
            late = [SLACK * least] * HISTORY


class Moves:
    """Random changes of a set of routes that keep the hard rules."""

    def __init__(self, problem: Problem, arrangement: Arrangement, capacity: Capacity, draw: random.Random):
        self.rules, self.memory, self.draw = problem.rules, problem.memory, draw
        self.stages, self.stage, self.capacity = arrangement.stages, arrangement.stage_of, capacity
        self.kinds = [self.node, self.node, self.exchange, self.exchange, self.stage_move, self.reorder, self.tails]

    def change(self, routes: list[Route]) -> list[Route] | None:
        """A changed copy, or None where the change that was drawn is not possible."""
        return self.draw.choice(self.kinds)(list(routes))

    def _path(self, route: Route) -> Route | None:
        return route if self.rules.allows([self.stage[n] for n in route]) else None

    def _load(self, routes: list[Route], node: int) -> int:
        return sum(node in route for route in routes)

    def node(self, routes: list[Route]) -> list[Route] | None:
        """A route takes another node of a stage; where that is full, one of its visitors takes the old one."""
        if self.rules.length == 1:
            return None
        r, p = self.draw.randrange(len(routes)), self.draw.randrange(1, self.rules.length)
        old = routes[r][p]
        others = [n for n in self.stages[self.stage[old]] if n != old]
        if not others:
            return None
        new = self.draw.choice(others)
        visitors = [k for k, route in enumerate(routes) if new in route]
        full = len(visitors) >= self.memory[new]
        if visitors and (full or self.draw.random() < 0.5):
            k = self.draw.choice(visitors)
            routes[k] = tuple(old if n == new else n for n in routes[k])
        routes[r] = (*routes[r][:p], new, *routes[r][p + 1 :])
        return routes

    def exchange(self, routes: list[Route]) -> list[Route] | None:
        """Two routes exchange a stage of one for a stage of the other, with their nodes."""
        if len(routes) < 2 or self.rules.length == 1:
            return None
        a, b = self.draw.sample(range(len(routes)), 2)
        visited = [{self.stage[n]: n for n in routes[k][1:]} for k in (a, b)]
        give = [n for s, n in visited[0].items() if s not in visited[1]]
        take = [n for s, n in visited[1].items() if s not in visited[0]]
        if not give or not take:
            return None
        x, y = self.draw.choice(give), self.draw.choice(take)
        return self._replaced(routes, (a, x, y), (b, y, x))

    def stage_move(self, routes: list[Route]) -> list[Route] | None:
        """A route leaves a stage that has more than it must for one that has room."""
        if self.rules.length == self.rules.stages:
            return None
        r = self.draw.randrange(len(routes))
        loads = [0] * self.rules.stages
        for route in routes:
            for n in route:
                loads[self.stage[n]] += 1
        visited = {self.stage[n] for n in routes[r]}
        leave = [n for n in routes[r][1:] if loads[self.stage[n]] > self.capacity.least]
        enter = [k for k in range(1, self.rules.stages) if k not in visited and loads[k] < self.capacity.most]
        if not leave or not enter:
            return None
        room = [n for n in self.stages[self.draw.choice(enter)] if self._load(routes, n) < self.memory[n]]
        return self._replaced(routes, (r, self.draw.choice(leave), self.draw.choice(room))) if room else None

    def reorder(self, routes: list[Route]) -> list[Route] | None:
        """Two neighbours on a route change places."""
        if self.rules.length < 3:
            return None
        r, p = self.draw.randrange(len(routes)), self.draw.randrange(1, self.rules.length - 1)
        route = list(routes[r])
        route[p], route[p + 1] = route[p + 1], route[p]
        path = self._path(tuple(route))
        if path is None:
            return None
        routes[r] = path
        return routes

    def tails(self, routes: list[Route]) -> list[Route] | None:
        """Two routes exchange all but their starts."""
        if len(routes) < 2:
            return None
        a, b = self.draw.sample(range(len(routes)), 2)
        routes[a], routes[b] = (routes[a][0], *routes[b][1:]), (routes[b][0], *routes[a][1:])
        return routes

    def _replaced(self, routes: list[Route], *changes: tuple[int, int, int]) -> list[Route] | None:
        """Routes with nodes replaced by those of other stages, then in the order of their stages."""
        for r, old, new in changes:
            tail = sorted([n for n in routes[r][1:] if n != old] + [new], key=self.stage.__getitem__)
            path = self._path((routes[r][0], *tail))
            if path is None:
                return None
            routes[r] = path
        return routes
