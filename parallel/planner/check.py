"""Whether a plan keeps every hard rule. Written apart from the search, so that neither inherits the other's mistakes.

The rules (SkipPipe's CC1-3 and TC1, with the numbers of `problem.Rules`): a path starts at stage 0, has the wanted length,
visits a stage at most once, swaps no further and no more than it may, and jumps no further; in each wave loads of stages
are uniform and a node is visited no more often than it has memory; every stage is used; and at no time does a node hold
more than its memory. Every node holds one stage, and every microbatch has a path. Collisions in time (TC2) are no rule: they cost what the simulator says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxpar.parallel.planner.plan import Plan
from jaxpar.parallel.planner.problem import Arrangement, Problem, Rules


def check(plan: Plan) -> None:
    """Raises ValueError, one sentence, for the first rule that is broken."""
    check_arrangement(plan.problem, plan.arrangement)
    if len(plan.paths) != plan.problem.microbatches:
        raise ValueError(
            f"{plan.name} has {len(plan.paths)} paths for {plan.problem.microbatches} microbatches; each has one"
        )
    for m in range(len(plan.paths)):
        check_path(plan, m)
    _waves(plan)
    for n, held in enumerate(plan.held):
        memory = plan.problem.network.nodes[n].memory
        if held > memory:
            raise ValueError(
                f"{plan.name}: {_name(plan, n)} holds {held} microbatches at a time, and has memory for {memory}"
            )


def check_arrangement(problem: Problem, arrangement: Arrangement) -> None:
    """Raises ValueError unless every stage has a node, and every node stands once."""
    stages, size = arrangement.stages, problem.network.size
    if len(stages) != problem.rules.stages:
        raise ValueError(f"the arrangement has {len(stages)} stages, and the rules {problem.rules.stages}")
    placed = sorted(n for nodes in stages for n in nodes)
    if placed != list(range(size)):
        raise ValueError(f"the arrangement places nodes {placed}; each of 0 to {size - 1} must stand exactly once")
    if () in stages:
        raise ValueError(f"stage {stages.index(())} has no node; give each stage one at least")


def check_path(plan: Plan, m: int) -> None:
    """Raises ValueError where the path of microbatch m breaks a rule that concerns it alone."""
    who = f"{plan.name}: microbatch {m}"
    where = {n: stage for stage, nodes in enumerate(plan.arrangement.stages) for n in nodes}
    for n in plan.paths[m]:
        if n not in where:
            raise ValueError(f"{who} visits node {n}, which holds no stage")
    check_stages([where[n] for n in plan.paths[m]], plan.problem.rules, who)


def check_paths(paths: Sequence[Sequence[int]], rules: Rules) -> None:
    """Raises ValueError where paths over stages, one for each microbatch, break a rule that concerns no network."""
    for m, path in enumerate(paths):
        check_stages(path, rules, f"microbatch {m}")
    _every_stage(paths, rules.stages)


def check_stages(stages: Sequence[int], rules: Rules, who: str = "the path") -> None:
    """Raises ValueError, which begins with `who`, where a path over stages breaks a rule."""
    stages = list(stages)
    if len(stages) != rules.length:
        raise ValueError(f"{who} visits {len(stages)} stages ({stages}), and a path has {rules.length}")
    if missing := [s for s in stages if not 0 <= s < rules.stages]:
        raise ValueError(f"{who} visits stage {missing[0]} ({stages}); stages are 0 to {rules.stages - 1}")
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
    _every_stage(plan.stage_paths, len(groups), f"{plan.name}: ")


def _every_stage(paths: Sequence[Sequence[int]], stages: int, who: str = "") -> None:
    unused = sorted(set(range(stages)).difference(*paths))
    if unused:
        raise ValueError(f"{who}no microbatch visits stage {unused[0]}; every stage must be trained")


def _name(plan: Plan, node: int) -> str:
    stage = next(k for k, nodes in enumerate(plan.arrangement.stages) if node in nodes)
    return f"node {plan.problem.network.nodes[node].name!r} of stage {stage}"
