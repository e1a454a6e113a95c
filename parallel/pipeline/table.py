"""An order in ticks: which action each device takes at each tick, from and into which buffer slots, as int32 arrays.

The machine that a table is for: at each tick every device takes at most one action; then what the actions made is sent,
and lies in the receiver's buffers before the next tick. A device has four buffers, whose slots are used again:

    input      the activation that a stage starts from, unless it is the path's first, which reads the batch
    residual   what F keeps for the backward pass (`keep="residuals"` only)
    gradient   the gradient of a stage's output; at the path's last stage F writes it, from the loss
    weight     what BI keeps for BW

With `keep="inputs"` (rematerialisation by stage) the input stays until the backward pass instead, and there are no
residuals. A buffer has one slot more than `slots` says: idle actions and unwanted messages use it as a dustbin.

Routes are *shifts*: at a tick all devices send by `shift` places along the ring at once, so one collective permute a
shift carries every message, and no two messages meet. Shift 0 stays on the device.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from jaxpar.parallel.pipeline.tasks import KINDS, Kind, Order, Task
from jaxpar.parallel.pipeline.validate import validate_order, validate_table

Ticks = Literal["mixed", "one-kind"]
Keep = Literal["inputs", "residuals"]

BUFFERS = ("input", "residual", "gradient", "weight")


@dataclass(frozen=True)
class Table:
    """A compiled schedule. T ticks, P devices, R routes; every array is int32.

    Attributes:
      order: what was compiled.
      ticks: "mixed", or "one-kind" where all actions of a tick are of one kind.
      keep: what stays on a device between F and the backward pass.
      kind: [T, P], a `Kind`; 0 is idle.
      stage, microbatch, chunk: [T, P], of the action; 0 where idle.
      first, last: [T, P], 1 where the stage is the first or last of the microbatch's path.
      slot: buffer -> [T, P], the slot that the action uses. F reads input and writes residual; B and BI read input (or
        residual) and gradient, and BI writes weight; BW reads weight; at the path's last stage F writes gradient.
      shifts: [R] of the routes, distinct, modulo P.
      receive_input, receive_gradient: [T, R, P], the slot for what a device receives after the tick by a route.
      slots: buffer -> how many slots it has, the dustbin not counted. The dustbin's number is this one.
    """

    order: Order
    ticks: Ticks
    keep: Keep
    kind: np.ndarray
    stage: np.ndarray
    microbatch: np.ndarray
    chunk: np.ndarray
    first: np.ndarray
    last: np.ndarray
    slot: Mapping[str, np.ndarray]
    shifts: tuple[int, ...]
    receive_input: np.ndarray
    receive_gradient: np.ndarray
    slots: Mapping[str, int]

    @property
    def length(self) -> int:
        """The number of ticks."""
        return len(self.kind)

    @property
    def devices(self) -> int:
        return self.kind.shape[1]

    def columns(self) -> dict[str, np.ndarray]:
        """All arrays by name, to scan over: [T, P], messages [T, R, P]. The last dimension is the device's, so
        `column[..., device]` is what one device follows. Slots have the names of BUFFERS."""
        names = ("kind", "stage", "microbatch", "chunk", "first", "last", "receive_input", "receive_gradient")
        return {name: getattr(self, name) for name in names} | dict(self.slot)

    @cached_property
    def row_kind(self) -> np.ndarray | None:
        """[T] the kind of each tick, or None where some tick has two."""
        highest = self.kind.max(1)
        return highest if ((self.kind == 0) | (self.kind == highest[:, None])).all() else None

    def shifts_at(self, tick: int) -> tuple[int, ...]:
        """The routes that carry something after the tick."""
        input_, gradient = self.receive_input[tick], self.receive_gradient[tick]
        used = (input_ < self.slots["input"]).any(1) | (gradient < self.slots["gradient"]).any(1)
        return tuple(s for s, u in zip(self.shifts, used, strict=True) if u)

    def shifts_of(self, *kinds: Kind) -> tuple[int, ...]:
        """The routes that messages of these kinds of action take: what one loop body has to permute."""
        used = {(b - a) % self.devices for a, b, k in _messages(self.order) if k in kinds}
        return tuple(s for s in self.shifts if s in used)

    def action(self, tick: int, device: int) -> Task | None:
        kind = Kind(int(self.kind[tick, device]))
        if kind is Kind.IDLE:
            return None
        return Task(kind, int(self.stage[tick, device]), int(self.microbatch[tick, device]))


def compile_table(order: Order, ticks: Ticks = "mixed", keep: Keep = "residuals") -> Table:
    """The order in ticks, with slots and routes. What is returned has been validated.

    Raises:
      ValueError: the order lacks a task, has one twice, or cannot run (see `validate_order`).
    """
    if ticks not in ("mixed", "one-kind"):
        raise ValueError(f"ticks = {ticks!r}; they are 'mixed' or 'one-kind'")
    if keep not in ("inputs", "residuals"):
        raise ValueError(f"keep = {keep!r}; it is 'inputs' or 'residuals'")
    validate_order(order)
    rows = assign_ticks(order, ticks)
    tick = {task: t for t, row in enumerate(rows) for task in row if task is not None}
    slot_of, slots = _slots(order, tick, keep)

    shape = (len(rows), order.devices)
    shifts = tuple(sorted({(b - a) % order.devices for a, b, _ in _messages(order)}))
    kind, stage, microbatch, chunk, first, last = (np.zeros(shape, np.int32) for _ in range(6))
    slot = {b: np.full(shape, slots[b], np.int32) for b in BUFFERS}
    receive_input = np.full((shape[0], len(shifts), shape[1]), slots["input"], np.int32)
    receive_gradient = np.full_like(receive_input, slots["gradient"])
    for task, t in tick.items():
        d = order.device(task)
        kind[t, d], stage[t, d], microbatch[t, d] = task.kind, task.stage, task.microbatch
        chunk[t, d] = order.placement.chunk(task.stage)
        first[t, d], last[t, d] = order.is_first(task), order.is_last(task)
        for b in _used(task.kind, bool(last[t, d]), keep):
            slot[b][t, d] = slot_of[b].get((task.stage, task.microbatch), slots[b])
        consumer = order.consumer(task)
        if consumer is not None:
            to = order.device(consumer)
            route = shifts.index((to - d) % order.devices)
            key = (consumer.stage, consumer.microbatch)
            if task.kind is Kind.F:
                receive_input[t, route, to] = slot_of["input"][key]
            else:
                receive_gradient[t, route, to] = slot_of["gradient"][key]
    table = Table(
        order, ticks, keep, kind, stage, microbatch, chunk, first, last, slot, shifts, receive_input, receive_gradient,
        slots,
    )  # fmt: skip
    validate_table(table)
    return table


def assign_ticks(order: Order, ticks: Ticks = "mixed") -> list[list[Task | None]]:
    """`rows[tick][device]`. Each task runs at the first tick that its device's order and its dependencies allow.

    With one kind a tick, a tick takes, of the kinds that some device could run, the next in the cycle F, B, BI, BW: in
    1F1B's steady state forwards and backwards so take turns, and every device has one of each.
    """
    at = [0] * order.devices
    done: dict[Task, int] = {}
    rows: list[list[Task | None]] = []
    turn = 0
    while any(k < len(tasks) for k, tasks in zip(at, order.tasks, strict=True)):
        row: list[Task | None] = []
        for k, tasks in zip(at, order.tasks, strict=True):
            ready = k < len(tasks) and all(d in done for d in order.dependencies(tasks[k]))
            row.append(tasks[k] if ready else None)
        if not any(row):
            raise ValueError(f"{order.name} stops at tick {len(rows)}: no device can go on")
        if ticks == "one-kind":
            cycle = KINDS[turn:] + KINDS[:turn]
            kind = next(k for k in cycle if any(task and task.kind is k for task in row))
            turn = (KINDS.index(kind) + 1) % len(KINDS)
            row = [task if task and task.kind is kind else None for task in row]
        for device, task in enumerate(row):
            if task is not None:
                done[task] = len(rows)
                at[device] += 1
        rows.append(row)
    return rows


def _messages(order: Order) -> set[tuple[int, int, Kind]]:
    """(sender, receiver, kind of action), each once."""
    found = set()
    for row in order.tasks:
        for task in row:
            consumer = order.consumer(task)
            if consumer is not None:
                found.add((order.device(task), order.device(consumer), task.kind))
    return found


def _used(kind: Kind, last: bool, keep: Keep) -> tuple[str, ...]:
    """The buffers that an action uses."""
    kept = "input" if keep == "inputs" else "residual"
    match kind:
        case Kind.F:
            return ("input", *(["residual"] * (keep == "residuals")), *(["gradient"] * last))
        case Kind.B:
            return (kept, "gradient")
        case Kind.BI:
            return (kept, "gradient", "weight")
        case _:
            return ("weight",)


Key = tuple[int, int]
"""A stage and a microbatch."""


def _slots(order: Order, tick: Mapping[Task, int], keep: Keep) -> tuple[dict[str, dict[Key, int]], dict[str, int]]:
    """A slot for each value that a buffer holds, and the number of slots of each buffer (the most of any device)."""
    lives: dict[str, dict[int, list[tuple[int, int, Key]]]] = {b: defaultdict(list) for b in BUFFERS}
    for task, t in tick.items():
        if task.kind not in (Kind.F, Kind.BI):
            continue
        key, device = (task.stage, task.microbatch), order.device(task)
        if task.kind is Kind.BI:
            lives["weight"][device].append((t, tick[Task(Kind.BW, *key)], key))
            continue
        back = tick[order.backward(*key)]
        before, after = order.neighbour(task, -1), order.neighbour(task, +1)
        if before is not None:  # it comes after its sender's tick
            sent = tick[Task(Kind.F, before, task.microbatch)]
            lives["input"][device].append((sent + 1, t if keep == "residuals" else back, key))
        if keep == "residuals":
            lives["residual"][device].append((t, back, key))
        start = t if after is None else tick[order.backward(after, task.microbatch)] + 1
        lives["gradient"][device].append((start, back, key))
    slot_of: dict[str, dict[Key, int]] = {}
    slots = {}
    for b in BUFFERS:
        slot_of[b], slots[b] = {}, 0
        for values in lives[b].values():
            found, count = colour(values)
            slot_of[b] |= found
            slots[b] = max(slots[b], count)
    return slot_of, slots


def colour(lives: list[tuple[int, int, Key]]) -> tuple[dict[Key, int], int]:
    """Slots for (first tick, last tick, key), so that no two that live at one tick share one; as few as there can be
    (intervals in the order of their starts, each to the lowest slot that is free)."""
    free: list[int] = []
    living: list[tuple[int, int]] = []  # (last tick, slot)
    slot_of: dict[Key, int] = {}
    count = 0
    for start, end, key in sorted(lives):
        while living and living[0][0] < start:
            heapq.heappush(free, heapq.heappop(living)[1])
        if free:
            slot = heapq.heappop(free)
        else:
            slot, count = count, count + 1
        heapq.heappush(living, (end, slot))
        slot_of[key] = slot
    return slot_of, count
