"""What a pipeline runs: tasks, the virtual stages and where they lie, and an order of tasks for each device.

A *virtual stage* is a piece of the model; a *chunk* is its place among the virtual stages of one device. A microbatch
visits virtual stages along its *path*: all of them in order, or fewer (SkipPipe), or in another order (CheckFree+).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property


class Kind(IntEnum):
    """What an action does. The numbers stand in tables."""

    IDLE = 0
    F = 1
    """Forward."""
    B = 2
    """Backward: gradients of the input and of the weights."""
    BI = 3
    """Backward, the input's gradient only; what the weights' gradient needs is kept for BW."""
    BW = 4
    """Backward, the weights' gradient only. Nothing waits for it but the end of the step."""

    def __str__(self) -> str:
        return {Kind.IDLE: ".", Kind.F: "F", Kind.B: "B", Kind.BI: "Bi", Kind.BW: "Bw"}[self]


KINDS = (Kind.F, Kind.B, Kind.BI, Kind.BW)


@dataclass(frozen=True, order=True)
class Task:
    """One kind of work on one microbatch at one virtual stage. Its device and chunk follow from the placement."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind} of microbatch {self.microbatch} at stage {self.stage}"


@dataclass(frozen=True)
class Placement:
    """Where virtual stages lie: `grid[device][chunk]` is a virtual stage. Each stage 0..n-1 stands once."""

    grid: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        chunks = {len(row) for row in self.grid}
        if len(chunks) != 1 or 0 in chunks:
            counts = ", ".join(str(len(row)) for row in self.grid)
            raise ValueError(
                f"devices hold {counts or 'no'} stages; give every device the same number of chunks, at least 1"
            )
        stages = sorted(stage for row in self.grid for stage in row)
        if stages != list(range(len(stages))):
            raise ValueError(
                f"stages {stages} are placed; each of 0 to {len(stages) - 1} ({self.devices} devices × {self.chunks} "
                "chunks) must stand exactly once"
            )

    @property
    def devices(self) -> int:
        return len(self.grid)

    @property
    def chunks(self) -> int:
        return len(self.grid[0])

    @property
    def stages(self) -> int:
        return self.devices * self.chunks

    @cached_property
    def _where(self) -> dict[int, tuple[int, int]]:
        return {stage: (d, c) for d, row in enumerate(self.grid) for c, stage in enumerate(row)}

    def device(self, stage: int) -> int:
        return self._where[stage][0]

    def chunk(self, stage: int) -> int:
        return self._where[stage][1]

    @classmethod
    def round_robin(cls, devices: int, chunks: int = 1) -> Placement:
        """Chunk c of device d is stage c·devices + d (Narayanan et al. 2021, "Efficient Large-Scale Language Model
        Training on GPU Clusters", section 2.2): a message goes to the next device around a ring."""
        positive(devices=devices, chunks=chunks)
        return cls(tuple(tuple(c * devices + d for c in range(chunks)) for d in range(devices)))

    @classmethod
    def v_shaped(cls, devices: int) -> Placement:
        """Device d holds stages d and 2·devices - 1 - d (Qi et al. 2024, "Pipeline Parallelism with Controllable
        Memory", section 3): the first and the last stage lie on device 0, and stages meet on the last device."""
        positive(devices=devices)
        return cls(tuple((d, 2 * devices - 1 - d) for d in range(devices)))


Path = tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """A schedule: which tasks each device runs, one after another.

    Attributes:
      name: how messages and pictures call it.
      tasks: `tasks[device]`, in the order of execution.
      placement: where the virtual stages lie.
      paths: `paths[microbatch]`, the virtual stages that it visits, first to last.
    """

    name: str
    tasks: tuple[tuple[Task, ...], ...]
    placement: Placement
    paths: tuple[Path, ...]

    @property
    def devices(self) -> int:
        return self.placement.devices

    @property
    def chunks(self) -> int:
        return self.placement.chunks

    @property
    def microbatches(self) -> int:
        return len(self.paths)

    @cached_property
    def _position(self) -> dict[tuple[int, int], int]:
        return {(s, m): k for m, path in enumerate(self.paths) for k, s in enumerate(path)}

    @cached_property
    def _backward(self) -> dict[tuple[int, int], Kind]:
        tasks = (task for row in self.tasks for task in row)
        return {(t.stage, t.microbatch): t.kind for t in tasks if t.kind in (Kind.B, Kind.BI)}

    def device(self, task: Task) -> int:
        return self.placement.device(task.stage)

    def is_first(self, task: Task) -> bool:
        return self._position[task.stage, task.microbatch] == 0

    def is_last(self, task: Task) -> bool:
        return self._position[task.stage, task.microbatch] == len(self.paths[task.microbatch]) - 1

    def neighbour(self, task: Task, distance: int) -> int | None:
        """The stage that lies `distance` further along the task's path, or None beyond its ends."""
        at = self._position[task.stage, task.microbatch] + distance
        path = self.paths[task.microbatch]
        return path[at] if 0 <= at < len(path) else None

    def backward(self, stage: int, microbatch: int) -> Task:
        """The task that sends the input's gradient on: B, or BI where the schedule splits it."""
        return Task(self._backward.get((stage, microbatch), Kind.B), stage, microbatch)

    def dependencies(self, task: Task) -> tuple[Task, ...]:
        """What must have ended, on whichever device, before the task can start."""
        if task.kind is Kind.F:
            before = self.neighbour(task, -1)
            return () if before is None else (Task(Kind.F, before, task.microbatch),)
        if task.kind is Kind.BW:
            return (Task(Kind.BI, task.stage, task.microbatch),)
        forward, after = Task(Kind.F, task.stage, task.microbatch), self.neighbour(task, +1)
        return (forward,) if after is None else (forward, self.backward(after, task.microbatch))

    def consumer(self, task: Task) -> Task | None:
        """The task that the task's result is sent to: an activation to the next F, a gradient to the previous B."""
        if task.kind is Kind.BW:
            return None
        stage = self.neighbour(task, +1 if task.kind is Kind.F else -1)
        if stage is None:
            return None
        if task.kind is Kind.F:
            return Task(Kind.F, stage, task.microbatch)
        return self.backward(stage, task.microbatch)


def straight(stages: int, microbatches: int) -> tuple[Path, ...]:
    """Every microbatch visits every stage in order."""
    return (tuple(range(stages)),) * microbatches


def check_paths(paths: Sequence[Iterable[int]], stages: int) -> tuple[Path, ...]:
    """The paths as tuples. Raises ValueError for a stage that does not exist, or is visited twice."""
    if not paths:
        raise ValueError("there is no microbatch; give at least 1 path")
    paths = tuple(tuple(path) for path in paths)
    for m, path in enumerate(paths):
        if not path:
            raise ValueError(f"the path of microbatch {m} is empty; it must visit at least 1 of {stages} stages")
        if missing := [s for s in path if not 0 <= s < stages]:
            raise ValueError(f"microbatch {m} visits stage {missing[0]}; stages are 0 to {stages - 1}")
        if len(set(path)) < len(path):
            twice = next(s for k, s in enumerate(path) if s in path[:k])
            raise ValueError(f"microbatch {m} visits stage {twice} twice (path {path}); once is the most")
    return paths


def positive(**numbers: int) -> None:
    """Raises ValueError unless each is a whole number of at least 1."""
    for name, n in numbers.items():
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"{name} = {n!r}; give a whole number of at least 1")
