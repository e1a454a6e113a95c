"""Conflict-based search: routes that each are as fast as they can be, until together they break no rule.

The high level (Sharon et al. 2015; SkipPipe's `schedulers/CBS.py`) holds a tree. A branch limits single routes; its routes
are the fastest under these limits (`paths.py`); where they conflict, it grows a child for every way to resolve the
conflict. Conflicts, in the order in which they are resolved:

    stage over    more than `most` routes of a wave visit a stage: one of `most` + 1 of them must not
    stage under   fewer than `least` do: one of the others must
    node over     more routes than a node has memory for (the reference's TC1): one of memory + 1 must not visit it
    collision     two visits to a node overlap in time (TC2, `collisions` only): one of the two waits

The first three are rules that every result keeps; resolving them is complete, so that a search that ends has the best
routes by (slowest route, sum of all), alone on the network. A collision is a wish: results are scored by the simulator.

Where we differ from the reference: limits on stages go both ways, so that loads stay uniform where they do not divide
evenly; two queues take turns (by cost, which proves the optimum, and by conflicts, which finds a set soon); nothing stops
at a ratio of some first solution.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from jaxpar.parallel.planner.paths import Found, Limits, PathFinder
from jaxpar.parallel.planner.problem import Capacity, Route

Routes = tuple[Route, ...]
Change = tuple[int, Limits]
"""A route, and its new limits."""


@dataclass(frozen=True)
class Branch:
    """A node of the search tree: limits and the fastest path of each route."""

    limits: tuple[Limits, ...]
    found: tuple[Found, ...]

    @property
    def routes(self) -> Routes:
        return tuple(f.route for f in self.found)

    @property
    def cost(self) -> tuple[float, float]:
        """The slowest route's seconds, and all routes' together."""
        return max(f.seconds for f in self.found), sum(f.seconds for f in self.found)

    def key(self, groups: Sequence[int]) -> tuple:
        """Equal for branches that differ only in which route of a group has which limits."""
        return tuple(sorted((g, limits.key) for g, limits in zip(groups, self.limits, strict=True)))


class Conflicts:
    """Finds what is wrong with a branch, and how it could be resolved."""

    def __init__(self, finder: PathFinder, capacity: Capacity):
        self.finder, self.capacity = finder, capacity
        self._stage = finder.arrangement.stage_of

    def count(self, routes: Routes) -> int:
        """Visits that are too many, or too few; 0 where every hard rule is kept."""
        stages, nodes = self._visitors(routes)
        wrong = sum(max(0, len(v) - self.capacity.most, self.capacity.least - len(v)) for v in stages[1:])
        return wrong + sum(max(0, len(v) - self.finder.problem.memory[n]) for n, v in nodes.items())

    def _visitors(self, routes: Routes) -> tuple[list[list[int]], dict[int, list[int]]]:
        stages: list[list[int]] = [[] for _ in self.finder.arrangement.stages]
        nodes: dict[int, list[int]] = {}
        for r, route in enumerate(routes):
            for node in route[1:]:
                stages[self._stage[node]].append(r)
                nodes.setdefault(node, []).append(r)
        return stages, nodes

    def resolve(self, branch: Branch) -> list[Change]:
        """The changes of which one at least is needed to mend a broken rule; empty where none is broken."""
        stages, nodes = self._visitors(branch.routes)
        limits, most, least = branch.limits, self.capacity.most, self.capacity.least
        over = max(range(1, len(stages)), key=lambda k: len(stages[k]), default=0)
        if over and len(stages[over]) > most:
            changes = [(r, limits[r].without_stage(over)) for r in stages[over] if over not in limits[r].wanted]
            forced = len(stages[over]) - len(changes)
            return self._cheapest(branch, changes, most + 1 - forced)
        under = min(range(1, len(stages)), key=lambda k: len(stages[k]), default=0)
        if under and len(stages[under]) < least:
            others = [r for r in range(len(limits)) if r not in stages[under] and under not in limits[r].stages]
            changes = [(r, limits[r].with_stage(under)) for r in others]
            missing = least - len(stages[under])
            return self._cheapest(branch, changes, len(changes) - missing + 1)
        memory = self.finder.problem.memory
        full = max(nodes, key=lambda n: (len(nodes[n]) - memory[n], -n), default=None)
        if full is not None and len(nodes[full]) > memory[full]:
            changes = [(r, limits[r].without_node(full)) for r in nodes[full]]
            return self._cheapest(branch, changes, memory[full] + 1)
        return []

    def _cheapest(self, branch: Branch, changes: list[Change], count: int) -> list[Change]:
        """Of the changes, so many that one of them is needed whatever happens; those that cost least."""
        if count <= 0:
            return []  # too many routes cannot be changed: the branch is dead

        def extra(change: Change) -> tuple[float, int]:
            r, limits = change
            found = self.finder.find(branch.found[r].route[0], limits)
            return (found.seconds - branch.found[r].seconds if found else float("inf"), r)

        return sorted(changes, key=extra)[:count]


def search(finder: PathFinder, capacity: Capacity) -> Iterator[Branch | None]:
    """Sets of routes that keep every hard rule, each better than the one before by `Branch.cost`.

    Yields once for each branch that is looked at: None, or a better set. It ends when the last set is the best there is.

    Raises:
      ValueError: a route has no path at all.
    """
    conflicts = Conflicts(finder, capacity)
    found = [finder.find(start) for start in capacity.starts]
    if None in found:
        raise ValueError(
            f"no path of {finder.problem.rules.length} of {finder.problem.rules.stages} stages keeps the limits on swaps "
            f"and jumps from {finder.problem.network.nodes[capacity.starts[found.index(None)]].name!r}; allow longer jumps"
        )
    tie = itertools.count()
    root = Branch((Limits(),) * capacity.routes, tuple(found))
    first = (root.cost, conflicts.count(root.routes), next(tie), root)
    by_cost, by_conflicts = [first], [((first[1], first[0]), first[2], root)]
    looked: set[int] = set()
    known = {root.key(capacity.starts)}
    best = (float("inf"), float("inf"))
    for turn in itertools.count():
        while by_cost and (by_cost[0][2] in looked or by_cost[0][0] >= best):
            heapq.heappop(by_cost)
        while by_conflicts and (by_conflicts[0][1] in looked or by_conflicts[0][0][1] >= best):
            heapq.heappop(by_conflicts)
        if not by_cost:  # both hold the same branches
            return
        # Until there is a set, three times of four the branch with the fewest conflicts.
        soon = turn % 4 != 0 if best[0] == float("inf") else turn % 2 == 0
        if soon:
            (wrong, cost), number, branch = heapq.heappop(by_conflicts)
        else:
            cost, wrong, number, branch = heapq.heappop(by_cost)
        looked.add(number)
        if wrong == 0:
            best = cost
            yield branch
            continue
        yield None
        for child in _children(finder, branch, conflicts.resolve(branch), [0.0] * capacity.routes):
            key = child.key(capacity.starts)
            if key not in known and child.cost < best:
                known.add(key)
                number = next(tie)
                cost, wrong = child.cost, conflicts.count(child.routes)
                heapq.heappush(by_cost, (cost, wrong, number, child))
                heapq.heappush(by_conflicts, ((wrong, cost), number, child))


def avoid(
    finder: PathFinder, capacity: Capacity, start: Branch, score: Callable[[Routes], float]
) -> Iterator[Routes | None]:
    """Sets of routes with fewer collisions, from one that keeps every hard rule; best first by `score` (seconds).

    Routes of one start leave it one after the other. Yields once for each branch: None, or routes that keep the rules.
    """
    conflicts = Conflicts(finder, capacity)
    begins = [t * finder.problem.forward[s] for t, s in zip(capacity.turns, capacity.starts, strict=True)]
    timed = [finder.timed(f.route, limits, b) for f, limits, b in zip(start.found, start.limits, begins, strict=True)]
    tie = itertools.count()
    root = Branch(start.limits, tuple(timed))
    heap = [(score(root.routes), root.cost, next(tie), root)]
    known = {root.limits}
    while heap:
        branch = heapq.heappop(heap)[-1]
        changes = conflicts.resolve(branch)
        clean = not changes and conflicts.count(branch.routes) == 0
        yield branch.routes if clean else None
        if clean:
            changes = _collision(finder, branch)
        for child in _children(finder, branch, changes, begins):
            if child.limits not in known:
                known.add(child.limits)
                heapq.heappush(heap, (score(child.routes), child.cost, next(tie), child))


def _children(finder: PathFinder, branch: Branch, changes: list[Change], begins: Sequence[float]) -> Iterator[Branch]:
    for r, limits in changes:
        found = finder.find(branch.found[r].route[0], limits, begins[r])
        if found is not None:
            replaced = lambda values, value, r=r: (*values[:r], value, *values[r + 1 :])
            yield Branch(replaced(branch.limits, limits), replaced(branch.found, found))


def _collision(finder: PathFinder, branch: Branch) -> list[Change]:
    """The first two visits of different routes to a node that overlap, and for each route to wait for the other.

    Two backward passes are left out, as in the reference: which of them goes first frees the same memory.
    """
    length = finder.problem.rules.length
    visits: dict[int, list[tuple[float, float, int, bool]]] = {}
    for r, found in enumerate(branch.found):
        for step, (node, enter, leave) in enumerate(found.visits):
            visits.setdefault(node, []).append((enter, leave, r, step > length))
    first: tuple | None = None
    for node, taken in visits.items():
        taken.sort()
        for k, (enter, leave, r, back) in enumerate(taken):
            for other_enter, other_leave, other, other_back in taken[k + 1 :]:
                if other_enter >= leave:
                    break
                if other != r and not (back and other_back) and (first is None or other_enter < first[0]):
                    first = (other_enter, node, r, (enter, leave), other, (other_enter, other_leave))
    if first is None:
        return []
    _, node, a, visit_a, b, visit_b = first
    return [
        (b, branch.limits[b].with_window((node, *visit_a))),
        (a, branch.limits[a].with_window((node, *visit_b))),
    ]
