"""The residual stream over depth, every operator on the same text: at equal tokens, and at equal FLOPs.

Command:   python -m jaxpar.experiments.adaptive.depth_family                 (8 layers, 400 steps, 3 seeds)
           python -m jaxpar.experiments.adaptive.depth_family --layers 16 --width 256 --steps 20000 --rows 64 --length 512   (on a GPU)
           python -m jaxpar.experiments.adaptive.depth_family --only plain delta       (operators whose name has one of these in it)
Expected:  results/depth_family.json, .md and .png, written after each operator; half an hour on 2 cores. Deltas of four channels,
           MUDDFormer, hyper-connections and DenseFormer below plain; full attention residuals, vertical attention, the window
           over tokens and ELC-BERT above it in so short a run.

A Llama of narrow layers on the built-in text. Every operator has the same decoder, data, optimiser and steps, and starts from
the same draws. Two losses a run: at the end, and at the step by which the plain stream's whole run would have been paid for
with this operator's FLOPs (model FLOPs, `jaxpar.flops`; operators cost more a token, so it is an earlier step, with its own
learning rate then: it flatters nobody but plain). Held-out loss in nats a byte; quoted is the median over seeds, and the
median of differences to plain with the same seed.

"write only" is the delta rule without its erasure (X + β k vᵀ): the control that Deep Delta Learning leaves out. At the end each
model is looked into: how much larger the last branch's output is than the first's, which a plain stream must let grow.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

from jaxpar import flops, host_memory
from jaxpar.experiments.small import Runs, controls, texts
from jaxpar.inspecting import findings
from jaxpar.models.residual.attention_residuals import AttentionResiduals
from jaxpar.models.residual.cross_attention import DeepCrossAttention
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.residual.dense_former import DenseFormer
from jaxpar.models.residual.depth_window import DepthWindow
from jaxpar.models.residual.elc_bert import ElcBert
from jaxpar.models.residual.hyper_connections import HyperConnections
from jaxpar.models.residual.manifold import ManifoldHyperConnections
from jaxpar.models.residual.mudd import MuddFormer
from jaxpar.models.residual.plain import Plain
from jaxpar.models.residual.short_window import ShortWindow
from jaxpar.models.residual.vertical import VerticalAttention
from jaxpar.optimisers_config import AdamW, WarmupCosine
from jaxpar.presets import llama
from jaxpar.steps.clip import clip_global

RESULTS = Path(__file__).resolve().parent / "results"
FAMILY = {
    "plain": Plain(),
    "attention residuals": AttentionResiduals(),
    "attention residuals, blocks of 4": AttentionResiduals(block=4),
    "hyper-connections": HyperConnections(),
    "mHC": ManifoldHyperConnections(),
    "MUDDFormer": MuddFormer(),
    "DeepCrossAttention": DeepCrossAttention(),
    "DenseFormer": DenseFormer(),
    "vertical attention": VerticalAttention(),
    "window over depth": DepthWindow(window=8),
    "ELC-BERT": ElcBert(),
    "delta": DeepDelta(),
    "delta, write only": DeepDelta(update="write"),
    "delta, 4 channels": DeepDelta(channels=4),
    "delta, 4 channels over tokens": DeepDelta(channels=4, compressor="tokens", embedding="convolution"),
    "window over tokens": ShortWindow(),
    "delta, 4 channels, write only": DeepDelta(channels=4, update="write"),
}


def paid(cfg, plain, length: int, steps: int, every: int) -> int:
    """The last step, a multiple of `every`, that costs no more than the plain stream's whole run."""
    part = flops.training(plain, length) / flops.training(cfg, length)
    return max(every, int(steps * min(part, 1.0)) // every * every)


def one(name: str, options, data) -> list[dict]:
    """A row for each seed."""
    plain = llama(options.layers, options.width, 4, context=options.length, vocabulary=data.vocabulary)
    cfg = plain.replace(residual=FAMILY[name])
    runs = Runs(cfg, AdamW(schedule=WarmupCosine(options.rate)), data, options.steps, (clip_global(1.0),))
    every = max(1, options.steps // 20)
    until = paid(cfg, plain, options.length, options.steps, every)
    probe = jax.tree.map(lambda x: x[0], data.held_out)
    rows = []
    for seed in range(options.seeds):
        start, losses = time.perf_counter(), []
        for state, metrics in runs.train(runs.start(seed), controls(options.steps, options.rows), every):
            losses.append(float(np.mean(metrics["loss"])))
            if int(state.step) == until:
                early = runs.held_out(state.params)
        given = np.asarray((seen := findings(cfg, state.params, probe))["given_rms"])
        rows.append(
            {
                "seed": seed,
                "seconds": time.perf_counter() - start,
                "loss": runs.held_out(state.params),
                "at_equal_flops": early,
                "equal_flops_step": until,
                "flops": flops.training(cfg, options.length) / flops.training(plain, options.length),
                "growth": float(given[-1].mean() / given[0].mean()),
                "training": losses,
                "depth_weights": seen["depth_weights"] if seed == 0 else None,
            }
        )
        print(f"{name}, seed {seed}: {rows[-1]['loss']:.4f} in {rows[-1]['seconds']:.0f} s", flush=True)
    return rows


def table(found: dict) -> str:
    lines = [
        "| operator | held-out loss | less plain's | at equal FLOPs, less plain's | FLOPs over plain | output growth |",
        "|---|---|---|---|---|---|",
    ]
    plain = {row["seed"]: row["loss"] for row in found.get("plain", [])}
    for name, rows in found.items():
        median = lambda key, rows=rows: statistics.median(row[key] for row in rows)
        less = lambda key, rows=rows: [row[key] - plain[row["seed"]] for row in rows if row["seed"] in plain]
        spread = lambda d: f"{statistics.median(d):+.4f} ({min(d):+.4f} to {max(d):+.4f})" if d else "-"
        lines.append(
            f"| {name} | {median('loss'):.4f} | {spread(less('loss'))} | {spread(less('at_equal_flops'))} | "
            f"{rows[0]['flops']:.3f} | {median('growth'):.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    names = sorted(found, key=lambda name: statistics.median(row["loss"] for row in found[name]))
    for i, name in enumerate(names):
        left.plot([row["loss"] for row in found[name]], [i] * len(found[name]), "o", ms=4, color="tab:blue")
        left.plot(
            [row["at_equal_flops"] for row in found[name]], [i + 0.25] * len(found[name]), "x", ms=4, color="tab:red"
        )
        curve = np.mean([row["training"] for row in found[name]], axis=0)
        right.plot(np.arange(1, len(curve) + 1) / len(curve), curve, label=name, lw=1)
    left.set_yticks(range(len(names)), names, fontsize=7)
    left.set(xlabel="held-out loss, nats a byte: at the end (o), at equal FLOPs (x)")
    right.set(xlabel="part of the run", ylabel="training loss", ylim=(None, min(3.5, max(right.get_ylim()))))
    right.legend(fontsize=6)
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=48, help="a multiple of 4")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--steps", type=int, default=400, help="a multiple of 20")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="*", default=[], help="operators whose name has one of these in it; plain always"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    if options.steps % 20 or options.steps < 20:
        parser.error(f"--steps {options.steps} must be a multiple of 20")
    host_memory.settle()
    data = texts(options.length, options.rows, options.steps)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "depth_family.json"
    found = {}
    for name in FAMILY:
        if name != "plain" and options.only and not any(word in name for word in options.only):
            continue
        found[name] = one(name, options, data)
        about = {
            "date": datetime.date.today().isoformat(),
            "jax": jax.__version__,
            "device": jax.devices()[0].device_kind,
            "command": " ".join(
                ["python -m jaxpar.experiments.adaptive.depth_family", *(sys.argv[1:] if argv is None else argv)]
            ),
            "options": {key: value for key, value in vars(options).items() if key != "out"},
        }
        file.write_text(json.dumps({**about, "results": found}, indent=1))
        file.with_suffix(".md").write_text(table(found))
        plot(found, file.with_suffix(".png"))
    print(table(found))
    return found


if __name__ == "__main__":
    main()
