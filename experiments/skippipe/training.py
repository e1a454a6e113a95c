"""Training with skipped stages: held-out loss against the share that is skipped, and what stages that are taken out later cost.

Command:   python -m jaxpar.experiments.skippipe.training                  (6 stages, 600 steps, 3 seeds)
           python -m jaxpar.experiments.skippipe.training --width 512 --steps 5000 --length 512    (on a GPU)
Expected:  16 minutes on two CPU cores shared with other work; results/training.json, .md and .png. The whole model's loss rises
           with what is skipped (1.81, 1.87, 1.93, 2.04), and falls less when stages are taken out.

A Llama of 6 layers, one a stage, on the built-in text. Each of 6 microbatches leaves out 0, 1, 2 or 3 of the 6 stages, never
the first, always the same ones (SkipPipe, Blagoev et al. 2025). At the end the whole model is evaluated in order, and with
1, 2 and 3 random stages taken out, beside the twin that was trained whole. As in the paper: the more is skipped the worse
the whole model gets at equal steps, and what was trained with skips bears the loss of stages better. Taking out the first
stage, and swapping stages two apart, are the controls for the rules that SkipPipe's paths keep.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar import host_memory
from jaxpar.experiments.small import Runs, controls, texts
from jaxpar.models.route import Route
from jaxpar.optimisers_config import AdamW, WarmupCosine
from jaxpar.presets import llama
from jaxpar.skipping.paths import SkipPaths
from jaxpar.skipping.transform import skipping
from jaxpar.steps.clip import clip_global

RESULTS = Path(__file__).resolve().parent / "results"
STAGES = 6


def evaluations(seed: int = 0, subsets: int = 6) -> dict[str, list[tuple[int, ...]]]:
    """By name: the stages that are run, in order; several ways where chance picks."""
    whole = tuple(range(STAGES))
    draw = np.random.default_rng(seed)
    found = {"whole": [whole]}
    for out in (1, 2, 3):
        all_of_them = list(itertools.combinations(range(1, STAGES), out))
        picked = draw.permutation(len(all_of_them))[:subsets]
        found[f"without {out}"] = [tuple(s for s in whole if s not in all_of_them[i]) for i in picked]
    found["without the first"] = [whole[1:]]
    found["without a middle one"] = [tuple(s for s in whole if s != 3)]
    swap = lambda a, b: tuple({a: b, b: a}.get(s, s) for s in whole)
    found["swapped neighbours"] = [swap(s, s + 1) for s in range(1, STAGES - 1)]
    found["swapped two apart"] = [swap(s, s + 2) for s in range(1, STAGES - 2)]
    return found


def study(options) -> dict:
    cfg = llama(STAGES, options.width, 4, context=options.length)
    data = texts(options.length, options.rows, options.steps)
    cfg = cfg.replace(vocabulary=data.vocabulary)
    optimiser = AdamW(schedule=WarmupCosine(options.rate))
    found = {}
    for skipped in options.skipped:
        strategy = SkipPaths(STAGES, stages=STAGES, skipped=skipped)
        runs = Runs(cfg, optimiser, data, options.steps, (skipping(strategy, STAGES), clip_global(1.0)))
        for seed in range(options.seeds):
            start, state = time.perf_counter(), runs.start(seed)
            ((state, metrics),) = runs.train(state, controls(options.steps, options.rows), options.steps)
            seconds = time.perf_counter() - start
            losses = {
                name: statistics.mean(runs.held_out(state.params, Route(layers=jnp.array(way))) for way in ways)
                for name, ways in evaluations().items()
            }
            name = f"skipped {skipped} of {STAGES}, seed {seed}"
            found[name] = {"skipped": skipped, "seed": seed, "seconds": seconds, "losses": losses}
            print(
                f"{name}: {seconds:.0f} s, last loss {np.mean(metrics['loss'][-20:]):.3f}, held out "
                + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()),
                flush=True,
            )
    return found


def summary(found: dict) -> dict[int, dict[str, list[float]]]:
    """Skipped -> evaluation -> one loss for each seed."""
    rows: dict[int, dict[str, list[float]]] = {}
    for run in found.values():
        for name, loss in run["losses"].items():
            rows.setdefault(run["skipped"], {}).setdefault(name, []).append(loss)
    return rows


def table(found: dict) -> str:
    rows = summary(found)
    names = list(next(iter(rows.values())))
    lines = ["| evaluated | " + " | ".join(f"trained with {s} of {STAGES} skipped" for s in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name in names:
        cells = [f"{statistics.median(r[name]):.3f} ({min(r[name]):.3f} to {max(r[name]):.3f})" for r in rows.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "Held-out loss in nats a byte, median of the seeds (and range).\n\n" + "\n".join(lines) + "\n"


def plot(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for skipped, losses in summary(found).items():
        names = ["whole", "without 1", "without 2", "without 3"]
        axes.plot(
            range(4), [statistics.median(losses[n]) for n in names], marker="o", label=f"trained with {skipped} skipped"
        )
    axes.set(xlabel="stages taken out in evaluation", ylabel="held-out loss, nats a byte", xticks=range(4))
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=12, help="of a step; a multiple of 6")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument(
        "--skipped", type=int, nargs="*", default=[0, 1, 2, 3], help="stages that a microbatch leaves out"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    if options.rows % STAGES:
        parser.error(f"--rows {options.rows} must be a multiple of {STAGES}, one part for each microbatch")
    host_memory.settle()
    start = time.perf_counter()
    found = study(options)
    about = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "command": " ".join(["python -m jaxpar.experiments.skippipe.training", *(argv or sys.argv[1:])]),
        "seconds": time.perf_counter() - start,
        "options": {k: v for k, v in vars(options).items() if k != "out"},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "training.json").write_text(json.dumps({**about, "runs": found}, indent=1))
    (options.out / "training.md").write_text(table(found))
    plot(found, options.out / "training.png")
    print(table(found))
    return found


if __name__ == "__main__":
    main()
