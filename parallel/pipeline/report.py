"""A schedule, or all of them, in words: what `jaxpar schedule` prints."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpar.parallel.pipeline.choose import Candidate, compare, fsdp_seconds, fsdp_traffic
from jaxpar.parallel.pipeline.draw import wrapped
from jaxpar.parallel.pipeline.segments import segments
from jaxpar.parallel.pipeline.simulate import Costs, simulate
from jaxpar.parallel.pipeline.table import BUFFERS, Table
from jaxpar.parallel.pipeline.tasks import KINDS

MOST_TICKS = 300
"""Longer tables are not printed."""


def report(choice: Candidate, costs: Costs) -> str:
    """One schedule: its table, time, bubble, memory, loops and routes. Costs are of a virtual stage."""
    table, order = choice.table, choice.table.order
    found = simulate(order, costs)
    warm_up = ", double warm-up" if choice.warm_up == "double" else ""
    ticks = "one kind of action a tick" if table.row_kind is not None else "mixed ticks"
    lines = [
        f"{order.name}: {order.devices} stage(s) × {order.chunks} chunk(s), {order.microbatches} microbatch(es); "
        f"{table.length} ticks, {ticks}{warm_up}",
        "",
        wrapped(table) if table.length <= MOST_TICKS else f"({table.length} ticks: too many to print)",
        "",
    ]
    rows = [["", "seconds", "bubble", "of all time"]]
    for name, seconds in (("a program for each stage", found.makespan), ("one program in lock step", choice.seconds)):
        bubble = seconds / found.ideal - 1 if found.ideal else 0.0
        idle = 1 - sum(found.busy) / (order.devices * seconds) if seconds else 0.0
        rows.append([name, f"{seconds:.6g}", f"{100 * bubble:.1f} %", f"{100 * idle:.1f} %"])
    lines += [*columns(rows), f"The bubble is relative to the busiest stage's {found.ideal:.6g} s of work.", ""]
    rows = [["stage", "busy s", "activations held", "until Bw", "bytes held"]]
    for d in range(order.devices):
        numbers = (found.activations[d], found.held[d])
        rows.append([f"{d}", f"{found.busy[d]:.6g}", *map(str, numbers), f"{found.bytes[d]:.6g}"])
    lines += [*columns(rows), ""]
    slots = ", ".join(f"{table.slots[b]} {b}" for b in BUFFERS if table.slots[b])
    lines += [f"Buffers of a stage: {slots or 'none'} slot(s). {_loops(table)}{_routes(table)}"]
    return "\n".join(lines)


def _loops(table: Table) -> str:
    if table.row_kind is None:
        return f"One loop of {table.length} ticks, with a switch. "
    parts = []
    for s in segments(table.row_kind):
        pattern = " ".join(map(str, s.pattern))
        parts.append(f"({pattern})×{s.repeats}" if len(s.pattern) > 1 else f"{pattern}×{s.repeats}")
    return f"Loops: {', '.join(parts)}. "


def _routes(table: Table) -> str:
    """Shifts as a person counts them: one back, and not p - 1 ahead."""
    signed = lambda s: f"{s - table.devices if s > table.devices / 2 else s:+d}"
    routes = [f"{kind} {' '.join(signed(s) for s in shifts)}" for kind in KINDS if (shifts := table.shifts_of(kind))]
    return f"Messages go by {', '.join(routes)} stage(s)." if routes else ""


def comparison(devices: int, microbatches: int, chunks: int, costs: Costs, parameter_bytes: float = 0.0) -> str:
    """All schedules for these costs (of a device's whole stage), and whether FSDP would be better."""
    rows, refused = compare(devices, microbatches, chunks, costs)
    lines = [
        ["schedule", "chunks", "lock step s", "bubble", "bytes", "ticks", "own programs s", "bubble", "bytes"],
    ]
    for row in rows:
        found, choice = row.simulation, row.choice
        bubble = choice.seconds / found.ideal - 1 if found.ideal else 0.0
        ticks = choice.ticks + (", double warm-up" if choice.warm_up == "double" else "")
        held = max(simulate(choice.table.order, costs.per_chunk(row.chunks)).bytes)
        together = [f"{choice.seconds:.6g}", f"{100 * bubble:.1f} %", f"{held:.6g}", ticks]
        apart = [f"{found.makespan:.6g}", f"{100 * found.bubble:.1f} %", f"{max(found.bytes):.6g}"]
        lines.append([row.name, f"{row.chunks}", *together, *apart])
    text = [f"{devices} stage(s), {microbatches} microbatch(es)", "", *columns(lines)]
    text += [f"{name}: {why}" for name, why in refused.items()]
    text.append("SkipPipe and CheckFree+ train something else: fewer stages a microbatch, and stages in swapped order.")
    exact = [row for row in rows if row.name not in ("skippipe", "checkfree+")]
    text += ["", against_fsdp(exact[0].name, exact[0].choice.seconds, devices, microbatches, costs, parameter_bytes)]
    return "\n".join(text)


def against_fsdp(
    name: str, seconds: float, devices: int, microbatches: int, costs: Costs, parameter_bytes: float
) -> str:
    """Whether the fastest pipeline beats FSDP over the same devices, and from what traffic on."""
    fsdp = fsdp_seconds(devices, microbatches, costs, parameter_bytes)
    traffic = fsdp_traffic(devices, costs, parameter_bytes)
    work = fsdp_seconds(devices, microbatches, costs, 0.0)
    sums = (
        f"FSDP over the same {devices} device(s): {fsdp:.6g} s (work {work:.6g} s, weights {traffic:.6g} s, overlapped)"
    )
    if fsdp <= seconds:
        free = "" if traffic else " Links or weights are free here: give the model's bytes and the links' bandwidth."
        return (
            f"{sums}. Pipelining is not worth it: {name} takes {seconds:.6g} s; it would be where the weights' traffic, "
            f"3·(p-1)/p of the model over a link, took more than {seconds:.6g} s.{free}"
        )
    return f"{sums}. Pipelining is worth it: {name} takes {seconds:.6g} s, {100 * (1 - seconds / fsdp):.1f} % less."


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table, the first column to the left and the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
