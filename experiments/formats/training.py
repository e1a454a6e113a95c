"""Training with every product of the layers in few bits, forwards and backwards: what the loss and the gradient lose.

Command:   python -m jaxpar.experiments.formats.training
           python -m jaxpar.experiments.formats.training --width 512 --layers 12 --length 512 --rows 32 --steps 5000   (on a GPU)
Expected:  results/training.json, .md and .png; 18 minutes (beside other work, on two cores). At this size 8 and 6 bits lose nothing
           and 4-bit MX 1.5 to 3.3 %; without symmetric clipping blocks hold -128, and the gradient's bias is no larger for it.

A Llama on the built-in text. Operands of the forward product and of both backward products are quantised along what each
sums over, parameters and the optimiser are float32, gradients pass straight through (INT v.s. FP, arXiv 2510.25602, section
4; there 1B and 3B parameters and 100B tokens and more). For each format, with the same seeds:

    loss       held-out loss at the end, the mean of seeds, and its difference to float32's in per cent
    gradient   of the float32 run's last parameters, beside float32's gradient g: the error |q - g| / |g|, and the bias
               <q - g, g> / <g, g>: what is lost in g's own direction, which no average over steps takes away
    extreme    the share of blocks of these gradients' and activations' operands that hold -2^(bits-1), which symmetric
               clipping never gives

`-ocp` rounds scales down, as the OCP specification has it, so that the largest values of many blocks saturate: to ±127 where
clipping is symmetric, and to +127 and -128 where it is not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar import host_memory
from jaxpar.experiments.small import Runs, controls, texts
from jaxpar.models import context, decoder
from jaxpar.models.context import Context, Ops
from jaxpar.optimisers_config import AdamW, Constant
from jaxpar.pallas_kernels.formats import get, quantise
from jaxpar.pallas_kernels.formats.elements import Int
from jaxpar.pallas_kernels.formats.packing import unpack
from jaxpar.presets import llama
from jaxpar.quantise.training import Quantise

RESULTS = Path(__file__).resolve().parent / "results"
FORMATS = {
    "float32": None,
    "mxint8": Quantise("mxint8"),
    "mxint8-ocp": Quantise("mxint8-ocp"),
    "mxint8-ocp, asymmetric": Quantise("mxint8-ocp", symmetric=False),
    "mxfp8": Quantise("mxfp8"),
    "mxint6": Quantise("mxint6"),
    "mxfp6": Quantise("mxfp6"),
    "mxint4": Quantise("mxint4"),
    "mxfp4": Quantise("mxfp4"),
    "nvint4": Quantise("nvint4"),
    "nvfp4": Quantise("nvfp4"),
}


def train(how: Quantise | None, cfg, data, options) -> tuple[list[float], list[float], Any]:
    """Held-out losses, one a seed; the first seed's training losses; its parameters."""
    runs = Runs(cfg, AdamW(schedule=Constant(options.rate)), data, options.steps, quantise=how)
    held_out, curve, kept = [], [], None
    for seed in range(options.seeds):
        for state, metrics in runs.train(runs.start(seed), controls(options.steps, data.rows), options.steps):
            held_out.append(runs.held_out(state.params))
            if seed == 0:
                curve, kept = [float(x) for x in metrics["loss"]], state.params
    return held_out, curve, kept


def gradients(cfg, params, batch, how: Quantise | None) -> np.ndarray:
    """The gradient of the mean loss by the layers' parameters, as one float64 vector."""
    ops = Ops() if how is None else how.ops(Ops())

    def loss(layers):
        sums = decoder.loss(
            cfg, {**params, "layers": layers}, batch.tokens, batch.targets, batch.weights, Context(ops=ops)
        )
        return sums.loss_sum / sums.weight_sum

    found = jax.jit(jax.grad(loss))(params["layers"])
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(found)])


def extremes(cfg, params, batch, name: str) -> float | None:
    """The share of blocks of the forward products' operands that hold the code of -2^(bits-1); None for floats."""
    fmt = get(name)
    if not isinstance(fmt.element, Int):
        return None
    code, found = 2 ** (fmt.element.bits - 1), []

    def matmul(x, w, contract: int = 1):
        inner = int(np.prod(w.shape[:contract]))
        for operand, axis in ((x.reshape(-1, inner), -1), (w.reshape(inner, -1), -2)):
            q = quantise(operand, fmt, axis)
            blocks = jnp.moveaxis(unpack(q.codes, fmt.stored_bits, axis), axis, -1).reshape(-1, fmt.block)
            found.append(((blocks == code).any(axis=1).sum(), blocks.shape[0]))
        return context.matmul(x, w, contract)

    def run(params):
        found.clear()
        ctx = Context(ops=replace(Ops(), matmul=matmul))
        looped = cfg.replace(layer_loop="unroll")
        decoder.through(looped, params, decoder.embed(looped, params, batch.tokens, ctx), ctx)
        return sum(hits for hits, _ in found) / sum(blocks for _, blocks in found)

    return float(jax.jit(run)(params))


def study(options) -> dict[str, Any]:
    data = texts(options.length, options.rows, min(options.steps, 512))
    cfg = llama(options.layers, options.width, options.heads, vocabulary=data.vocabulary, context=options.length)
    cfg = cfg.replace(layer_loop="unroll") if options.layers <= 4 else cfg
    batch = jax.tree.map(lambda x: x[0], data.held_out)
    results, params, g = {}, None, None
    for name in ["float32", *(name for name in options.formats if name != "float32")]:
        how, start = FORMATS[name], time.perf_counter()
        losses, curve, found = train(how, cfg, data, options)
        row = {
            "losses": losses,
            "loss": statistics.fmean(losses),
            "curve": curve,
            "seconds": time.perf_counter() - start,
        }
        if how is None:
            params, g = found, gradients(cfg, found, batch, None)
        else:
            q = gradients(cfg, params, batch, how)
            row |= {
                "error": float(np.linalg.norm(q - g) / np.linalg.norm(g)),
                "bias": float((q - g) @ g / (g @ g)),
                "extreme": extremes(cfg, params, batch, how.formats()[0].name),
            }
        row["worse"] = row["loss"] / results["float32"]["loss"] - 1 if results else 0.0
        results[name] = row
        print(table({"results": {name: row}}).splitlines()[-1], flush=True)
    return {
        "layers": cfg.layers,
        "width": cfg.width,
        "length": options.length,
        "steps": options.steps,
        "results": results,
    }


def table(found: dict) -> str:
    lines = [
        "| format | held-out loss | beside float32 | gradient's error | its bias | blocks with -2^(bits-1) |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in found["results"].items():
        percent = lambda key, row=row: "-" if row.get(key) is None else f"{100 * row[key]:.2f} %"
        lines.append(
            f"| {name} | {row['loss']:.4f} | {100 * row['worse']:+.2f} % | {percent('error')} | "
            f"{'-' if 'bias' not in row else format(100 * row['bias'], '+.3f') + ' %'} | {percent('extreme')} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    for name, row in found["results"].items():
        curve = np.asarray(row["curve"])
        width = max(1, len(curve) // 25)
        smooth = np.convolve(curve, np.ones(width) / width, "valid")
        axes[0].plot(np.arange(len(smooth)) + width, smooth, label=name, linewidth=1)
    axes[0].set(xlabel="step", ylabel=f"training loss, mean of {width} steps", yscale="log")
    axes[0].legend(fontsize=7)
    rows = [(name, row) for name, row in found["results"].items() if "error" in row]
    axes[1].barh([name for name, _ in rows], [100 * row["worse"] for _, row in rows])
    axes[1].invert_yaxis()
    axes[1].set(xlabel="held-out loss beside float32 (%)")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    host_memory.settle()
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = study(options)
    found = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "command": " ".join(
            ["python -m jaxpar.experiments.formats.training", *(sys.argv[1:] if argv is None else argv)]
        ),
        "seconds": time.perf_counter() - start,
        **found,
    }
    (options.out / "training.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "training.md").write_text(table(found))
    plot(found, options.out / "training.png")
    print(table(found))
    return found


if __name__ == "__main__":
    main()
