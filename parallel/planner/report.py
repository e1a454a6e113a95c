"""A plan in words: what `jaxpar plan` prints."""

from __future__ import annotations

from jaxpar.parallel.pipeline.report import columns
from jaxpar.parallel.planner.plan import Plan
from jaxpar.parallel.planner.problem import Capacity
from jaxpar.parallel.planner.search import Outcome

MOST_PATHS = 40
"""More routes than this are not printed."""


def report(outcome: Outcome) -> str:
    """Arrangement, paths, and the iteration time of all methods."""
    plan = outcome.skippipe
    problem, rules = plan.problem, plan.problem.rules
    capacity = Capacity.of(problem, plan.arrangement)
    skipped = rules.stages - rules.length
    lines = [
        f"{problem.network.name}: {problem.network.size} nodes, {rules.stages} stages, {problem.microbatches} "
        f"microbatch(es), {skipped} stage(s) skipped by each ({100 * skipped / rules.stages:.0f} %)",
        "",
        *arrangement(plan),
        "",
        f"{capacity.routes} path(s), each for {capacity.waves} microbatch(es) one after another; a swap is marked *",
        *paths(plan, capacity.routes),
        "",
        *comparison(outcome),
    ]
    return "\n".join(lines)


def arrangement(plan: Plan) -> list[str]:
    """A line a stage: its nodes, and how many microbatches visit it."""
    visits = [sum(stage in path for path in plan.stage_paths) for stage in range(plan.problem.rules.stages)]
    rows = [["stage", "visits", "nodes"]]
    for stage, nodes in enumerate(plan.arrangement.stages):
        names = ", ".join(plan.problem.network.nodes[n].name for n in nodes)
        rows.append([str(stage), str(visits[stage]), names])
    widths = [max(len(row[k]) for row in rows) for k in range(2)]
    return [f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]}" for row in rows]


def paths(plan: Plan, routes: int) -> list[str]:
    """A line a route: stage and node, in order."""
    if routes > MOST_PATHS:
        return [f"({routes} paths: too many to print)"]
    lines = []
    for r in range(routes):
        parts, frontier = [], 0
        for stage, node in zip(plan.stage_paths[r], plan.paths[r], strict=True):
            mark = "*" if stage < frontier else ""
            frontier = max(frontier, stage)
            parts.append(f"{stage}{mark} {plan.problem.network.nodes[node].name}")
        lines.append(f"{r:>3}  " + " → ".join(parts))
    return lines


def comparison(outcome: Outcome) -> list[str]:
    """A line a method: seconds of its pipeline, with the exchange of gradients, and against DT-FM."""
    rows = [["method", "pipeline s", "to DT-FM", "with exchange s", "to DT-FM", "waiting s", "busiest node"]]
    first = outcome.dtfm
    for plan in outcome.plans:
        whole, whole_first = plan.seconds + plan.exchange, first.seconds + first.exchange
        busy = max(sum(end - start for start, end, _, _ in tasks) for tasks in plan.events.tasks)
        rows.append(
            [
                plan.name,
                f"{plan.seconds:.2f}",
                f"{100 * (plan.seconds / first.seconds - 1):+.1f} %",
                f"{whole:.2f}",
                f"{100 * (whole / whole_first - 1):+.1f} %",
                f"{plan.events.waited:.1f}",
                f"{100 * busy / plan.seconds:.0f} %",
            ]
        )
    proven = " SkipPipe without TC2 is proven the best by its slowest path." if outcome.optimal else ""
    rules = first.problem.rules
    lines = [*columns(rows), f"{outcome.steps} steps of search. DT-FM runs every stage; the others skip.{proven}"]
    if outcome.skippipe.problem.rules.length < rules.stages:
        pipelines = len(set(first.paths))
        lines.append(
            f"On this arrangement DT-FM has {pipelines} pipeline(s), {pipelines * rules.stages} of "
            f"{first.problem.network.size} nodes; with --skip 0 it has an arrangement of its own, which may be faster."
        )
    return lines
