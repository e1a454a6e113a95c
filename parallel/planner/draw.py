"""A plan as a picture: what each node does when, microbatch by microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxpar.parallel.pipeline.draw import COLOUR
from jaxpar.parallel.pipeline.tasks import Kind
from jaxpar.parallel.planner.plan import Plan

LOSS = "#c39bd3"


def plot(plans: Sequence[Plan], file: str | Path) -> None:
    """The timelines of plans on one network, one below the other with one time axis (.png, .svg, .pdf).

    A line is a node, in the order of stages; a bar is a pass, with the number of its microbatch.

    Raises:
      ValueError: a name whose ending is no picture, or no plan.
    """
    if not plans:
        raise ValueError("there is no plan to draw; give at least one")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    size = plans[0].problem.network.size
    figure, all_axes = plt.subplots(
        len(plans), 1, figsize=(16, (0.8 + 0.24 * size) * len(plans)), sharex=True, squeeze=False
    )
    try:
        for plan, axes in zip(plans, all_axes[:, 0], strict=True):
            _timeline(plan, axes)
        all_axes[-1, 0].set_xlim(0, max(plan.seconds for plan in plans))
        all_axes[-1, 0].set_xlabel("seconds")
        named = (("forward", COLOUR[Kind.F]), ("loss", LOSS), ("backward", COLOUR[Kind.B]))
        figure.legend(handles=[Patch(color=c, label=n) for n, c in named], loc="upper right", ncols=3, frameon=False)
        figure.tight_layout()
        figure.savefig(file, dpi=110)
    finally:
        plt.close(figure)


def _timeline(plan: Plan, axes) -> None:
    order = [n for nodes in plan.arrangement.stages for n in nodes]
    for row, node in enumerate(order):
        for start, end, m, step in plan.events.tasks[node]:
            length = len(plan.paths[m])
            colour = COLOUR[Kind.F] if step < length else LOSS if step == length else COLOUR[Kind.B]
            axes.broken_barh(
                [(start, end - start)], (row - 0.45, 0.9), facecolor=colour, edgecolor="white", linewidth=0.4
            )
            if end - start > 0.008 * plan.seconds:
                axes.text((start + end) / 2, row, str(m), ha="center", va="center", fontsize=5)
    edges, at = [], 0
    for nodes in plan.arrangement.stages[:-1]:
        at += len(nodes)
        edges.append(at - 0.5)
    axes.hlines(edges, 0, plan.seconds, color="0.6", linewidth=0.6)
    names = [f"{plan.problem.network.nodes[n].name}  {plan.arrangement.stage_of[n]}" for n in order]
    axes.set_yticks(range(len(order)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set_title(f"{plan.name}: {plan.seconds:.1f} s, {len(plan.paths)} microbatches", fontsize=9)
