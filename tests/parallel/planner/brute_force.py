"""The planner's parts again, slowly and in another way, for tiny networks: what the package's are compared with."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from jaxpar.parallel.planner.network import Network, Node
from jaxpar.parallel.planner.problem import Problem, Rules, Workload

Path = tuple[int, ...]


def network(size: int, seed: int, memory: tuple[int, int] = (3, 3), slow: float = 1.0) -> Network:
    """Unlike machines and links, no two alike, so that no two events fall together."""
    draw = random.Random(seed)
    nodes = tuple(Node(f"n{i}", speed=draw.uniform(0.5, 2), memory=draw.randint(*memory)) for i in range(size))
    matrix = lambda low, high: tuple(tuple(draw.uniform(low, high) for _ in range(size)) for _ in range(size))
    return Network(f"random{size}", nodes, matrix(0.01 * slow, slow), matrix(2e7 / slow, 5e8 / slow))


def problem(size: int, stages: int, length: int, microbatches: int, seed: int, **more) -> Problem:
    return Problem(network(size, seed, **more), Workload(), Rules(stages, length), microbatches)


def keeps_the_rules(stages: Sequence[int], rules: Rules) -> bool:
    """A path over stages, by the words of `Rules`."""
    highest = [max(stages[: k + 1]) for k in range(len(stages))]
    swaps = [highest[k] - s for k, s in enumerate(stages) if s < highest[k]]
    jumps = [s - highest[k] for k, s in enumerate(stages[1:])]
    return (
        len(stages) == len(set(stages)) == rules.length
        and stages[0] == 0
        and set(stages) <= set(range(rules.stages))
        and max(swaps, default=0) <= rules.swap_distance
        and sum(swaps) <= rules.swap_total
        and len(swaps) <= rules.swap_count
        and max(jumps, default=0) <= rules.jump
    )


def stage_paths(rules: Rules) -> list[Path]:
    """All of them, by trying every order of every choice of stages."""
    return [p for p in itertools.permutations(range(rules.stages), rules.length) if keeps_the_rules(p, rules)]


def arrangements(nodes: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[Path, ...]]:
    """Every way to give nodes to stages of these sizes."""
    if not sizes:
        yield ()
        return
    for first in itertools.combinations(nodes, sizes[0]):
        for rest in arrangements([n for n in nodes if n not in first], sizes[1:]):
            yield (first, *rest)


def alone(problem: Problem, route: Path) -> float:
    """Seconds of a microbatch on an empty network: all work, and every link there and back."""
    pairs = zip(route, [*route[1:], route[0]], strict=True)
    links = sum(problem.link[a][b] + problem.link[b][a] for a, b in pairs)
    return links + sum(problem.forward[n] + problem.backward[n] for n in route) + problem.loss[route[0]]


def sets_of_routes(problem: Problem, stages: Sequence[Path], starts: Sequence[int]) -> Iterator[tuple[Path, ...]]:
    """Every set of routes from these starts that keeps every hard rule in a wave."""
    over_nodes = [
        nodes for path in stage_paths(problem.rules) for nodes in itertools.product(*(stages[s] for s in path[1:]))
    ]
    where = {n: s for s, nodes in enumerate(stages) for n in nodes}
    others = problem.rules.stages - 1
    visits = len(starts) * (problem.rules.length - 1)
    allowed = {visits // others, -(-visits // others)} if others else {0}
    for tails in itertools.product(over_nodes, repeat=len(starts)):
        routes = tuple((start, *tail) for start, tail in zip(starts, tails, strict=True))
        flat = [n for route in routes for n in route]
        if any(flat.count(n) > problem.network.nodes[n].memory for n in set(flat)):
            continue
        loads = [sum(where[n] == s for n in flat) for s in range(1, others + 1)]
        if all(load in allowed for load in loads) and 0 not in loads:
            yield routes


def simulated(problem: Problem, paths: Sequence[Path]) -> tuple[float, list[tuple[int, int, int, float, float]]]:
    """An iteration, from one moment at which something happens to the next, everything looked at in each.

    Returns:
      Its seconds, and all passes: (node, microbatch, step, start, end).
    """
    size = len(problem.network.nodes)
    places = [node.memory for node in problem.network.nodes]
    nodes = [[*p, p[0], *reversed(p)] for p in paths]
    step = [-1] * len(paths)  # not let in
    ready = [0.0] * len(paths)  # when the microbatch is at the node of its step
    running: list[tuple[float, int] | None] = [None] * size
    now, passes = 0.0, []
    while True:
        for node in range(size):
            if running[node] is not None and running[node][0] == now:
                m = running[node][1]
                running[node] = None
                if step[m] > len(paths[m]):
                    places[node] += 1
                step[m] += 1
                if step[m] < len(nodes[m]):
                    ready[m] = now + problem.link[node][nodes[m][step[m]]] * (node != nodes[m][step[m]])
        for m, path in enumerate(paths):
            if step[m] < 0 and min(places[n] for n in path) > 0:
                step[m], ready[m] = 0, now
                for n in path:
                    places[n] -= 1
        busy = {m for r in running if r is not None for _, m in [r]}
        for node in range(size):
            here = [
                (step[m] < len(paths[m]), ready[m], m)
                for m in range(len(paths))
                if 0 <= step[m] < len(nodes[m]) and nodes[m][step[m]] == node and ready[m] <= now and m not in busy
            ]
            if running[node] is None and here:
                m = min(here)[2]
                k, length = step[m], len(paths[m])
                work = (problem.forward if k < length else problem.loss if k == length else problem.backward)[node]
                running[node] = (now + work, m)
                passes.append((node, m, k, now, now + work))
        arrivals = [ready[m] for m in range(len(paths)) if 0 <= step[m] < len(nodes[m])]
        ahead = [t for t in [*arrivals, *(r[0] for r in running if r is not None)] if t > now]
        if not ahead:
            return now, passes
        now = min(ahead)
