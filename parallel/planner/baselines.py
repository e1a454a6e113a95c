"""What SkipPipe is compared with: DT-FM's pipelines, whole and with stages left out."""

from __future__ import annotations

from jaxpar.parallel.planner.arrangement import chains
from jaxpar.parallel.planner.problem import Arrangement, Capacity, Problem, Route, Rules


def dtfm(problem: Problem, arrangement: Arrangement) -> tuple[tuple[Route, ...], int]:
    """Whole pipelines that the microbatches take in turns (Yuan et al. 2022).

    Returns:
      The path of each microbatch, and how many microbatches are a wave: as many as every pipeline's memory holds.
    """
    pipelines = chains(problem, arrangement)
    held = min(problem.memory[n] for route in pipelines for n in route)
    paths = tuple(pipelines[m % len(pipelines)] for m in range(problem.microbatches))
    return paths, min(len(pipelines) * held, problem.microbatches)


def dtfm_skip(problem: Problem, arrangement: Arrangement, capacity: Capacity) -> tuple[Route, ...]:
    """Skipping without routing: the stages that a route leaves out go round, and it keeps to the nodes of a pipeline.

    Loads are as uniform as SkipPipe's and the memory of nodes is kept, but no link's speed is looked at: the reference
    calls this DT-FM skip, and lets A* choose over links that all cost the same. Each route takes the pipeline whose
    nodes have had the fewest visits, and where one of these is full, the node of the stage that has most room.
    """
    rules, stages = problem.rules, arrangement.stages
    pipelines = [dict(enumerate(route)) for route in chains(problem, arrangement)]
    load = [0] * problem.network.size
    order, routes = leaving_order(rules), []
    for r, start in enumerate(capacity.starts):
        visited = _evenly(rules.length, order, r)
        cost = lambda pipe, visited=visited: (
            sum(load[pipe[k]] >= problem.memory[pipe[k]] for k in visited),
            sum(load[pipe[k]] for k in visited),
        )
        pipe = min(pipelines, key=cost)
        route = [start]
        for k in visited:
            room = lambda n: (load[n] - problem.memory[n], n)
            node = pipe[k] if load[pipe[k]] < problem.memory[pipe[k]] else min(stages[k], key=room)
            load[node] += 1
            route.append(node)
        routes.append(tuple(route))
    return tuple(routes)


def leaving_order(rules: Rules) -> tuple[int, ...]:
    """The stages but the first, in the order in which routes leave them out: as many from there on as a path skips.

    Ascending, so that neighbours are left out together, unless paths would then jump too far; else every second, every third,
    and so on. Any order loads stages evenly.
    """
    stages = range(1, rules.stages)
    for step in stages:
        order = tuple(sorted(stages, key=lambda k, step=step: (k % step, k)))
        if all(rules.allows([0, *_evenly(rules.length, order, r)]) for r in range(rules.stages - 1)):
            return order
    return tuple(stages)


def _evenly(length: int, order: tuple[int, ...], route: int) -> list[int]:
    """The stages but the first that a route visits: those left out follow on those that the route before left out."""
    others, skipped = len(order), len(order) + 1 - length
    out = {order[(route * skipped + k) % others] for k in range(skipped)}
    return [k for k in sorted(order) if k not in out]
