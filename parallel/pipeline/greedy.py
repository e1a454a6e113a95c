"""Orders for any placement and any paths, by list scheduling: each device takes the best task that is ready.

Schedules with a closed form are written down in `orders.py`. This is for those without one: SkipPipe's partial paths,
where each microbatch visits other stages, and CheckFree+'s swapped order. Time is counted in ticks of one task; an
order that results holds no cycle, because it was executed once while it was made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxpar.parallel.pipeline.tasks import Kind, Order, Path, Placement, Task, check_paths, positive

F, B = Kind.F, Kind.B
OTHER = {F: B, B: F}

Policy = Literal["backward", "forward", "turns"]


def greedy(
    name: str,
    placement: Placement,
    paths: Sequence[Path],
    *,
    in_flight: int | None = None,
    policy: Policy = "backward",
) -> Order:
    """Every device takes, each tick, its first ready task: by kind, then by microbatch.

    Args:
      name: the order's name.
      placement: where virtual stages lie.
      paths: the virtual stages that each microbatch visits.
      in_flight: microbatches that may have started and not ended, in the whole pipeline; None for all. It bounds every
        device's activations, and cannot cause a deadlock, because it counts microbatches and not tasks: one that was
        let in is never stopped later.
      policy: which kind is first: "backward" as in 1F1B, "forward" as in GPipe, or "turns": all devices run forwards at
        one tick and backwards at the next, which is the order that ticks of one kind want.

    Raises:
      ValueError: a path that visits a missing stage, or one twice.
    """
    paths = check_paths(paths, placement.stages)
    window = len(paths) if in_flight is None else in_flight
    positive(in_flight=window)
    tasks: list[list[Task]] = [[] for _ in range(placement.devices)]
    forward = [0] * len(paths)  # how many forwards of a microbatch have ended
    backward = [0] * len(paths)
    done, turn = 0, F
    while done < len(paths):
        open_now = [m for m in range(len(paths)) if backward[m] < len(paths[m])]
        admitted = {m for m in open_now if forward[m] > 0}
        ready: list[list[Task]] = [[] for _ in range(placement.devices)]
        for m in open_now:
            path = paths[m]
            if forward[m] < len(path):
                stage, kind = path[forward[m]], F
            else:
                stage, kind = path[-1 - backward[m]], B
            if forward[m] > 0 or len(admitted) < window:
                admitted.add(m)
                ready[placement.device(stage)].append(Task(kind, stage, m))
        first = F if policy == "forward" else B
        if policy == "turns":
            if all(task.kind is not turn for candidates in ready for task in candidates):
                turn = OTHER[turn]
            ready = [[task for task in candidates if task.kind is turn] for candidates in ready]
            turn = OTHER[turn]
        for device, candidates in enumerate(ready):
            if not candidates:
                continue
            task = min(candidates, key=lambda t: (t.kind is not first, t.microbatch))
            tasks[device].append(task)
            count = forward if task.kind is F else backward
            count[task.microbatch] += 1
            done += backward[task.microbatch] == len(paths[task.microbatch])
    return Order(name, tuple(map(tuple, tasks)), placement, paths)
