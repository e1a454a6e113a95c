"""Schedules built again, slowly and in another way, for small sizes: what the package's tables are compared with."""

from __future__ import annotations

from functools import cache
from itertools import count, pairwise

from jaxpar.parallel.pipeline.tasks import Kind, Order, Task


def earliest_ticks(order: Order) -> dict[Task, int]:
    """The first tick of each task: one more than the longest chain of tasks it has to wait for, by recursion."""
    before = {b: a for row in order.tasks for a, b in pairwise(row)}

    def must_end(task: Task) -> list[Task]:
        path = order.paths[task.microbatch]
        k = path.index(task.stage)
        found = [before[task]] if task in before else []
        if task.kind is Kind.F:
            found += [Task(Kind.F, path[k - 1], task.microbatch)] if k else []
        elif task.kind is Kind.BW:
            found += [Task(Kind.BI, task.stage, task.microbatch)]
        else:
            found += [Task(Kind.F, task.stage, task.microbatch)]
            if k + 1 < len(path):
                both = [Task(kind, path[k + 1], task.microbatch) for kind in (Kind.B, Kind.BI)]
                found += [t for t in both if any(t in row for row in order.tasks)]
        return found

    @cache
    def tick(task: Task) -> int:
        return max([tick(t) + 1 for t in must_end(task)], default=0)

    return {task: tick(task) for row in order.tasks for task in row}


def most_alive(order: Order, ticks: dict[Task, int], buffer: str, keep: str) -> int:
    """The most values of a buffer that are wanted at one tick on one device, counted tick by tick."""
    worst = 0
    for device in range(order.devices):
        for t in range(max(ticks.values()) + 2):
            alive = 0
            for m, path in enumerate(order.paths):
                for k, stage in enumerate(path):
                    if order.placement.device(stage) != device:
                        continue
                    forward = ticks[Task(Kind.F, stage, m)]
                    backward = ticks.get(Task(Kind.B, stage, m), ticks.get(Task(Kind.BI, stage, m)))
                    if buffer == "input" and k > 0:
                        arrives = ticks[Task(Kind.F, path[k - 1], m)] + 1
                        alive += arrives <= t <= (forward if keep == "residuals" else backward)
                    elif buffer == "residual" and keep == "residuals":
                        alive += forward <= t <= backward
                    elif buffer == "gradient":
                        if k + 1 < len(path):
                            after = path[k + 1]
                            sent = ticks.get(Task(Kind.B, after, m), ticks.get(Task(Kind.BI, after, m)))
                            alive += sent + 1 <= t <= backward
                        else:
                            alive += forward <= t <= backward
                    elif buffer == "weight" and Task(Kind.BW, stage, m) in ticks:
                        alive += ticks[Task(Kind.BI, stage, m)] <= t <= ticks[Task(Kind.BW, stage, m)]
            worst = max(worst, alive)
    return worst


def shortest(devices: int, microbatches: int, backward: int, in_flight: list[int] | None = None) -> int:
    """The fewest ticks in which any order at all can run, with F of 1 tick and B of `backward` ticks, by search.

    All states that can be reached are enumerated tick by tick, also those where a device waits though it could work.
    `in_flight[device]` bounds the microbatches between F and B. Within a device microbatches go in order, which loses
    nothing where they are all alike.
    """
    bound = in_flight or [microbatches] * devices
    # A device: forwards ended, backwards ended, (kind, ticks left) of what it runs.
    states = {tuple((0, 0, "", 0) for _ in range(devices))}
    for tick in count():
        if any(all(d[1] == microbatches for d in s) for s in states):
            return tick
        following = set()
        for state in states:
            partial = [()]
            for s, (f, b, kind, left) in enumerate(state):
                options = []
                if left:
                    options.append((f, b, kind, left))
                else:
                    options.append((f, b, "", 0))
                    if f < microbatches and f - b < bound[s] and (s == 0 or state[s - 1][0] > f):
                        options.append((f, b, "F", 1))
                    if b < f and (s == devices - 1 or state[s + 1][1] > b):
                        options.append((f, b, "B", backward))
                partial = [(*p, o) for p in partial for o in options]
            for started in partial:
                ended = []
                for f, b, kind, left in started:
                    left = max(left - 1, 0)
                    if kind and not left:
                        f, b, kind = f + (kind == "F"), b + (kind == "B"), ""
                    ended.append((f, b, kind, left))
                following.add(tuple(ended))
        states = following
    raise AssertionError
