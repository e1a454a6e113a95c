"""Whether a plan keeps every hard rule. Written apart from the search, so that neither inherits the other's mistakes.

The rules (SkipPipe's CC1-3 and TC1, with the numbers of `problem.Rules`): a path starts at stage 0, has the wanted length,
visits a stage at most once, swaps no further and no more than it may, and jumps no further; in each wave loads of stages
are uniform, a node is visited no more often than it has memory, every stage is used; and at no time does a node hold more
than its memory. Collisions in time (TC2) are no rule: they cost what the simulator says.
"""

from __future__ import annotations

from collections import Counter

from jaxpar.parallel.planner.plan import Plan


def check(plan: Plan) -> None:
    """Raises ValueError, one sentence, for the first rule that is broken."""
    for m in range(len(plan.paths)):
        check_path(plan, m)
    _waves(plan)
    for n, held in enumerate(plan.held):
        memory = plan.problem.network.nodes[n].memory
        if held > memory:
            raise ValueError(
                f"{plan.name}: {_name(plan, n)} holds {held} microbatches at a time, and has memory for {memory}"
            )


def check_path(plan: Plan, m: int) -> None:
    """Raises ValueError where the path of microbatch m breaks a rule that concerns it alone."""
    rules, path = plan.problem.rules, plan.paths[m]
    # Whole pipelines have all stages, whatever the rules say of paths that skip.
    length = rules.stages if plan.name == "DT-FM" else rules.length
    who = f"{plan.name}: microbatch {m}"
    where: dict[int, int] = {}
    for stage, nodes in enumerate(plan.arrangement.stages):
        where.update(dict.fromkeys(nodes, stage))
    for n in path:
        if n not in where:
            raise ValueError(f"{who} visits node {n}, which holds no stage")
    stages = [where[n] for n in path]
    if len(stages) != length:
        raise ValueError(f"{who} visits {len(stages)} stages ({stages}), and a path has {length}")
    if stages[0] != 0:
        raise ValueError(f"{who} starts at stage {stages[0]}; stage 0, which embeds, comes first")
    twice = [s for s, times in Counter(stages).items() if times > 1]
    if twice:
        raise ValueError(f"{who} visits stage {twice[0]} {stages.count(twice[0])} times ({stages}); once is the most")
    below = [max(stages[:k]) - stages[k] for k in range(1, len(stages)) if stages[k] < max(stages[:k])]
    if below and max(below) > rules.swap_distance:
        raise ValueError(
            f"{who} swaps over a distance of {max(below)} ({stages}), and {rules.swap_distance} is the most"
        )
    if sum(below) > rules.swap_total:
        raise ValueError(f"{who} swaps over {sum(below)} stages in all ({stages}), and {rules.swap_total} is the most")
    if len(below) > rules.swap_count:
        raise ValueError(f"{who} swaps {len(below)} times ({stages}), and {rules.swap_count} is the most")
    ahead = [stages[k] - max(stages[:k]) for k in range(1, len(stages))]
    if ahead and max(ahead) > rules.jump:
        raise ValueError(f"{who} jumps {max(ahead)} stages ahead ({stages}), and {rules.jump} is the most")


def _waves(plan: Plan) -> None:
    groups = plan.arrangement.stages
    for first in range(0, len(plan.paths), plan.wave):
        paths = plan.paths[first : first + plan.wave]
        who = f"{plan.name}: of microbatches {first} to {first + len(paths) - 1}"
        visits = Counter(n for path in paths for n in path)
        for n, times in sorted(visits.items()):
            memory = plan.problem.network.nodes[n].memory
            if times > memory:
                raise ValueError(f"{who}, {times} visit {_name(plan, n)}, which has memory for {memory}")
        if len(groups) == 1:
            continue
        loads = [sum(visits[n] for n in nodes) for nodes in groups[1:]]
        most = -(-plan.wave * (len(paths[0]) - 1) // len(loads))
        if max(loads) > most:
            raise ValueError(
                f"{who}, {max(loads)} visit stage {1 + loads.index(max(loads))}, and {most} is the most ({loads} visit "
                "stages 1 and on; loads must be uniform)"
            )
        least = plan.wave * (len(paths[0]) - 1) // len(loads)
        if len(paths) == plan.wave and min(loads) < least:
            raise ValueError(
                f"{who}, {min(loads)} visit stage {1 + loads.index(min(loads))}, and {least} is the least ({loads} visit "
                "stages 1 and on; loads must be uniform)"
            )
    every = {n for path in plan.paths for n in path}
    unused = [k for k, nodes in enumerate(groups) if not every & set(nodes)]
    visits = len(plan.paths) * (len(plan.paths[0]) - 1)
    if unused and visits >= len(groups) - 1:
        raise ValueError(f"{plan.name}: no microbatch visits stage {unused[0]}; every stage must be trained")


def _name(plan: Plan, node: int) -> str:
    stage = next(k for k, nodes in enumerate(plan.arrangement.stages) if node in nodes)
    return f"node {plan.problem.network.nodes[node].name!r} of stage {stage}"
