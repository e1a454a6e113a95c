"""What is planned: a model in stages on a network, the rules that a path keeps, and what follows from both.

A *route* is a path over nodes. A *wave* is one microbatch on every route; an iteration runs its microbatches in waves,
microbatch m on route m modulo the number of routes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxpar.parallel.planner.network import Network

Route = tuple[int, ...]
"""Node numbers, the start first. The microbatch then goes back to its start for the loss, and the whole way back."""


@dataclass(frozen=True)
class Workload:
    """What one microbatch costs at one stage, on a machine of speed 1.

    The defaults are those of SkipPipe's published schedule (`schedule.json` in its repository): 0.44 s, messages of
    8 samples of 1024 tokens of width 1024 in float32, stages of 4 layers.

    Attributes:
      forward: seconds of the forward pass.
      backward: seconds of the backward pass, in forward passes.
      loss: seconds of the head and the loss at the start node, in forward passes.
      activation_bytes: of the message between two stages.
      weight_bytes: of a stage's gradients, which its nodes exchange at the end.
    """

    forward: float = 0.44
    backward: float = 1.5
    loss: float = 0.25
    activation_bytes: float = 33_554_432.0
    weight_bytes: float = 268_468_224.0

    def __post_init__(self):
        for name in ("forward", "backward", "loss", "activation_bytes", "weight_bytes"):
            value = getattr(self, name)
            if not (0 <= value < math.inf) or (name == "forward" and value == 0):
                least = "above 0" if name == "forward" else "of at least 0"
                raise ValueError(f"{name} = {value}; give a number {least}")


@dataclass(frozen=True)
class Rules:
    """The hard constraints of a path over stages (SkipPipe's CC1-3; limits as in the reference's `a_star_modified`).

    A path visits `length` different stages, stage 0 first. Its *frontier* is the highest stage so far. A stage below the
    frontier is a *swap*, whose distance is frontier minus stage.

    Attributes:
      stages: of the model.
      length: stages that a path visits.
      swap_distance, swap_total, swap_count: the farthest swap, the sum of distances, and the number of swaps of a path.
      jump: how far past the frontier the next stage may lie.
    """

    stages: int
    length: int
    swap_distance: int = 1
    swap_total: int = 2
    swap_count: int = 2
    jump: int = 4

    def __post_init__(self):
        if self.stages < 1:
            raise ValueError(f"{self.stages} stages; give at least 1")
        if not 1 <= self.length <= self.stages:
            raise ValueError(f"paths of {self.length} of {self.stages} stages; give 1 to {self.stages}")
        for name in ("swap_distance", "swap_total", "swap_count"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)}; give at least 0")
        if self.jump < 1:
            raise ValueError(f"jump = {self.jump}; give at least 1, the next stage")
        if (self.length - 1) * self.jump < self.stages - 1:
            raise ValueError(
                f"paths of {self.length} stages that go at most {self.jump} stages ahead reach stage "
                f"{(self.length - 1) * self.jump}, so that stage {self.stages - 1} would never be trained; skip fewer"
            )

    @classmethod
    def skipping(cls, stages: int, skip: float, **limits: int) -> Rules:
        """Rules of paths that leave out a part of the stages: the nearest whole number, the lower one of two.

        Raises:
          ValueError: a ratio outside [0, 1), or one that leaves out every stage but the first.
        """
        if not 0 <= skip < 1:
            raise ValueError(f"skip = {skip}; give the part of the stages that a path leaves out, 0 or more, below 1")
        skipped = math.ceil(skip * stages - 0.5)
        if stages > 1 and skipped > stages - 2:
            raise ValueError(
                f"skip = {skip} leaves out {skipped} of {stages} stages, and a path needs its first and another; give at "
                f"most {(stages - 2) / stages:.3g}"
            )
        return cls(stages, stages - skipped, **limits)

    def allows(self, stages: Sequence[int]) -> bool:
        """Whether a path over stages keeps the rules."""
        if len(stages) != self.length or stages[0] != 0 or len(set(stages)) < len(stages):
            return False
        frontier = total = count = 0
        for stage in stages[1:]:
            if not 0 < stage < self.stages or stage - frontier > self.jump:
                return False
            if stage < frontier:
                distance = frontier - stage
                total, count = total + distance, count + 1
                if distance > self.swap_distance or total > self.swap_total or count > self.swap_count:
                    return False
            frontier = max(frontier, stage)
        return True


@dataclass(frozen=True)
class Problem:
    """A network, a workload, rules, and how many microbatches an iteration has.

    Raises:
      ValueError: fewer nodes than stages, or no microbatch.
    """

    network: Network
    workload: Workload
    rules: Rules
    microbatches: int

    def __post_init__(self):
        if self.network.size < self.rules.stages:
            raise ValueError(
                f"{self.network.name} has {self.network.size} nodes for {self.rules.stages} stages; a stage needs a node: "
                f"give at most {self.network.size} stages"
            )
        if isinstance(self.microbatches, bool) or not isinstance(self.microbatches, int) or self.microbatches < 1:
            raise ValueError(f"microbatches = {self.microbatches!r}; give a whole number of at least 1")

    @cached_property
    def forward(self) -> list[float]:
        """[N] seconds of a forward pass at each node."""
        return [self.workload.forward / node.speed for node in self.network.nodes]

    @cached_property
    def backward(self) -> list[float]:
        return [self.workload.backward * seconds for seconds in self.forward]

    @cached_property
    def loss(self) -> list[float]:
        return [self.workload.loss * seconds for seconds in self.forward]

    @cached_property
    def link(self) -> list[list[float]]:
        """[N][N] seconds of an activation, or of its gradient."""
        return self.network.seconds(self.workload.activation_bytes)

    @cached_property
    def memory(self) -> list[int]:
        return [node.memory for node in self.network.nodes]

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Nodes for each stage, in proportion to what it is visited: always for stage 0, (L-1)/(S-1) for the others.
        Each has one at least; what rounding leaves goes to the largest remainders, lower stages first."""
        stages, length = self.rules.stages, self.rules.length
        share = [1.0] + [(length - 1) / (stages - 1)] * (stages - 1) if stages > 1 else [1.0]
        spare = self.network.size - stages
        # Shares of all nodes, of which each stage has had one.
        ideal = [max(0.0, self.network.size * s / sum(share) - 1) for s in share]
        scale = spare / sum(ideal) if sum(ideal) else 0.0
        sizes = [1 + math.floor(i * scale + 1e-9) for i in ideal]
        order = sorted(range(stages), key=lambda k: (-(round(ideal[k] * scale + 1 - sizes[k], 9)), k))
        for k in order[: self.network.size - sum(sizes)]:
            sizes[k] += 1
        return tuple(sizes)


@dataclass(frozen=True)
class Arrangement:
    """Which nodes hold each stage: `stages[k]` are node numbers, ascending. Every node stands once."""

    stages: tuple[tuple[int, ...], ...]

    @cached_property
    def stage_of(self) -> dict[int, int]:
        return {node: k for k, nodes in enumerate(self.stages) for node in nodes}


@dataclass(frozen=True)
class Capacity:
    """How many routes fit on an arrangement, and what each stage and node takes of a wave.

    Attributes:
      routes: in a wave.
      waves: rounds of routes that hold all microbatches.
      starts: [routes] the start node of each: stage 0's nodes in turns, none beyond its memory.
      turns: [routes] how many routes of the same start go before it.
      least, most: routes that visit a stage other than the first, in a wave: uniform, so they differ by at most 1.
    """

    routes: int
    waves: int
    starts: tuple[int, ...]
    turns: tuple[int, ...]
    least: int
    most: int

    @classmethod
    def of(cls, problem: Problem, arrangement: Arrangement) -> Capacity:
        """The fewest waves that the nodes' memory allows."""
        memory = problem.memory
        stages, length = problem.rules.stages, problem.rules.length
        held = [sum(memory[n] for n in nodes) for nodes in arrangement.stages]
        for waves in range(1, problem.microbatches + 1):
            routes = math.ceil(problem.microbatches / waves)
            visits = routes * (length - 1)
            most = math.ceil(visits / (stages - 1)) if stages > 1 else 0
            if routes <= held[0] and (stages == 1 or most <= min(held[1:])):
                break  # one route in a wave always fits
        left = {n: memory[n] for n in arrangement.stages[0]}
        starts: list[int] = []
        turns: list[int] = []
        turn = 0
        while len(starts) < routes:
            for n in arrangement.stages[0]:
                if left[n] and len(starts) < routes:
                    left[n] -= 1
                    starts.append(n)
                    turns.append(turn)
            turn += 1
        return cls(routes, waves, tuple(starts), tuple(turns), visits // (stages - 1) if stages > 1 else 0, most)

    def check(self, problem: Problem) -> None:
        """Raises ValueError where routes, which are the same in every wave and iteration, must miss some stage."""
        rules = problem.rules
        visits, needed = self.routes * (rules.length - 1), rules.stages - 1
        if visits < needed:
            more = "give the nodes more memory" if self.routes < problem.microbatches else "have more microbatches"
            raise ValueError(
                f"{self.routes} path(s) of {rules.length} of {rules.stages} stages, {problem.microbatches} microbatch(es) in "
                f"{self.waves} wave(s), visit {visits} of the {needed} stages behind the first, and the others would never be "
                f"trained; {more}, or skip fewer stages"
            )
