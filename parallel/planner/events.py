"""An iteration as events: who waits for whom when microbatches take their paths through shared nodes.

A node runs one task at a time, and a message occupies neither of its ends (as in `pipeline/simulate.py`, which prices a
given order of tasks; here the order is what is found). A node takes, of what has arrived, backward passes and losses
first, since they free memory, then the earliest arrival.

Memory: a microbatch is let in when every node of its path has a place left, and takes them all at once; a node's place
is free again after its backward pass. Nobody who was let in waits for memory, so paths that cross cannot deadlock. (The
reference lets full nodes refuse what has arrived; it avoids deadlock only by its own choice of routes.)
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxpar.parallel.planner.problem import Problem, Route


@dataclass(frozen=True)
class Events:
    """What `dispatch` found.

    Attributes:
      seconds: until the last backward pass has ended.
      tasks: for each node (start, end, microbatch, step), in order. Steps 0..L-1 are the forward passes of a path of L
        nodes, L the loss at its start, L+1..2L the backward passes, last node first.
      waited: seconds that arrived tasks spent waiting for a busy node, summed.
      ends: seconds at which each microbatch has ended.
    """

    seconds: float
    tasks: tuple[tuple[tuple[float, float, int, int], ...], ...]
    waited: float
    ends: tuple[float, ...]


def dispatch(problem: Problem, paths: Sequence[Route]) -> Events:
    """Runs microbatch m along `paths[m]`, all of them offered at time 0, lower numbers first."""
    events = Simulator(problem).run(paths)
    assert events is not None  # without a limit there always is an end
    return events


class Simulator:
    """`dispatch` for many sets of paths on one problem, which can give up early."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self._steps: dict[Route, tuple[list[int], list[float], list[float]]] = {}

    def steps(self, route: Route) -> tuple[list[int], list[float], list[float]]:
        """Of each step of a route: its node, its work in seconds, and seconds from its arrival to the route's end where
        nothing is in the way."""
        if route not in self._steps:
            if len(self._steps) > 50_000:
                self._steps.clear()
            p, start = self.problem, route[0]
            nodes = [*route, start, *reversed(route)]
            work = [p.forward[n] for n in route] + [p.loss[start]] + [p.backward[n] for n in reversed(route)]
            rest = [0.0] * len(nodes)
            after = 0.0
            for k in reversed(range(len(nodes))):
                rest[k] = work[k] + after
                after = rest[k] + (p.link[nodes[k - 1]][nodes[k]] if k else 0.0)
            self._steps[route] = (nodes, work, rest)
        return self._steps[route]

    def run(self, paths: Sequence[Route], most: float = math.inf) -> Events | None:
        """The iteration, or None as soon as it is sure to take more than `most` seconds."""
        link = self.problem.link
        size = self.problem.network.size
        plans = [self.steps(path) for path in paths]
        last = [2 * len(path) for path in paths]
        free = list(self.problem.memory)
        ready: list[list[tuple[int, float, int, int]]] = [[] for _ in range(size)]
        idle = [True] * size
        tasks: list[list[tuple[float, float, int, int]]] = [[] for _ in range(size)]
        ends = [0.0] * len(paths)
        waiting: list[list[int]] = [[] for _ in range(size)]  # those outside, at each node of their paths
        outside = set(range(len(paths)))
        for m, path in enumerate(paths):
            for n in path:
                waiting[n].append(m)
        # (time, 0 for an arrival or 1 for a task's end, node, microbatch, step)
        events: list[tuple[float, int, int, int, int]] = []
        touched: set[int] = set()
        waited = now = 0.0

        def admit(candidates: Sequence[int]) -> None:
            for m in candidates:
                if m in outside and all(free[n] for n in paths[m]):
                    outside.discard(m)
                    for n in paths[m]:
                        free[n] -= 1
                    heapq.heappush(ready[paths[m][0]], (1, now, m, 0))
                    touched.add(paths[m][0])

        admit(range(len(paths)))
        while True:
            for node in sorted(touched):
                if not (idle[node] and ready[node]):
                    continue
                _, arrived, m, step = heapq.heappop(ready[node])
                _, work, rest = plans[m]
                if now + rest[step] > most:
                    return None
                end = now + work[step]
                waited += now - arrived
                idle[node] = False
                tasks[node].append((now, end, m, step))
                heapq.heappush(events, (end, 1, node, m, step))
            touched.clear()
            if not events:
                break
            now = events[0][0]
            while events and events[0][0] == now:
                _, ended, node, m, step = heapq.heappop(events)
                touched.add(node)
                half = last[m] >> 1
                if not ended:
                    heapq.heappush(ready[node], (int(step < half), now, m, step))
                    continue
                idle[node] = True
                if step > half:
                    free[node] += 1
                    if outside:
                        waiting[node] = [k for k in waiting[node] if k in outside]
                        admit(waiting[node])
                if step == last[m]:
                    ends[m] = now
                    continue
                to = plans[m][0][step + 1]
                heapq.heappush(events, (now + link[node][to], 0, to, m, step + 1))
        return Events(max(ends), tuple(map(tuple, tasks)), waited, tuple(ends))
