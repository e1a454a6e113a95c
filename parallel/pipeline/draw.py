"""A schedule as text or as a picture."""

from __future__ import annotations

from pathlib import Path

from jaxpar.parallel.pipeline.simulate import Simulation
from jaxpar.parallel.pipeline.table import Table
from jaxpar.parallel.pipeline.tasks import Kind, Order, Task

COLOUR = {Kind.F: "#7fb3d5", Kind.B: "#f5b041", Kind.BI: "#f8c471", Kind.BW: "#82c99a"}
MEANING = {
    Kind.F: "forward",
    Kind.B: "backward",
    Kind.BI: "backward of the input",
    Kind.BW: "backward of the weights",
}


def cell(task: Task | None, order: Order) -> str:
    """`F3`, or `F3'` for the second chunk of the device, `F3''` for the third."""
    if task is None:
        return "."
    return f"{task.kind}{task.microbatch}" + "'" * order.placement.chunk(task.stage)


def text(table: Table, first: int = 0, last: int | None = None) -> str:
    """A line a device, a column a tick; ticks from `first` up to, and without, `last`."""
    ticks = range(table.length)[first:last]
    cells = [[cell(table.action(t, d), table.order) for t in ticks] for d in range(table.devices)]
    width = max([len(c) for row in cells for c in row] + [len(str(t)) for t in ticks], default=1)
    lines = ["tick     " + " ".join(str(t).rjust(width) for t in ticks)]
    lines += [f"device {d:<2}" + " ".join(c.rjust(width) for c in row) for d, row in enumerate(cells)]
    return "\n".join(line.rstrip() for line in lines)


def wrapped(table: Table, columns: int = 118) -> str:
    """The whole table, in blocks of ticks that fit so many columns."""
    width = max(
        len(text(table, t, t + 1).splitlines()[1 + d]) for t in range(table.length) for d in range(table.devices)
    )
    each = max(1, (columns - 9) // (max(width - 9, len(str(table.length - 1))) + 1))
    return "\n\n".join(text(table, t, t + each) for t in range(0, table.length, each))


def plot(simulation: Simulation, file: str | Path) -> None:
    """The tasks of each device over time, as a picture (.png, .svg, .pdf).

    Raises:
      ValueError: a name whose ending is no picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    order = simulation.order
    figure, axes = plt.subplots(figsize=(min(24.0, 4.0 + 0.3 * max(map(len, order.tasks))), 1.4 + 0.5 * order.devices))
    try:
        kinds = set()
        for device, row in enumerate(order.tasks):
            for task in row:
                begin, span = simulation.start[task], simulation.end[task] - simulation.start[task]
                chunk = order.placement.chunk(task.stage)
                kinds.add(task.kind)
                axes.broken_barh(
                    [(begin, span)],
                    (device - 0.45, 0.9),
                    facecolor=COLOUR[task.kind],
                    edgecolor="white",
                    linewidth=0.5,
                    alpha=1.0 - 0.5 * chunk / order.chunks,
                )
                axes.text(begin + span / 2, device, str(task.microbatch), ha="center", va="center", fontsize=7)
        axes.set_yticks(range(order.devices), [f"device {d}" for d in range(order.devices)])
        axes.invert_yaxis()
        axes.set_xlim(0, simulation.makespan or 1)
        axes.set_xlabel("seconds")
        chunks = f"{order.chunks} chunks (the later the paler)" if order.chunks > 1 else "1 chunk"
        axes.set_title(
            f"{order.name}: {order.devices} devices, {order.microbatches} microbatches, {chunks}; "
            f"bubble {100 * simulation.bubble:.1f} % of the ideal time",
            fontsize=10,
        )
        axes.legend(
            handles=[Patch(color=COLOUR[k], label=MEANING[k]) for k in sorted(kinds)],
            loc="upper center",
            bbox_to_anchor=(0.5, -0.25),
            ncols=4,
            fontsize=8,
            frameon=False,
        )
        figure.savefig(file, dpi=150, bbox_inches="tight")
    finally:
        plt.close(figure)
