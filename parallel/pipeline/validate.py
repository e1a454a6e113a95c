"""Whether an order can run, and whether a table does what its order says. Each error is one sentence with the numbers.

`validate_table` does not trust the compiler: it executes the table with the names of values in place of values, so a
slot that is used again too early, or a message into a wrong slot, shows as an action that reads the wrong value.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from jaxpar.parallel.pipeline.tasks import Kind, Order, Task, check_paths

if TYPE_CHECKING:
    from jaxpar.parallel.pipeline.table import Table


def validate_order(order: Order) -> None:
    """Raises ValueError unless every task stands once, on its device, and the order can run to its end."""
    check_paths(order.paths, order.placement.stages)
    if len(order.tasks) != order.devices:
        raise ValueError(f"{order.name} has tasks for {len(order.tasks)} devices, and stages on {order.devices}")
    _each_once(order)
    cycle = find_cycle(order)
    if cycle:
        steps = ", ".join(f"{task} (device {order.device(task)})" for task in cycle[:6])
        more = f", and {len(cycle) - 6} more" if len(cycle) > 6 else ""
        raise ValueError(
            f"{order.name} cannot run, because tasks wait for each other in a circle: {steps}{more}, which the first "
            "waits for; move one of them ahead on its device"
        )


def _each_once(order: Order) -> None:
    seen: set[Task] = set()
    visits = {(s, m) for m, path in enumerate(order.paths) for s in path}
    for device, row in enumerate(order.tasks):
        for task in row:
            if not (0 <= task.microbatch < order.microbatches and (task.stage, task.microbatch) in visits):
                raise ValueError(f"{order.name} has {task} on device {device}, which is on no microbatch's path")
            home = order.device(task)
            if home != device:
                raise ValueError(f"{order.name} has {task} on device {device}; the stage lies on device {home}")
            if task in seen:
                raise ValueError(f"{order.name} has {task} twice on device {device}; leave one out")
            seen.add(task)
    for stage, microbatch in sorted(visits, key=lambda v: v[::-1]):
        forward, whole, inputs, weights = (Task(k, stage, microbatch) for k in (Kind.F, Kind.B, Kind.BI, Kind.BW))
        home = order.placement.device(stage)
        if forward not in seen:
            raise ValueError(f"{order.name} lacks {forward}; add it on device {home}")
        if whole in seen and (inputs in seen or weights in seen):
            half = inputs if inputs in seen else weights
            raise ValueError(f"{order.name} has {whole} and {half} on device {home}; keep the whole or the two halves")
        if whole in seen:
            continue
        if inputs not in seen and weights not in seen:
            raise ValueError(f"{order.name} lacks {whole}; add it on device {home}")
        for half in (inputs, weights):
            if half not in seen:
                raise ValueError(f"{order.name} lacks {half}; add it on device {home}, which has the other half")


def find_cycle(order: Order) -> list[Task]:
    """Tasks each of which waits for the next, the last for the first; empty where the order can run."""
    previous: dict[Task, Task] = {}
    for row in order.tasks:
        previous.update(zip(row[1:], row[:-1], strict=True))
    needs = {
        task: {*order.dependencies(task), *([previous[task]] if task in previous else [])}
        for row in order.tasks
        for task in row
    }
    waiting = {task: len(n) for task, n in needs.items()}
    dependents: dict[Task, list[Task]] = {}
    for task, n in needs.items():
        for need in n:
            dependents.setdefault(need, []).append(task)
    ready = deque(task for task, n in waiting.items() if n == 0)
    while ready:
        task = ready.popleft()
        del waiting[task]
        for other in dependents.get(task, ()):
            waiting[other] -= 1
            if waiting[other] == 0:
                ready.append(other)
    if not waiting:
        return []
    # Everything left waits for something left, so following any need must come back to where it was.
    task, trail = min(waiting), []
    while task not in trail:
        trail.append(task)
        task = min(need for need in needs[task] if need in waiting)
    return trail[trail.index(task) :]


Value = tuple[str, int, int]
"""Buffer, stage, microbatch: the name of what a slot holds."""


def validate_table(table: Table) -> None:
    """Executes the table with names for values. Raises ValueError for a task that is missing, stands twice or comes too
    early, an action or a message that uses a slot that holds something else, or two kinds in a tick of one kind."""
    order = table.order
    _shapes(table)
    buffers: list[dict[tuple[str, int], tuple[Value, int]]] = [{} for _ in range(order.devices)]
    done: dict[Task, int] = {}
    for t in range(table.length):
        made: dict[int, Task] = {}
        for d in range(order.devices):
            task = table.action(t, d)
            if task is not None:
                _placed(table, task, t, d)
                if task in done:
                    raise ValueError(f"tick {t}, device {d}: {task} has run at tick {done[task]} already")
                for need in order.dependencies(task):
                    if done.get(need, t) >= t:
                        raise ValueError(f"tick {t}, device {d}: {task} runs before {need} has ended")
                _act(table, task, t, d, buffers[d])
                made[d] = task
        done.update({task: t for task in made.values()})
        _deliver(table, t, made, buffers)
    wanted = {task for row in order.tasks for task in row}
    if missing := wanted - set(done):
        raise ValueError(f"the table lacks {min(missing)}; {len(done)} of {len(wanted)} tasks run")
    if table.ticks == "one-kind" and table.row_kind is None:
        mixed = next(t for t in range(table.length) if len(set(table.kind[t]) - {0}) > 1)
        raise ValueError(f"tick {mixed} has two kinds of action in a table of one kind a tick; compile it as 'mixed'")


def _shapes(table: Table) -> None:
    shape, routes = (table.length, table.order.devices), len(table.shifts)
    arrays = {name: getattr(table, name) for name in ("kind", "stage", "microbatch", "chunk", "first", "last")}
    arrays |= {f"slot of {b}": a for b, a in table.slot.items()}
    for name, array in arrays.items():
        if array.shape != shape or array.dtype != "int32":
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}; it must be int32{list(shape)}")
    for name in ("receive_input", "receive_gradient"):
        array = getattr(table, name)
        if array.shape != (shape[0], routes, shape[1]) or array.dtype != "int32":
            raise ValueError(
                f"{name} is {array.dtype}{list(array.shape)}; it must be int32{[shape[0], routes, shape[1]]}"
            )


def _placed(table: Table, task: Task, t: int, d: int) -> None:
    order = table.order
    if not (0 <= task.microbatch < order.microbatches and task.stage in order.paths[task.microbatch]):
        raise ValueError(f"tick {t}, device {d}: {task} is on no microbatch's path")
    if order.device(task) != d:
        raise ValueError(f"tick {t}, device {d}: {task} belongs on device {order.device(task)}")
    wanted = {"chunk": order.placement.chunk(task.stage), "first": order.is_first(task), "last": order.is_last(task)}
    for name, want in wanted.items():
        if getattr(table, name)[t, d] != want:
            raise ValueError(f"tick {t}, device {d}: {task} has {name} {getattr(table, name)[t, d]}, not {int(want)}")


def _act(table: Table, task: Task, t: int, d: int, buffers: dict[tuple[str, int], tuple[Value, int]]) -> None:
    """Reads and writes what the action does."""

    def read(buffer: str) -> None:
        slot = int(table.slot[buffer][t, d])
        value, written = buffers.get((buffer, slot), (None, -1))
        if value == (buffer, task.stage, task.microbatch) and slot < table.slots[buffer]:
            return
        holds = "holds nothing" if value is None else f"holds microbatch {value[2]}'s of stage {value[1]}"
        since = "" if value is None else f" since tick {written}"
        raise ValueError(f"tick {t}, device {d}: {task} reads {buffer} slot {slot}, which {holds}{since}")

    def write(buffer: str) -> None:
        slot = int(table.slot[buffer][t, d])
        if not 0 <= slot < table.slots[buffer]:
            raise ValueError(
                f"tick {t}, device {d}: {task} writes {buffer} slot {slot} of {table.slots[buffer]}, the dustbin"
            )
        buffers[buffer, slot] = ((buffer, task.stage, task.microbatch), t)

    first, last = table.order.is_first(task), table.order.is_last(task)
    if task.kind is Kind.BW:
        read("weight")
        return
    if task.kind is Kind.F:
        if not first:
            read("input")
        if table.keep == "residuals":
            write("residual")
        if last:
            write("gradient")
        return
    if table.keep == "residuals":
        read("residual")
    elif not first:
        read("input")
    read("gradient")
    if task.kind is Kind.BI:
        write("weight")


def _deliver(table: Table, t: int, made: dict[int, Task], buffers: list[dict]) -> None:
    """Every device receives by every route; what it wants of that goes into a slot, the rest into the dustbin."""
    arrived: set[Task] = set()
    for route, shift in enumerate(table.shifts):
        for d in range(table.order.devices):
            sender = (d - shift) % table.order.devices
            task = made.get(sender)
            consumer = None if task is None else table.order.consumer(task)
            for buffer, slots in (("input", table.receive_input), ("gradient", table.receive_gradient)):
                slot = int(slots[t, route, d])
                if slot == table.slots[buffer]:
                    continue
                fits = consumer is not None and (task.kind is Kind.F) == (buffer == "input")
                if not fits or table.order.device(consumer) != d or not 0 <= slot < table.slots[buffer]:
                    sent = "nothing" if task is None else f"the result of {task}"
                    raise ValueError(
                        f"tick {t}, device {d}: {buffer} slot {slot} of {table.slots[buffer]} would receive {sent} from "
                        f"device {sender}, which is not meant for it"
                    )
                buffers[d][buffer, slot] = ((buffer, consumer.stage, consumer.microbatch), t)
                arrived.add(task)
    for task in made.values():
        if table.order.consumer(task) is not None and task not in arrived:
            raise ValueError(
                f"tick {t}: nobody receives the result of {task}, for which {table.order.consumer(task)} waits"
            )
