"""What an operator over depth costs a training step: time and memory beside the plain residual stream, at three depths.

Command:   python -m jaxpar.experiments.bench.depth_mixers
           python -m jaxpar.experiments.bench.depth_mixers --layers 4 --width 64 --rounds 3 --only "deep delta"   (a minute)
           python -m jaxpar.experiments.bench.depth_mixers --layers 16 --width 2048 --heads 16 --length 2048 --rows 4 \
             --dtype bfloat16 --remat dots --only "deep delta" "block attention"                                  (on a GPU)
Expected:  a table, and results/depth_mixers_<platform>.json with a plot. The goal for block attention residuals and for the
           scalar delta rule is 1.08 of the plain step at 16 layers; at width 256 they took 1.067 (1.052 to 1.073
           in three runs) and 1.062 on two CPU cores, at width 2048 1.116 and 1.070 on an H200 (an earlier version).

The whole step of a Llama (forward, backward, clipping, AdamW; the state donated), scanned over layers. A round runs one step of
each operator; quoted are the medians over rounds of the ratio to the plain step of the same round, of time and of processor
time, and the ratios of the compiled steps' temporary bytes and of what a pipeline would send from stage to stage. "again" is the
plain step against a second copy of itself: how much of a ratio is noise.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from jaxpar import host_memory
from jaxpar.experiments.bench.paired import rounds_of, stepping

RESULTS = Path(__file__).resolve().parent / "results"


def mixers() -> dict:
    from jaxpar.models.residual.attention_residuals import AttentionResiduals
    from jaxpar.models.residual.cross_attention import DeepCrossAttention
    from jaxpar.models.residual.deep_delta import DeepDelta
    from jaxpar.models.residual.dense_former import DenseFormer
    from jaxpar.models.residual.depth_window import DepthWindow
    from jaxpar.models.residual.hyper_connections import HyperConnections
    from jaxpar.models.residual.manifold import ManifoldHyperConnections
    from jaxpar.models.residual.mudd import MuddFormer
    from jaxpar.models.residual.plain import Plain
    from jaxpar.models.residual.short_window import ShortWindow

    return {
        "plain": Plain(),
        "again": Plain(),
        "deep delta": DeepDelta(),
        "block attention residuals": AttentionResiduals(block=8),
        "full attention residuals": AttentionResiduals(),
        "hyper-connections": HyperConnections(),
        "mHC": ManifoldHyperConnections(),
        "DenseFormer": DenseFormer(),
        "DenseFormer, 4 and 4": DenseFormer(dilation=4, period=4),
        "MUDDFormer": MuddFormer(),
        "DeepCrossAttention, latest 2": DeepCrossAttention(latest=2),
        "window over depth": DepthWindow(),
        "short window": ShortWindow(),
        "deep delta, 4 channels over tokens": DeepDelta(channels=4, compressor="tokens", embedding="convolution"),
    }


def study(options) -> Iterator[dict]:
    """What has been measured, after each depth."""
    from jaxpar.presets import llama

    chosen = {
        name: mixer
        for name, mixer in mixers().items()
        if name in ("plain", "again") or not options.only or any(word in name for word in options.only)
    }
    found = {}
    for layers in options.layers:
        made, sent = {}, {}
        for name, mixer in chosen.items():
            cfg = llama(
                layers,
                options.width,
                options.heads,
                vocabulary=320,
                context=options.length,
                dtype=options.dtype,
                remat=options.remat,
                residual=mixer,
            )
            made[name] = stepping(cfg, options.rows)
            sent[name] = mixer.wire_bytes(cfg, options.rows, options.length)
        timed = rounds_of({name: run for name, (run, _) in made.items()}, options.rounds)
        plain = made["plain"][1]
        found[layers] = {
            name: {
                **row,
                "bytes": made[name][1],
                "bytes_ratio": made[name][1] / plain,
                "wire_bytes": sent[name],
                "wire_ratio": sent[name] / sent["plain"],
            }
            for name, row in timed.items()
        }
        print(f"{layers} layers: plain step {1e3 * timed['plain']['seconds']:.0f} ms", flush=True)
        yield found


def table(found: dict) -> str:
    lines = ["time, processor (memory), wire".ljust(36) + "".join(f"{n} layers".rjust(24) for n in found)]
    for name in next(iter(found.values())):
        cells = (
            "{ratio:.3f}, {processor_ratio:.3f} ({bytes_ratio:.2f}), {wire_ratio:.0f}".format(**row[name])
            for row in found.values()
        )
        lines.append(name.ljust(36) + "".join(cell.rjust(24) for cell in cells))
    return "\n".join(lines)


def plot(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for name in next(iter(found.values())):
        for ax, key in zip(axes, ("ratio", "bytes_ratio"), strict=True):
            ax.plot(list(found), [row[name][key] for row in found.values()], marker="o", label=name)
    axes[0].set(xlabel="layers", ylabel="seconds of a step over the plain one's")
    axes[1].set(xlabel="layers", ylabel="temporary bytes over the plain step's")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[4, 8, 16])
    parser.add_argument("--width", type=int, default=128, help="a multiple of twice the heads")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the computation")
    parser.add_argument("--remat", choices=["none", "dots", "full"], default="none", help="what layers compute again")
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind that are counted")
    parser.add_argument("--only", nargs="*", default=[], help="operators whose name has one of these in it")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    host_memory.settle()
    import jax

    given = sys.argv[1:] if argv is None else argv
    about = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "command": shlex.join(["python", "-m", "jaxpar.experiments.bench.depth_mixers", *given]),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"depth_mixers_{jax.default_backend()}.json"
    for found in study(options):
        # A long run that is cut keeps what it has measured.
        file.write_text(json.dumps({**about, "results": found}, indent=1))
    print(table(found))
    plot(found, file.with_suffix(".png"))
    return found


if __name__ == "__main__":
    main()
