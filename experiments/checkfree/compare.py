"""CheckFree against everything else, on the same failures: loss by iteration, and by modelled time.

Command:   python -m jaxpar.experiments.checkfree.compare                 (three rates, three seeds)
           python -m jaxpar.experiments.checkfree.compare --width 512 --length 512 --rows 64 --iterations 20000   (on a GPU)
Expected:  34 minutes on two CPU cores shared with other work; results/compare.json, .md and .png. At this size (one layer a
           stage, a loss of a stage every few iterations) CheckFree beats rollback and redundant computation, and does not
           beat the plain average, or stages that begin anew: `experiments/README.md` has the numbers.

A Llama of 6 layers, one a stage, on the built-in text (Blagoev et al. 2025, "All is Not Lost: LLM Recovery without
Checkpoints"). In each iteration each of the four middle stages is lost with a probability (neighbours never together: no
strategy of this kind could go on); all six for what recovers edge stages. Every strategy sees the same trace and starts from
the same parameters. At the smallest rate a run loses about 80 stages.

    time          iterations × what one costs beside a plain one: 1.654 for redundant computation (the paper's Table 2),
                  1 + save/k for a snapshot every k steps, and `restart` for each iteration in which something was lost
    rollback      true: all stages go back, and the batches since are done again. The factor by which this lengthens a run is
                  printed beside the closed form ((1-P)^-k - 1)/(kP), P the probability that an iteration loses a stage
    edge copy     without failures: how much the loss jumps when the second stage is copied over the first, and the last but
                  one over the last, for a model trained plainly and one trained with swaps: the claim behind CheckFree+
    swap tax      what training with swaps costs when nothing fails
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar import host_memory
from jaxpar.experiments.small import Runs, Texts, texts
from jaxpar.models.spec import LAYERS
from jaxpar.optimisers_config import AdamW, Constant
from jaxpar.presets import llama
from jaxpar.recovery.base import Recovery, Stages
from jaxpar.recovery.checkfree import CheckFree
from jaxpar.recovery.checkfree_plus import CheckFreePlus
from jaxpar.recovery.config import FailureConfig
from jaxpar.recovery.copy_neighbour import CopyNeighbour
from jaxpar.recovery.no_failure import NoFailure
from jaxpar.recovery.random_init import RandomInit
from jaxpar.recovery.skip_stage import SkipStage
from jaxpar.recovery.snapshot import Snapshot
from jaxpar.recovery.transform import RECOVERY, placed
from jaxpar.recovery.uniform_average import UniformAverage
from jaxpar.skipping.paths import SwapEnds
from jaxpar.skipping.transform import skipping
from jaxpar.step import Control
from jaxpar.steps.clip import clip_per_stage

RESULTS = Path(__file__).resolve().parent / "results"
STAGES = 6
REDUNDANT = 1.654
"""An iteration with redundant computation over a plain one: 151.04 s / 91.32 s, Table 2 of the paper."""


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
      strategy: how lost stages come back.
      lost: which stages fail: none, the four in the middle, or all six.
      swaps: half of the microbatches run both ends swapped.
    """

    strategy: Recovery
    lost: str = "middle"
    swaps: bool = False


# The learning rate is raised for good and not again, as in the authors' code: Algorithm 1 as printed multiplies it by 1.1
# with every loss, which is a row of its own.
ONCE = {"bump_mode": "permanent"}
ENTRIES = {
    "no failure": Entry(NoFailure(), "none"),
    "CheckFree": Entry(CheckFree(**ONCE)),
    "CheckFree, rate compounding": Entry(CheckFree()),
    "CheckFree, no raised rate": Entry(CheckFree(bump=1.0)),
    "uniform average": Entry(UniformAverage(**ONCE)),
    "copy of a neighbour": Entry(CopyNeighbour(**ONCE)),
    "random": Entry(RandomInit(**ONCE)),
    "skip stage": Entry(SkipStage(**ONCE)),
    "snapshot every 5": Entry(Snapshot(5)),
    "snapshot every 20": Entry(Snapshot(20)),
    "snapshot every 100": Entry(Snapshot(100)),
    "no failure, swaps": Entry(NoFailure(), "none", swaps=True),
    "CheckFree+, middle": Entry(CheckFreePlus(**ONCE), swaps=True),
    "CheckFree+, all six": Entry(CheckFreePlus(**ONCE), "all", swaps=True),
}


def runs_of(entry: Entry, data: Texts, options) -> Runs:
    cfg = llama(STAGES, options.width, 4, vocabulary=data.vocabulary, context=options.length)
    optimiser = AdamW(schedule=Constant(options.rate), b2=0.999, weight_decay=0.0)
    around: tuple = (clip_per_stage(1.0, STAGES),)
    if entry.swaps:
        around = (skipping(SwapEnds(2, stages=STAGES), STAGES), *around)

    def transforms(program):
        return placed(around, entry.strategy, Stages(STAGES, program.specs))

    goes_back = entry.strategy.rollback(np.ones(STAGES, bool)) is not None
    return Runs(cfg, optimiser, data, options.iterations, transforms, goes_back)


def trace_of(entry: Entry, rate: float, seed: int, iterations: int) -> np.ndarray:
    """bool [iterations, S]."""
    if entry.lost == "none":
        return np.zeros((iterations, STAGES), bool)
    failures = FailureConfig(failure_rate=rate, fallible=entry.lost, adjacent="thinned", seed=seed)
    return failures.trace(STAGES, iterations).array(iterations)


def run(runs: Runs, entry: Entry, rate: float, seed: int, options) -> dict[str, Any]:
    """One run: its failures, and losses at ten points."""
    start, failed = time.perf_counter(), trace_of(entry, rate, seed, options.iterations)
    every = options.iterations // 10
    held_out, steps, moved = [], [], 0.0
    for state, metrics in runs.train(runs.start(seed), Control(failed=jnp.asarray(failed)), every):
        held_out.append(runs.held_out(state.params))
        steps.append(int(metrics["step"][-1]))
        moved += float(metrics[f"{RECOVERY}/bytes_moved"].sum())
        lost = int(metrics[f"{RECOVERY}/failures"][-1])
    return {
        "failures": lost,
        "iterations_with_failures": int(failed.any(axis=1).sum()),
        "held_out": held_out,
        "steps": steps,
        "bytes_moved": moved,
        "seconds": time.perf_counter() - start,
    }


def edge_copies(runs: dict[str, Runs], seed: int, options) -> dict[str, float]:
    """Jumps of the held-out loss, of models that were trained without failures."""
    found = {}
    for name in ("no failure", "no failure, swaps"):
        nothing = Control(failed=jnp.zeros((options.iterations, STAGES), bool))
        *_, (state, _) = runs[name].train(runs[name].start(seed), nothing, options.iterations)
        before = runs[name].held_out(state.params)
        for edge, other in ((0, 1), (STAGES - 1, STAGES - 2)):
            layers = jax.tree.map(lambda x, e=edge, o=other: x.at[e].set(x[o]), state.params[LAYERS])
            after = runs[name].held_out({**state.params, LAYERS: layers})
            found[f"{name}, stage {edge} from {other}"] = after - before
    return found


def factor(rate: float, every: int) -> float:
    """Iterations for each step with snapshots every k steps: ((1-P)^-k - 1)/(kP)."""
    P = 1 - (1 - rate) ** (STAGES - 2)
    return ((1 - P) ** -every - 1) / (every * P)


def cost(entry: Entry, options) -> float:
    """Of an iteration, over a plain one."""
    return 1 + options.save / entry.strategy.every if isinstance(entry.strategy, Snapshot) else 1.0


def reached(run: dict, target: float, per_iteration: float, restart: float) -> float | None:
    """The modelled time, in plain iterations, at which the held-out loss falls to a target; None: it does not."""
    n, losses = len(run["held_out"]), [float("inf"), *run["held_out"]]
    for i in range(1, n + 1):
        if losses[i] <= target:
            before = losses[i - 1]
            part = 1.0 if not np.isfinite(before) else (before - target) / max(before - losses[i], 1e-12)
            share = (i - 1 + part) / n
            return share * (run["iterations"] * per_iteration + run["iterations_with_failures"] * restart)
    return None


def study(options) -> dict[str, Any]:
    data = texts(options.length, options.rows, min(options.iterations, 2000))
    compiled: dict[str, Runs] = {}
    found: dict[str, Any] = {}
    for name, entry in ENTRIES.items():
        if options.only and not any(word in name for word in options.only):
            continue
        compiled[name] = runs_of(entry, data, options)
        for rate in options.rates if entry.lost != "none" else (0.0,):
            for seed in range(options.seeds):
                row = run(compiled[name], entry, rate, seed, options)
                found[f"{name}, rate {rate}, seed {seed}"] = {
                    "entry": name, "rate": rate, "seed": seed, "iterations": options.iterations, **row,
                    "cost": cost(entry, options),
                }  # fmt: skip
                print(
                    f"{name}, rate {rate}, seed {seed}: {row['failures']} stages lost, step {row['steps'][-1]}, held out "
                    f"{row['held_out'][-1]:.3f} ({row['seconds']:.0f} s)",
                    flush=True,
                )
    jumps = {}
    if {"no failure", "no failure, swaps"} <= set(compiled):
        jumps = {f"seed {seed}": edge_copies(compiled, seed, options) for seed in range(options.seeds)}
    return {"runs": found, "edge_copies": jumps}


def of(found: dict, entry: str, rate: float) -> list[dict]:
    """The runs of an entry at a rate; those without failures have no rate."""
    return [r for r in found["runs"].values() if r["entry"] == entry and r["rate"] in (rate, 0.0)]


def middle(values: list) -> str:
    """Median (least to largest)."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def table(found: dict, options) -> str:
    names = list(dict.fromkeys(r["entry"] for r in found["runs"].values()))
    lines = []
    for rate in options.rates:
        plain = of(found, "no failure", rate)
        target = statistics.median(r["held_out"][len(r["held_out"]) // 2 - 1] for r in plain) if plain else None
        what = "the loss that a run without failures has at half its iterations" if plain else "-"
        lines += [
            "",
            f"Failure rate {rate} a stage and iteration. Target: {what}" + (f", {target:.3f}." if plain else "."),
        ]
        lines += [
            "",
            "| strategy | stages lost | held-out loss at the end | steps done | time to target |",
            "|---|---|---|---|---|",
        ]
        for name in names:
            rows = of(found, name, rate)
            times = [reached(r, target, r["cost"], options.restart) if plain else None for r in rows]
            shown = "not reached" if None in times else f"{statistics.median(times):.0f}"
            if name == "no failure" and plain and None not in times:
                shown += f" (redundant computation, exact: {REDUNDANT * statistics.median(times):.0f})"
            lines.append(
                f"| {name} | {statistics.median(r['failures'] for r in rows):.0f} | "
                f"{middle([r['held_out'][-1] for r in rows])} | {statistics.median(r['steps'][-1] for r in rows):.0f} | {shown} |"
            )
        closed = []
        for name in names:
            if isinstance(strategy := ENTRIES[name].strategy, Snapshot):
                rows = of(found, name, rate)
                measured = [r["iterations"] / max(r["steps"][-1], 1) for r in rows]
                closed.append(
                    f"every {strategy.every}: {statistics.median(measured):.3g} (formula {factor(rate, strategy.every):.3g})"
                )
        if closed:
            lines += ["", "Iterations for each step that is kept, with snapshots " + "; ".join(closed) + "."]
    if found["edge_copies"]:
        lines += ["", "Jump of the held-out loss when an edge stage is copied, without failures:", ""]
        for name in next(iter(found["edge_copies"].values())):
            lines.append(f"- {name}: {middle([jumps[name] for jumps in found['edge_copies'].values()])}")
        taxed, plain = (of(found, n, 0.0) for n in ("no failure, swaps", "no failure"))
        tax = [a["held_out"][-1] - b["held_out"][-1] for a, b in zip(taxed, plain, strict=True)]
        lines.append(f"- swap tax, the same without failures: {middle(tax)}")
    return (
        "Held-out loss in nats a byte: median of the seeds (and range). Time in plain iterations.\n"
        + "\n".join(lines)
        + "\n"
    )


def plot(found: dict, options, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(options.rates), figsize=(5 * len(options.rates), 8), squeeze=False)
    names = list(dict.fromkeys(r["entry"] for r in found["runs"].values()))
    for column, rate in enumerate(options.rates):
        for k, name in enumerate(names):
            rows = of(found, name, rate)
            losses = np.median([r["held_out"] for r in rows], axis=0)
            share = np.arange(1, len(losses) + 1) / len(losses)
            row = rows[0]
            seconds = share * (row["iterations"] * row["cost"] + row["iterations_with_failures"] * options.restart)
            style = dict(label=name, color=plt.cm.tab20(k % 20), marker=".", linewidth=1)
            axes[0, column].plot(share * row["iterations"], losses, **style)
            axes[1, column].plot(seconds, losses, **style)
        # What never gets near the others (rollback from long ago) leaves the picture; the table has it.
        best = min(min(r["held_out"]) for r in found["runs"].values())
        shown = dict(ylabel="held-out loss", ylim=(best - 0.05, best + 1.0))
        axes[0, column].set(title=f"failure rate {rate}", xlabel="iteration", **shown)
        axes[1, column].set(xlabel="modelled time, plain iterations", **shown)
    axes[0, 0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8, help="of a step; even")
    parser.add_argument("--iterations", type=int, default=800, help="a multiple of 10")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--rates", type=float, nargs="*", default=[0.025, 0.05, 0.1], help="failure rates")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--save", type=float, default=0.5, help="what a snapshot costs, in plain iterations")
    parser.add_argument("--restart", type=float, default=0.33, help="what a failure costs besides, in plain iterations")
    parser.add_argument("--only", nargs="*", default=[], help="entries whose name has one of these in it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    if options.rows % 2 or options.iterations % 10:
        parser.error(f"--rows {options.rows} must be even, and --iterations {options.iterations} a multiple of 10")
    host_memory.settle()
    start = time.perf_counter()
    found = study(options)
    about = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "command": " ".join(["python -m jaxpar.experiments.checkfree.compare", *(argv or sys.argv[1:])]),
        "seconds": time.perf_counter() - start,
        "options": {k: v for k, v in vars(options).items() if k != "out"},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compare.json").write_text(json.dumps({**about, **found}, indent=1))
    (options.out / "compare.md").write_text(table(found, options))
    plot(found, options, options.out / "compare.png")
    print(table(found, options))
    return found


if __name__ == "__main__":
    main()
