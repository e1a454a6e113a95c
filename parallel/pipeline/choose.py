"""Mixed ticks, or ticks of one kind? By the seconds of a lock-step program, for the costs that are given.

A mixed tick lasts as long as its longest action: where some devices run F and others B, those with F wait. With one kind
a tick nobody waits for a longer kind, but a device that has none of the tick's kind idles. For 1F1B, one kind with the
double warm-up reaches the ideal time (p = 4, m = 8, B = 2F: 33 against 40 forwards, for 7 against 4 microbatches held on
the first device); for zero-bubble schedules, whose kinds last about equally long, mixed ticks do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from jaxpar.parallel.pipeline.orders import SCHEDULES, WARM_UPS, WarmUp, make
from jaxpar.parallel.pipeline.simulate import Costs, Simulation, lockstep, simulate
from jaxpar.parallel.pipeline.table import Keep, Table, Ticks, compile_table
from jaxpar.parallel.pipeline.tasks import Kind, Order


@dataclass(frozen=True)
class Candidate:
    """A form of a schedule.

    Attributes:
      ticks: mixed, or one kind a tick.
      warm_up: of the schedules that have a choice (`orders.WARM_UPS`).
      table: the compiled form.
      seconds: its lock-step time.
    """

    ticks: Ticks
    warm_up: WarmUp
    table: Table
    seconds: float

    @property
    def slots(self) -> int:
        """Inputs and residuals, which are the activations that a device has room for."""
        return self.table.slots["input"] + self.table.slots["residual"]


def candidates(
    name: str,
    devices: int,
    microbatches: int,
    chunks: int | None = None,
    *,
    costs: Costs | None = None,
    keep: Keep = "residuals",
) -> tuple[Candidate, ...]:
    """Every form of a schedule, the fastest first. Among equally fast ones: one kind a tick, which runs without any
    branch and overlaps its messages; then fewer slots. Arguments as for `orders.make`; costs are of a virtual stage."""
    warm_ups = WARM_UPS.get(name, ("least",)) if chunks in (None, 1) else ("least",)
    orders = {w: make(name, devices, microbatches, chunks, warm_up=w) for w in warm_ups}
    return forms(orders, costs, keep)


def forms(
    orders: Mapping[WarmUp, Order], costs: Costs | None = None, keep: Keep = "residuals"
) -> tuple[Candidate, ...]:
    """Both forms of each of these orders, sorted as `candidates` says."""
    found = []
    for warm_up, order in orders.items():
        for ticks in ("one-kind", "mixed"):
            table = compile_table(order, ticks, keep)
            found.append(Candidate(ticks, warm_up, table, lockstep(table, costs)))
    return tuple(sorted(found, key=lambda c: (round(c.seconds, 9), c.ticks == "mixed", c.slots)))


def choose(
    name: str,
    devices: int,
    microbatches: int,
    chunks: int | None = None,
    *,
    costs: Costs | None = None,
    keep: Keep = "residuals",
    most_slots: int | None = None,
) -> Candidate:
    """The fastest form of a schedule that has at most `most_slots` slots for inputs and residuals.

    Raises:
      ValueError: no form has so few slots.
    """
    found = candidates(name, devices, microbatches, chunks, costs=costs, keep=keep)
    fitting = [c for c in found if most_slots is None or c.slots <= most_slots]
    if not fitting:
        least = min(c.slots for c in found)
        raise ValueError(f"{name} needs {least} slots for inputs and residuals, and {most_slots} are allowed")
    return fitting[0]


@dataclass(frozen=True)
class Row:
    """One schedule in a comparison: what it is as a program for each device, and in lock step."""

    name: str
    chunks: int
    simulation: Simulation
    choice: Candidate


def compare(
    devices: int, microbatches: int, chunks: int = 2, costs: Costs | None = None
) -> tuple[list[Row], dict[str, str]]:
    """All schedules, the fastest in lock step first, and why the others are not among them.

    Args:
      devices: p.
      microbatches: m.
      chunks: of interleaved 1F1B.
      costs: of a device's whole stage; schedules with several chunks cut it into equal parts.
    """
    costs = Costs() if costs is None else costs
    rows, refused = [], {}
    for name in SCHEDULES:
        own = chunks if name == "interleaved" else None
        try:
            order = make(name, devices, microbatches, own)
            each = costs.per_chunk(order.chunks)
            found = candidates(name, devices, microbatches, own, costs=each)
            simulations = [simulate(o, each) for o in {c.warm_up: c.table.order for c in found}.values()]
            fastest = min(simulations, key=lambda s: (round(s.makespan, 9), max(s.bytes)))
            rows.append(Row(name, order.chunks, fastest, found[0]))
        except ValueError as error:
            refused[name] = str(error)
    return sorted(rows, key=lambda r: (round(r.choice.seconds, 9), max(r.simulation.bytes))), refused


def fsdp_seconds(devices: int, microbatches: int, costs: Costs, parameter_bytes: float) -> float:
    """What the same work takes with FSDP over the same devices (Rajbhandari et al. 2020, "ZeRO", stage 3).

    Each device runs its share of the microbatches, m/p rounded up, through all p stages: m·(F + B) seconds where p
    divides m, as in an ideal pipeline. The weights are gathered for the forward and for the backward pass, and their
    gradients are scattered, once a step: `fsdp_traffic`. All of it is taken to overlap: a step takes the longer of both.

    Args:
      devices: p.
      microbatches: m.
      costs: of a device's whole stage.
      parameter_bytes: of the whole model.
    """
    costs.check(devices)
    model = sum(costs.seconds(Kind.F, s) + costs.seconds(Kind.B, s) for s in range(devices))
    return max(math.ceil(microbatches / devices) * model, fsdp_traffic(devices, costs, parameter_bytes))


def fsdp_traffic(devices: int, costs: Costs, parameter_bytes: float) -> float:
    """Seconds in which a device's link carries three times (p-1)/p of the model's bytes."""
    return 3 * (devices - 1) / devices * parameter_bytes / costs.bandwidth
