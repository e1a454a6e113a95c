"""Iteration time of SkipPipe's plans against DT-FM's, by simulation: on every network that ships, and against what is skipped.

Command:   python -m jaxpar.experiments.skippipe.planner                  (4 networks, 5 ratios, 3 seeds; no device)
           python -m jaxpar.experiments.skippipe.planner --steps 40000 --seeds 10
Expected:  6 min 29 s (2 shared cores, Python 3.11.7); results/planner.json, .md and .png. Measured there, and
           published (`schedule.json` of SkipPipe's repository), for cloud20 with 2 of 6 stages skipped, median of 3 seeds:

               method                  seconds                published
               DT-FM                   80.4                   79.94
               DT-FM with skip         50.1                   48.92
               SkipPipe without TC2    38.2 (32.0 to 38.6)    35.43
               SkipPipe                34.4 (30.0 to 35.5)    33.31

           The more is skipped the faster: 60, 52, 34 and 31 s for 0, 1, 2 and 3 of 6 stages, DT-FM 79. On volunteers20 links
           are unlike, too, and routing saves as much. On homogeneous12 and racks16 it saves nothing without TC2 (35.1 s
           against 36.5 for a third skipped in turns, and 20.4 against 20.2), and with it 30 and 11 %: collisions are all
           there is to avoid. DT-FM on homogeneous12 takes 82 s on SkipPipe's arrangement, 42 on its own.

Thirty microbatches; each takes 0.44 s and 34 MB at a sixth of the model (the workload of SkipPipe's published schedule).

    DT-FM, evenly     whole pipelines on an arrangement of their own, with nodes spread evenly over the stages
    DT-FM             the same on SkipPipe's arrangement, which gives stage 0 more nodes: the published comparison
    DT-FM with skip   stages left out in turns, with no eye to links
    without TC2       conflict-based search under the hard rules alone: each path as fast as it can be alone
    SkipPipe          the best by the event simulator of all sets of paths that were seen

Seconds are the pipeline's, from the first forward pass to the last backward pass; the exchange of gradients that follows is
the same for all that share an arrangement, and stands in the JSON file. Every plan passes `parallel/planner/check.py`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import platform
import statistics
import sys
import time
from pathlib import Path

from jaxpar.parallel.planner import baselines
from jaxpar.parallel.planner.arrangement import STEPS, arrange
from jaxpar.parallel.planner.check import check
from jaxpar.parallel.planner.files import load, shipped
from jaxpar.parallel.planner.plan import Plan
from jaxpar.parallel.planner.problem import Problem, Rules, Workload
from jaxpar.parallel.planner.search import plan

RESULTS = Path(__file__).resolve().parent / "results"
MICROBATCHES = 30
PUBLISHED_STAGES = 6
PUBLISHED = {"DT-FM": 79.94, "DT-FM with skip": 48.92, "SkipPipe without TC2": 35.43, "SkipPipe": 33.31}
"""Seconds in `schedule.json` of SkipPipe's repository: cloud20's regions, 6 stages, 2 of them skipped."""
METHODS = ("DT-FM, evenly", *PUBLISHED)


@dataclasses.dataclass(frozen=True)
class Case:
    """What one run plans.

    Attributes:
      network: its name, or a file.
      stages: of the same model, so that more stages have less work each.
      skipped: stages that each path leaves out.
      seed: of the planner.
      steps: of its search.
      arranging: of its arrangement.
    """

    network: str
    stages: int
    skipped: int
    seed: int
    steps: int
    arranging: int = STEPS

    @property
    def problem(self) -> Problem:
        work = Workload()
        part = PUBLISHED_STAGES / self.stages
        workload = dataclasses.replace(
            work, forward=work.forward * part, loss=work.loss / part, weight_bytes=work.weight_bytes * part
        )
        return Problem(load(self.network), workload, Rules(self.stages, self.stages - self.skipped), MICROBATCHES)


def run(case: Case) -> dict:
    """Seconds of every method, and how the best one came about."""
    began = time.perf_counter()
    problem = case.problem
    outcome = plan(problem, seed=case.seed, steps=case.steps, arranging_steps=case.arranging)
    whole = dataclasses.replace(problem, rules=Rules(case.stages, case.stages))
    evenly = arrange(whole, seed=case.seed, steps=case.arranging)
    even = Plan("DT-FM, evenly", whole, evenly, *baselines.dtfm(whole, evenly))
    check(even)
    plans = (even, *outcome.plans)
    return {
        **dataclasses.asdict(case),
        "seconds": {made.name: made.seconds for made in plans},
        "exchange": {made.name: made.exchange for made in plans},
        "nodes": [len(nodes) for nodes in outcome.skippipe.arrangement.stages],
        "without_tc2_is_optimal": outcome.optimal,
        "history": [{"step": step, "elapsed": elapsed, "seconds": s} for step, elapsed, s in outcome.history],
        "took": time.perf_counter() - began,
    }


def cases(options) -> list[Case]:
    """Every network with a third skipped, and the first network with every ratio and number of stages."""
    wanted = dict.fromkeys((name, PUBLISHED_STAGES, PUBLISHED_STAGES // 3) for name in options.networks)
    for stages in options.stages:
        for ratio in options.ratios:
            skipped = stages - Rules.skipping(stages, ratio).length
            wanted[options.networks[0], stages, skipped] = None
    return [Case(*what, seed, options.steps, options.arranging) for what in wanted for seed in range(options.seeds)]


def study(options) -> list[dict]:
    todo, found = cases(options), []
    with concurrent.futures.ProcessPoolExecutor(options.workers, multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(run, todo) if options.workers > 1 else map(run, todo):
            found.append(result)
            name = "{network}, {skipped} of {stages} stages skipped, seed {seed}".format(**result)
            seconds = ", ".join(f"{k} {v:.1f}" for k, v in result["seconds"].items())
            print(f"{len(found)}/{len(todo)} {name}: {seconds} ({result['took']:.0f} s)", flush=True)
    return found


def rows(found: list[dict]) -> dict[tuple[str, int, int], list[dict]]:
    """(network, stages, skipped) -> a result for each seed."""
    grouped: dict[tuple[str, int, int], list[dict]] = {}
    for result in found:
        grouped.setdefault((result["network"], result["stages"], result["skipped"]), []).append(result)
    return grouped


def table(found: list[dict], options) -> str:
    grouped = rows(found)
    first = options.networks[0]

    def line(names: list[str], results: list[dict]) -> str:
        cells = []
        for method in METHODS:
            seconds = [r["seconds"][method] for r in results]
            less = [100 * (r["seconds"][method] / r["seconds"][METHODS[0]] - 1) for r in results]
            cells.append(f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})")
            if method != METHODS[0]:
                cells[-1] += f", {statistics.median(less):+.0f} %"
        return "| " + " | ".join([*names, *cells]) + " |"

    def head(names: list[str]) -> list[str]:
        return ["", "| " + " | ".join([*names, *METHODS]) + " |", "|---" * (len(names) + len(METHODS)) + "|"]

    lines = [
        f"Seconds of an iteration of {MICROBATCHES} microbatches by simulation: median of {options.seeds} seed(s) (and range), "
        f"then against DT-FM on its own arrangement (published: against its DT-FM). {options.steps} steps of search.",
        "",
        f"Networks, {PUBLISHED_STAGES // 3} of {PUBLISHED_STAGES} stages skipped:",
        *head(["network"]),
    ]
    for name in options.networks:
        lines.append(line([name], grouped[name, PUBLISHED_STAGES, PUBLISHED_STAGES // 3]))
        if name == "cloud20":
            against = [f"{s:.1f}, {100 * (s / PUBLISHED['DT-FM'] - 1):+.0f} %" for s in PUBLISHED.values()]
            lines.append("| " + " | ".join(["cloud20, published", "-", against[0].split(",")[0], *against[1:]]) + " |")
    lines += ["", f"What is skipped, {first}:", *head(["stages", "skipped"])]
    for (name, stages, skipped), results in sorted(grouped.items()):
        if name == first:
            lines.append(line([str(stages), f"{skipped} ({100 * skipped / stages:.0f} %)"], results))
    return "\n".join(lines) + "\n"


def plot(found: list[dict], options, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(options.stages) + 1, figsize=(5 * (len(options.stages) + 1), 4), squeeze=False)
    grouped, first = rows(found), options.networks[0]
    for stages, panel in zip(options.stages, axes[0], strict=False):
        ratios = sorted(skipped for name, s, skipped in grouped if (name, s) == (first, stages))
        for method in METHODS:
            seconds = [[r["seconds"][method] for r in grouped[first, stages, skipped]] for skipped in ratios]
            panel.errorbar(
                [100 * skipped / stages for skipped in ratios],
                [statistics.median(s) for s in seconds],
                [[statistics.median(s) - min(s) for s in seconds], [max(s) - statistics.median(s) for s in seconds]],
                marker="o",
                capsize=3,
                label=method,
            )
        panel.set(title=f"{first}, {stages} stages", xlabel="% of the stages skipped", ylabel="seconds an iteration")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7)
    for name in options.networks:
        history = grouped[name, PUBLISHED_STAGES, PUBLISHED_STAGES // 3][0]["history"]
        last = history[-1]["seconds"]
        axes[0, -1].step(
            [h["elapsed"] for h in history], [h["seconds"] / last for h in history], where="post", label=name
        )
    axes[0, -1].set(
        title="best plan so far, seed 0", xlabel="seconds of planning", ylabel="iteration time over the last"
    )
    axes[0, -1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ratios = [0.0, 0.1, 0.25, 1 / 3, 0.5]
    parser.add_argument(
        "--networks", nargs="+", default=list(shipped()), help="names or files; ratios are of the first"
    )
    parser.add_argument("--stages", type=int, nargs="+", default=[6, 10], help="pieces of the model, for the ratios")
    parser.add_argument("--ratios", type=float, nargs="+", default=ratios, help="parts that are skipped")
    parser.add_argument("--steps", type=int, default=4000, help="of each search")
    parser.add_argument("--arranging", type=int, default=STEPS, help="moves of each arrangement")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} must be at least 1")
    try:
        for case in cases(options):
            case.problem  # noqa: B018 - what no plan can be made for is said before the first is
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    began = time.perf_counter()
    found = study(options)
    about = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "command": " ".join(
            ["python -m jaxpar.experiments.skippipe.planner", *(sys.argv[1:] if argv is None else argv)]
        ),
        "seconds": time.perf_counter() - began,
        "options": {k: v for k, v in vars(options).items() if k != "out"},
        "published": PUBLISHED,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "planner.json").write_text(json.dumps({**about, "runs": found}, indent=1))
    (options.out / "planner.md").write_text(table(found, options))
    plot(found, options, options.out / "planner.png")
    print(table(found, options))
    return found


if __name__ == "__main__":
    main()
