"""What exits cost the last layer, and what they gain: every scheme of exit losses on the same text.

Command:   python -m jaxpar.experiments.adaptive.exit_losses                  (8 layers, 400 steps, 2 seeds; 32 minutes beside other work)
           python -m jaxpar.experiments.adaptive.exit_losses --only calm deed  (schemes whose name has one of these in it)
           python -m jaxpar.experiments.adaptive.exit_losses --layers 24 --width 1024 --heads 16 --length 1024 --steps 20000   (on a GPU)
Expected:  results/exit_losses.json, .md and .png, written after each scheme. The papers find that the more weight early exits
           have the lower is their loss and the higher the last layer's (Elbayad et al. 2020, Table 1), and so it is here:
           inverse depth costs the last layer 0.045 nats a byte, CALM's weights 0.006. FREE's distance, made for models
           that are trained already, ruins one that begins (2.558; a tenth of it 1.937, none 1.889): it seems that the exit
           draws the layers before it to the last layer's states, until the layers behind it have nothing left to do.

A Llama on the built-in text with exits behind every second layer (FREE has one). All runs of a seed start from the same
parameters and see the same batches. Held-out loss in nats a byte behind each exit and behind the last layer; the plain model
is read behind the same layers with the last layer's head, which it was not trained for.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

from jaxpar import host_memory
from jaxpar.experiments.adaptive import exiting
from jaxpar.experiments.small import texts
from jaxpar.models.exits.config import Adapter, Calm, Deed, EeLlm, Exits, Free, LayerSkip, OwnNorm
from jaxpar.skipping.layer_skip import LayerSkipDropout
from jaxpar.skipping.transform import skipping


def schemes(layers: int, steps: int) -> dict[str, tuple[Exits, tuple]]:
    """By name: the exits, and what is skipped."""
    at = tuple(range(2, layers, 2))
    middle = (at[len(at) // 2],)
    dropout = skipping(LayerSkipDropout(4, rate=0.1, ramp=max(steps, 2)), layers)
    return {
        "no exits": (Exits(), ()),
        "CALM (weights by depth)": (Exits(at, loss=Calm(1.0)), ()),
        "equal weights": (Exits(at, loss=Calm(0.0)), ()),
        "inverse depth": (Exits(at, loss=Calm(-1.0)), ()),
        "DEED, adapters": (Exits(at, Adapter(32), Deed()), ()),
        "EE-LLM, own norms": (Exits(at, OwnNorm(), EeLlm((0.25,))), ()),
        "EE-LLM, cool-down": (Exits(at, OwnNorm(), EeLlm((0.25,), "cool_down", steps)), ()),
        "LayerSkip": (Exits(at, loss=LayerSkip()), (dropout,)),
        "LayerSkip, rotational": (Exits(at, loss=LayerSkip(curriculum="rotational", period=len(at))), (dropout,)),
        "LayerSkip, gradual": (Exits(at, loss=LayerSkip(curriculum="gradual", over=max(steps // 2, 1))), (dropout,)),
        "FREE, one exit": (Exits(middle, OwnNorm(), Free()), ()),
        "FREE, distance by a tenth": (Exits(middle, OwnNorm(), Free(distill=0.1)), ()),
        "FREE, no distance": (Exits(middle, OwnNorm(), Free(distill=0.0)), ()),
    }


def table(found: dict, at: tuple[int, ...]) -> str:
    lines = ["| scheme | " + " | ".join(f"behind {layer}" for layer in at) + " | last layer | last, less no exits' |"]
    lines.append("|---" * (len(at) + 3) + "|")
    plain = {row["seed"]: row["losses"][-1] for row in found.get("no exits", [])}
    for name, rows in found.items():
        column = lambda i, rows=rows: statistics.median(row["losses"][i] for row in rows)
        less = [row["losses"][-1] - plain[row["seed"]] for row in rows if row["seed"] in plain]
        spread = f"{statistics.median(less):+.4f} ({min(less):+.4f} to {max(less):+.4f})" if less else "-"
        cells = " | ".join(f"{column(i):.3f}" for i in range(len(at) + 1))
        lines.append(f"| {name} | {cells} | {spread} |")
    return "Held-out loss in nats a byte, median of the seeds.\n\n" + "\n".join(lines) + "\n"


def plot(found: dict, at: tuple[int, ...], layers: int, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, rows in found.items():
        each = [statistics.median(row["losses"][i] for row in rows) for i in range(len(at) + 1)]
        axes.plot([*at, layers], each, marker="o", ms=3, lw=1, label=name)
    worst = max(row["losses"][-1] for rows in found.values() for row in rows)
    axes.set(xlabel="read behind layer", ylabel="held-out loss, nats a byte", ylim=(None, worst + 1.0))
    axes.legend(fontsize=6)
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> dict:
    parser = exiting.arguments(__doc__, seeds=2, steps=400, width=64, length=64)
    parser.add_argument("--only", nargs="*", default=[], help="schemes whose name has one of these in it; none always")
    options = parser.parse_args(argv)
    if options.layers < 4 or options.layers % 2:
        parser.error(f"--layers {options.layers} must be even and at least 4: exits are behind every second layer")
    host_memory.settle()
    data = texts(options.length, options.rows, options.steps)
    found: dict[str, list] = {}
    for name, (exits, more) in schemes(options.layers, options.steps).items():
        if name != "no exits" and options.only and not any(word.lower() in name.lower() for word in options.only):
            continue
        cfg = exiting.model(options, data, exits)
        runs = exiting.training(cfg, data, options, more)
        at = tuple(range(2, options.layers, 2))
        for seed in range(options.seeds):
            start = time.perf_counter()
            params, _ = exiting.trained(runs, options, seed)
            row = {
                "seed": seed,
                "seconds": time.perf_counter() - start,
                "losses": exiting.losses(cfg, params, data, at),
            }
            found.setdefault(name, []).append(row)
            print(
                f"{name}, seed {seed}: {' '.join(f'{x:.3f}' for x in row['losses'])} in {row['seconds']:.0f} s",
                flush=True,
            )
        file = options.out / "exit_losses.json"
        exiting.written("adaptive.exit_losses", argv, options, {"at": at, "schemes": found}, file)
        file.with_suffix(".md").write_text(table(found, at))
        plot(found, at, options.layers, file.with_suffix(".png"))
    print(table(found, at))
    return found


if __name__ == "__main__":
    main()
