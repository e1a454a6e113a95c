"""A plan: where stages lie and which nodes each microbatch visits, as orders for the pipeline's simulator and executor."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from jaxpar.parallel.pipeline.orders import WarmUp, skippipe
from jaxpar.parallel.pipeline.simulate import Costs, Simulation, simulate
from jaxpar.parallel.pipeline.tasks import Kind, Order, Placement, Task
from jaxpar.parallel.planner.arrangement import Objective
from jaxpar.parallel.planner.events import Events, dispatch
from jaxpar.parallel.planner.problem import Arrangement, Problem, Route


@dataclass(frozen=True)
class Plan:
    """Paths on an arrangement.

    Attributes:
      name: of the method that made it.
      problem: network, workload and rules.
      arrangement: the nodes of each stage.
      paths: of each microbatch, over nodes.
      wave: microbatches of a wave: of so many that follow each other, loads are uniform and fit the nodes' memory.
    """

    name: str
    problem: Problem
    arrangement: Arrangement
    paths: tuple[Route, ...]
    wave: int

    @cached_property
    def stage_paths(self) -> tuple[tuple[int, ...], ...]:
        """The stages that each microbatch visits."""
        return tuple(tuple(self.arrangement.stage_of[n] for n in path) for path in self.paths)

    @cached_property
    def events(self) -> Events:
        return dispatch(self.problem, self.paths)

    @cached_property
    def seconds(self) -> float:
        """Iteration time by the event simulator, without the exchange of gradients at its end."""
        return self.events.seconds

    @cached_property
    def exchange(self) -> float:
        """Seconds of the exchange of gradients among each stage's nodes; the same for all plans on one arrangement."""
        return Objective(self.problem).exchange(self.arrangement.stages)

    @cached_property
    def held(self) -> tuple[int, ...]:
        """[N] the most microbatches that each node holds at a time, from their forward to their backward pass."""
        return tuple(round(b) for b in self.simulation.bytes)

    @cached_property
    def simulation(self) -> Simulation:
        """The order of tasks of `events`, run by each node as early as it can: never later than `seconds`."""
        return simulate(node_order(self), node_costs(self.problem))


def node_order(plan: Plan) -> Order:
    """The plan as an order for one device a node.

    Device n holds two virtual stages: n, its stage's passes, and N + n, the loss of microbatches that start there. What
    no microbatch visits runs nothing.
    """
    size = plan.problem.network.size
    rows: list[tuple[Task, ...]] = []
    for node, tasks in enumerate(plan.events.tasks):
        row: list[Task] = []
        for _, _, m, step in tasks:
            length = len(plan.paths[m])
            if step == length:  # the loss, whose backward pass is a part of it
                row += [Task(Kind.F, size + node, m), Task(Kind.B, size + node, m)]
            else:
                row.append(Task(Kind.F if step < length else Kind.B, node, m))
        rows.append(tuple(row))
    placement = Placement(tuple((n, size + n) for n in range(size)))
    return Order(plan.name, tuple(rows), placement, tuple((*path, size + path[0]) for path in plan.paths))


def node_costs(problem: Problem) -> Costs:
    """The seconds of `node_order`, with each link's own; memory is counted in microbatches."""
    size = problem.network.size
    return Costs(
        forward=(*problem.forward, *problem.loss),
        backward=(*problem.backward, *[0.0] * size),
        links=tuple(map(tuple, problem.link)),
        activation=(*[1.0] * size, *[0.0] * size),
        weight=0.0,
    )


def executor_order(plan: Plan, warm_up: WarmUp = "least") -> Order:
    """The plan for the pipeline's executor: one device a stage, microbatches along their own stages.

    The nodes of a stage are replicas: which of them runs a microbatch matters to a network, not to the result. Tasks are
    in the order of list scheduling (`orders.skippipe`), because the executor runs in lock step, where links are alike.
    """
    return skippipe(plan.problem.rules.stages, plan.stage_paths, warm_up)


def lower_bound(plan: Plan) -> float:
    """No schedule of these paths is faster: the slowest path alone, and the busiest node's work."""
    problem = plan.problem
    busy = [0.0] * problem.network.size
    longest = 0.0
    for path in plan.paths:
        hops = zip(path, (*path[1:], path[0]), strict=True)
        work = sum(problem.forward[n] + problem.backward[n] for n in path) + problem.loss[path[0]]
        longest = max(longest, work + sum(problem.link[a][b] + problem.link[b][a] for a, b in hops))
        busy[path[0]] += problem.loss[path[0]]
        for n in path:
            busy[n] += problem.forward[n] + problem.backward[n]
    return max(longest, *busy, -math.inf)
