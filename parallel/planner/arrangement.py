"""Which node holds which stage: simulated annealing over DT-FM's objective.

DT-FM (Yuan et al. 2022, "Decentralized Training of Foundation Models in Heterogeneous Environments", sections 3.1 to 3.3)
splits the cost in the exchange of gradients among the nodes of a stage, and pipelines between stages: consecutive stages
are paired node by node, and what counts is the worst pair. The reference searches with a genetic algorithm (GCMA) over
unordered groups, and orders them as a travelling salesman. Here the order of the stages is a part of the state, so the
objective is evaluated exactly with no tour to find, and each move changes few of its terms.

Where we differ: the tour is closed, because SkipPipe's loss is computed where the microbatch started; computing counts,
by the slowest node of each stage; and the pipeline's part counts once for each wave of microbatches that memory allows.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from jaxpar.parallel.planner.matching import bottleneck
from jaxpar.parallel.planner.problem import Arrangement, Capacity, Problem, Route

STEPS = 6000
"""Moves that are tried. On 20 nodes and 6 stages more have not helped."""

Stages = Sequence[tuple[int, ...]]


class Objective:
    """Seconds of an iteration, estimated from an arrangement alone. Terms are kept: a move changes few of them."""

    def __init__(self, problem: Problem):
        self.problem = problem
        link = problem.link
        self._pair = lambda a, b: link[a][b] + link[b][a]
        self._joint: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        self._exchange: dict[tuple[int, ...], float] = {}
        self._waves: dict[tuple[int, ...], int] = {}
        self._busy = [f + b for f, b in zip(problem.forward, problem.backward, strict=True)]
        self._size = problem.network.size
        self._small = problem.network.seconds(0.0)
        self._bytes = [
            [1.0 / bandwidth if i != j else 0.0 for j, bandwidth in enumerate(row)]
            for i, row in enumerate(problem.network.bandwidth)
        ]

    def __call__(self, stages: Stages) -> float:
        """Seconds; each stage's nodes must be in ascending order."""
        count = len(stages)
        pipeline = sum(self._join(stages[k], stages[(k + 1) % count]) for k in range(count)) if count > 1 else 0.0
        pipeline += sum(max(self._busy[n] for n in nodes) for nodes in stages)
        return self.exchange(stages) + self._rounds(stages) * pipeline

    def exchange(self, stages: Stages) -> float:
        """Seconds until every stage's nodes have the sum of their gradients.

        Each of a stage's n nodes sums 1/n of the gradient: it sends n-1 parts, receives n-1, sends its sum n-1 times.
        The slowest node of the slowest stage counts (DT-FM, equation 1).
        """
        return max(self._share(nodes) for nodes in stages)

    def _share(self, nodes: tuple[int, ...]) -> float:
        if nodes not in self._exchange:
            part = self.problem.workload.weight_bytes / len(nodes)
            way = lambda a, b: self._small[a][b] + part * self._bytes[a][b]
            self._exchange[nodes] = max(sum(way(a, b) + way(b, a) for b in nodes if b != a) for a in nodes)
        return self._exchange[nodes]

    def _join(self, left: tuple[int, ...], right: tuple[int, ...]) -> float:
        key = (left, right) if left < right else (right, left)
        if key not in self._joint:
            self._joint[key] = bottleneck(*key, self._pair)[0]
        return self._joint[key]

    def _rounds(self, stages: Stages) -> int:
        held = tuple(sum(self.problem.memory[n] for n in nodes) for nodes in stages)
        if held not in self._waves:
            self._waves[held] = Capacity.of(self.problem, Arrangement(tuple(stages))).waves
        return self._waves[held]


def arrange(
    problem: Problem, *, seed: int = 0, steps: int = STEPS, tell: Callable[[int, float], None] | None = None
) -> Arrangement:
    """The best arrangement that annealing finds; the same for the same seed and steps.

    Args:
      problem: what is planned; `problem.sizes` are the stages' nodes.
      seed: of the random moves.
      steps: moves that are tried.
      tell: called now and then with the moves tried and the best seconds so far.
    """
    draw = random.Random(seed)
    score = Objective(problem)
    nodes = list(range(problem.network.size))
    draw.shuffle(nodes)
    now, at = [], 0
    for size in problem.sizes:
        now.append(tuple(sorted(nodes[at : at + size])))
        at += size
    cost = score(now)
    best, least = list(now), cost
    hot, cold = 0.05 * cost, 5e-4 * cost
    for step in range(steps if len(now) > 1 else 0):
        if tell is not None and step % 200 == 0:
            tell(step, least)
        candidate = _move(now, draw)
        new = score(candidate)
        heat = hot * (cold / hot) ** (step / steps)
        if new <= cost or draw.random() < math.exp((cost - new) / heat):
            now, cost = candidate, new
            if cost < least:
                best, least = list(now), cost
    return Arrangement(tuple(best))


def _move(stages: list[tuple[int, ...]], draw: random.Random) -> list[tuple[int, ...]]:
    """Two nodes of two stages change places, three nodes go round, or two stages of one size do."""
    stages = list(stages)
    kind = draw.random()
    if kind < 0.2:
        a, b = draw.sample(range(len(stages)), 2)
        if len(stages[a]) == len(stages[b]):
            stages[a], stages[b] = stages[b], stages[a]
            return stages
    chosen = draw.sample(range(len(stages)), 3 if kind > 0.85 and len(stages) > 2 else 2)
    moved = [draw.choice(stages[k]) for k in chosen]
    for k, out, into in zip(chosen, moved, moved[1:] + moved[:1], strict=True):
        stages[k] = tuple(sorted([n for n in stages[k] if n != out] + [into]))
    return stages


def chains(problem: Problem, arrangement: Arrangement) -> tuple[Route, ...]:
    """DT-FM's pipelines: as many as the smallest stage has nodes, one node of every stage each.

    From the first of the smallest stages the pairing goes on both ways, each time with the worst link as fast as it can
    be. Nodes that are left over in larger stages run nothing.
    """
    stages, link = arrangement.stages, problem.link
    pair = lambda a, b: link[a][b] + link[b][a]
    middle = min(range(len(stages)), key=lambda k: (len(stages[k]), k))
    routes = [[n] for n in stages[middle]]
    for k in range(middle + 1, len(stages)):
        pairs = bottleneck([r[-1] for r in routes], stages[k], pair)[1]
        routes = [[*r, pairs[r[-1]]] for r in routes]
    for k in reversed(range(middle)):
        pairs = bottleneck([r[0] for r in routes], stages[k], pair)[1]
        routes = [[pairs[r[0]], *r] for r in routes]
    return tuple(map(tuple, routes))
