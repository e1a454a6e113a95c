"""What a schedule costs: makespan, bubble, busy time and memory, from seconds and bytes that are given. No device runs.

Two machines are simulated. `simulate` starts each task as soon as its device and its inputs are there (a program for
each device). `lockstep` is one program over all devices, where every tick lasts as long as its longest action.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from jaxpar.parallel.pipeline.table import Table
from jaxpar.parallel.pipeline.tasks import Kind, Order, Task
from jaxpar.parallel.pipeline.validate import validate_order

Amount = float | tuple[float, ...]
"""One number for every virtual stage, or one for each."""


@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of one microbatch at one virtual stage.

    Attributes:
      forward: seconds of F.
      backward_input: seconds of BI.
      backward_weight: seconds of BW.
      backward: seconds of B; None for the sum of its halves.
      latency: seconds that any message takes.
      message: bytes of a message.
      bandwidth: bytes a second of a link.
      links: [from][to] seconds of a message between two devices, in place of latency, message and bandwidth where links
        differ; None where they do not.
      activation: bytes held from F to B or BI.
      weight: bytes held from BI to BW.
    """

    forward: Amount = 1.0
    backward_input: Amount = 1.0
    backward_weight: Amount = 1.0
    backward: Amount | None = None
    latency: float = 0.0
    message: float = 0.0
    bandwidth: float = math.inf
    links: tuple[tuple[float, ...], ...] | None = None
    activation: Amount = 1.0
    weight: Amount = 1.0

    def __post_init__(self):
        for name in ("forward", "backward_input", "backward_weight", "backward", "activation", "weight"):
            amount = getattr(self, name)
            for value in amount if isinstance(amount, tuple) else (amount,):
                if value is not None and not (0 <= value < math.inf):
                    raise ValueError(f"{name} = {value}; a cost is a number of at least 0")
        if not (0 <= self.latency < math.inf and 0 <= self.message < math.inf and self.bandwidth > 0):
            raise ValueError(
                f"latency {self.latency} s, {self.message} bytes a message at {self.bandwidth} bytes/s; latency and "
                "bytes are at least 0, bandwidth above 0"
            )
        for a, row in enumerate(self.links or ()):
            for b, value in enumerate(row):
                if not (0 <= value < math.inf):
                    raise ValueError(f"links[{a}][{b}] = {value}; a link takes a number of seconds, at least 0")

    def seconds(self, kind: Kind, stage: int) -> float:
        if kind is Kind.B and self.backward is None:
            return self.seconds(Kind.BI, stage) + self.seconds(Kind.BW, stage)
        amounts = {
            Kind.IDLE: 0.0,
            Kind.F: self.forward,
            Kind.B: self.backward,
            Kind.BI: self.backward_input,
            Kind.BW: self.backward_weight,
        }
        return at(amounts[kind], stage)

    @property
    def link(self) -> float:
        """Seconds that a message takes from one device to another, where all links are alike."""
        return self.latency + self.message / self.bandwidth

    def between(self, sender: int, receiver: int) -> float:
        """Seconds that a message takes between two devices; 0 on one device."""
        if sender == receiver:
            return 0.0
        return self.link if self.links is None else self.links[sender][receiver]

    def shifted(self, shift: int, devices: int) -> float:
        """Seconds until every device has the message of the one `shift` places before it on the ring."""
        if self.links is None:
            return self.link
        return max(self.links[d][(d + shift) % devices] for d in range(devices))

    def per_chunk(self, chunks: int) -> Costs:
        """The costs of a stage cut into chunks: 1/chunks of the work and memory; a message stays as it is.

        Raises:
          ValueError: costs that are given for each stage, which say nothing about its parts.
        """
        if chunks == 1:
            return self
        changed = {}
        for name in ("forward", "backward_input", "backward_weight", "backward", "activation", "weight"):
            amount = getattr(self, name)
            if isinstance(amount, tuple):
                raise ValueError(
                    f"{name} is given for {len(amount)} stages; with {chunks} chunks give one number, or one for each of "
                    f"{chunks * len(amount)} virtual stages"
                )
            changed[name] = None if amount is None else amount / chunks
        return replace(self, **changed)

    def check(self, stages: int, devices: int | None = None) -> None:
        """Raises ValueError where a cost is given for another number of stages, or links for other devices."""
        if None not in (self.links, devices) and [len(row) for row in self.links] != [devices] * devices:
            rows = sorted({len(row) for row in self.links})
            raise ValueError(f"links are {len(self.links)} rows of {rows} numbers for {devices} devices; give a square")
        for name in ("forward", "backward_input", "backward_weight", "backward", "activation", "weight"):
            amount = getattr(self, name)
            if isinstance(amount, tuple) and len(amount) != stages:
                raise ValueError(f"{name} has {len(amount)} numbers for {stages} virtual stages; give {stages}, or one")


def at(amount: Amount | None, stage: int) -> float:
    return amount[stage] if isinstance(amount, tuple) else float(amount or 0.0)


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found.

    Attributes:
      order: what was simulated.
      start, end: seconds, of each task.
      makespan: seconds from the first start to the last end.
      busy: seconds that each device works.
      activations: the most microbatches × chunks whose activations a device holds (from F to B or BI).
      held: the same, but a split backward holds until BW.
      bytes: the most bytes that a device holds, by `Costs.activation` and `Costs.weight`.
    """

    order: Order
    start: Mapping[Task, float]
    end: Mapping[Task, float]
    makespan: float
    busy: tuple[float, ...]
    activations: tuple[int, ...]
    held: tuple[int, ...]
    bytes: tuple[float, ...]

    @property
    def ideal(self) -> float:
        """Seconds of the busiest device: no order of these tasks on these devices is faster."""
        return max(self.busy)

    @property
    def bubble(self) -> float:
        """Time lost, as a part of the ideal time: (p-1)/m for GPipe and 1F1B (Narayanan et al. 2021, section 2.2)."""
        return self.makespan / self.ideal - 1.0 if self.ideal else 0.0

    @property
    def idle(self) -> float:
        """The part of all devices' time in which they wait: (p-1)/(m+p-1) for GPipe and 1F1B."""
        # Not below 0: sums in another order may exceed the makespan by a last bit.
        return max(0.0, 1.0 - sum(self.busy) / (len(self.busy) * self.makespan)) if self.makespan else 0.0


def simulate(order: Order, costs: Costs | None = None) -> Simulation:
    """Runs the order with each task as early as it can. A message occupies neither of its devices.

    Raises:
      ValueError: an order that cannot run, or costs for another number of stages.
    """
    costs = Costs() if costs is None else costs
    costs.check(order.placement.stages, order.devices)
    validate_order(order)
    start: dict[Task, float] = {}
    end: dict[Task, float] = {}
    clock = [0.0] * order.devices
    position = [0] * order.devices
    left = sum(map(len, order.tasks))
    while left:
        for device, row in enumerate(order.tasks):
            while position[device] < len(row):
                task = row[position[device]]
                needs = order.dependencies(task)
                if any(need not in end for need in needs):
                    break
                arrivals = [end[n] + costs.between(order.device(n), device) for n in needs]
                start[task] = max([clock[device], *arrivals])
                clock[device] = end[task] = start[task] + costs.seconds(task.kind, task.stage)
                position[device] += 1
                left -= 1
    busy = tuple(sum(costs.seconds(t.kind, t.stage) for t in row) for row in order.tasks)
    peaks = [peak_memory(row, costs) for row in order.tasks]
    activations, held, most = (tuple(column) for column in zip(*peaks, strict=True))
    return Simulation(order, start, end, max(clock), busy, activations, held, most)


def peak_memory(row: tuple[Task, ...], costs: Costs) -> tuple[int, int, float]:
    """The most activations, the most held until BW, and the most bytes, while a device runs its tasks."""
    activations = held = 0
    amount = 0.0
    peak = (0, 0, 0.0)
    for task in row:
        if task.kind is Kind.F:
            activations, held = activations + 1, held + 1
            amount += at(costs.activation, task.stage)
        elif task.kind is Kind.BI:  # while it runs, it reads the one and writes the other
            amount += at(costs.weight, task.stage)
        peak = (max(peak[0], activations), max(peak[1], held), max(peak[2], amount))
        if task.kind in (Kind.B, Kind.BI):
            activations -= 1
            amount -= at(costs.activation, task.stage)
        if task.kind is Kind.BW:
            amount -= at(costs.weight, task.stage)
        held -= task.kind in (Kind.B, Kind.BW)
    return peak


def lockstep(table: Table, costs: Costs | None = None) -> float:
    """Seconds of one program over all devices: every tick lasts as long as its longest action and its messages.

    A tick of one kind sends along the routes of its kind. A mixed tick sends along every route of the table, wanted or
    not, because which are wanted differs from device to device.
    """
    costs = Costs() if costs is None else costs
    costs.check(table.order.placement.stages, table.devices)
    sent = lambda shifts: sum(costs.shifted(shift, table.devices) for shift in shifts if shift)
    every = sent(table.shifts)
    routes = {kind: sent(table.shifts_of(kind)) for kind in Kind}
    total = 0.0
    for t in range(table.length):
        tasks = [task for d in range(table.devices) if (task := table.action(t, d)) is not None]
        total += max(costs.seconds(task.kind, task.stage) for task in tasks)
        total += every if table.ticks == "mixed" else routes[tasks[0].kind]
    return total
