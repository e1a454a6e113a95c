"""A trained model cast to every number format without further training: loss, and distance of its predictions.

Command:   python -m jaxpar.experiments.formats.direct_cast                  (a model trained here)
           python -m jaxpar.experiments.formats.direct_cast --model gemma    (Gemma 3 270M: needs the extra `gemma`)
Expected:  results/direct_cast.json, .md and .png (direct_cast_gemma.* with --model gemma), 4 minutes. Integers lose least at 8
           bits, floats at 4; KL tells formats apart where the loss of so small a model does not. --model gemma --rows 4: 12
           minutes (beside other work); 8 bits cost next to nothing, the number formats of 4 bits 0.7 to 3.6 nats, w4ax 0.5.

Weights and activations of every product of the layers are rounded along what the product sums over, as they are and after a
Hadamard rotation of blocks of 16 or 32 (INT v.s. FP, arXiv 2510.25602, section 5.1); then COMET's ways (arXiv 2410.12168):
w8a8, w4a16, w4a4, and w4ax with its share of multiplications in 4 bits, each also with keys and values in 4 bits.

    loss   of held-out text, in nats a token
    KL     Σ p (log p - log q) a token, p the unrounded model's prediction: 0 where nothing is lost

Gemma's weights were in 4 to 8 bits in their file (Q4_K_M): what is lost here is lost on top of that.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar import host_memory
from jaxpar.experiments.formats import qsnr
from jaxpar.experiments.small import Runs, controls, texts
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.context import Context, Ops
from jaxpar.optimisers_config import AdamW, Constant
from jaxpar.pallas_kernels.formats import get
from jaxpar.presets import llama
from jaxpar.quantise.choose import parse
from jaxpar.quantise.fmpq import Fmpq, share_of_four
from jaxpar.quantise.training import Quantise

RESULTS = Path(__file__).resolve().parent / "results"
CASTS = ("mxint8", "mxfp8", "mxint6", "mxfp6", "mxint4", "mxfp4", "nvint4", "nvfp4")
COMET = ("w8a8", "w4a16", "w4a4", "w4ax")
CACHE = "kv4"


def trained(options):
    """`(config, parameters, tokens to find outliers on, held-out tokens)` of a model trained here."""
    data = texts(options.length, options.rows, min(options.steps, 512))
    cfg = llama(options.layers, options.width, options.heads, vocabulary=data.vocabulary, context=options.length)
    runs = Runs(cfg, AdamW(schedule=Constant(3e-3)), data, options.steps)
    *_, (state, _) = runs.train(runs.start(0), controls(options.steps, data.rows), options.steps)
    held_out = np.asarray(data.held_out.tokens).reshape(-1, options.length)
    return cfg, state.params, np.asarray(data.train.tokens[0]), held_out[: options.rows]


def given(options):
    """The same of a model that is there: the two ends of a text."""
    cfg, params, ids = qsnr.model(options.model, options.folder)
    cut = lambda ids: ids[: options.rows * options.length].reshape(-1, options.length)
    if len(ids) < 2 * options.rows * options.length:
        raise SystemExit(f"the text has {len(ids)} tokens; give fewer --rows or a smaller --length")
    return cfg, params, cut(ids[options.rows * options.length :]), cut(ids)


def cases(options) -> dict[str, tuple[Any, str | None]]:
    """What is done to the model, and the cache's format, by the name of the row."""
    found = {}
    for name in options.casts:
        found[name] = (Quantise(name, "none"), None)
        if not options.plain:
            found[f"{name}, rotated"] = (Quantise(name, "none", rotate=get(name).block), None)
    for name in options.comet:
        # Groups that divide every dimension of a small model.
        words = name.replace("w4", f"w4g{options.group}")
        for cached in ("", CACHE):
            how = parse(words + (f"{cached}g{options.cache_group}" if cached else ""))
            found[name + cached] = (how, how.cache)
    return found


@partial(jax.jit, static_argnums=(0, 3, 4))
def log_probabilities(cfg, params, tokens_BxT, ops, form):
    """float32 [B, T, V]; through a cache, which rounds keys and values, where it has a format."""
    if form is None:
        logits = decoder.apply(cfg, params, tokens_BxT, Context(ops=ops)).logits
    else:
        cache = kv.empty(cfg, *tokens_BxT.shape, form=form)
        logits, _ = decoder.forward(cfg, params, tokens_BxT, cache, ops=ops)
    return jax.nn.log_softmax(logits)


def compare(cfg, params, tokens, ops, form, truth) -> dict[str, float]:
    """Loss and KL, row by row so that one row's predictions are there at a time."""
    losses, distances = [], []
    for row, p in zip(tokens, truth, strict=True):
        q = log_probabilities(cfg, params, row[None], ops, form)[0]
        losses.append(-float(jnp.take_along_axis(q[:-1], jnp.asarray(row[1:, None]), axis=1).mean()))
        distances.append(float((jnp.exp(p) * (p - q)).sum(axis=-1).mean()))
    return {"loss": float(np.mean(losses)), "kl": float(np.mean(distances))}


def study(options) -> dict[str, Any]:
    cfg, params, seen, tokens = trained(options) if options.model == "trained" else given(options)
    truth = [log_probabilities(cfg, params, row[None], Ops(), None)[0] for row in tokens]
    results = {"unrounded": compare(cfg, params, tokens, Ops(), None, truth)}
    for name, (how, form) in cases(options).items():
        share = None
        if isinstance(how, Quantise):
            own, ops = params, how.ops(Ops())
        elif isinstance(how, Fmpq):
            own, eight = how.apply(cfg, params, [seen])
            ops, share = how.ops(Ops()), share_of_four(cfg, eight)
        else:
            own, ops = how.apply(cfg, params), how.ops(Ops())
        results[name] = {**compare(cfg, own, tokens, ops, form, truth), "four": share}
        print(table({"results": {name: results[name]}}).splitlines()[-1], flush=True)
    return {
        "model": options.model, "layers": cfg.layers, "width": cfg.width, "tokens": int(tokens.size), "results": results,
    }  # fmt: skip


def table(found: dict) -> str:
    lines = ["| cast | loss | perplexity | KL | multiplications in 4 bits |", "|---|---|---|---|---|"]
    for name, row in found["results"].items():
        share = "-" if row.get("four") is None else f"{100 * row['four']['all']:.1f} %"
        lines.append(f"| {name} | {row['loss']:.4f} | {np.exp(row['loss']):.3f} | {row['kl']:.2e} | {share} |")
    return "\n".join(lines) + "\n"


def plot(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [(name, row["kl"]) for name, row in found["results"].items() if row["kl"] > 0 and name != "unrounded"]
    colours = [
        "tab:orange" if "fp" in name else "tab:green" if name.startswith("w") else "tab:blue" for name, _ in rows
    ]
    figure, ax = plt.subplots(figsize=(7, 0.28 * len(rows) + 1))
    ax.barh([name for name, _ in rows], [kl for _, kl in rows], color=colours)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="KL to the unrounded model, nats a token", title=found["model"])
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default="trained", help="trained (here), gemma, or a Hugging Face folder or GGUF file"
    )
    parser.add_argument("--casts", nargs="*", default=list(CASTS), help="number formats")
    parser.add_argument("--comet", nargs="*", default=list(COMET), choices=COMET)
    parser.add_argument("--plain", action="store_true", help="without rotations")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--group", type=int, default=32, help="values of a group with a scale, and of FMPQ's blocks")
    parser.add_argument("--cache-group", type=int, default=32, help="the same of keys and values")
    parser.add_argument(
        "--folder", type=Path, default=Path.home() / ".cache" / "jaxpar", help="where Gemma's file is put together"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    host_memory.settle()
    for folder in (options.folder, options.out):
        folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found = study(options)
    words = sys.argv[1:] if argv is None else argv
    found = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "command": " ".join(["python -m jaxpar.experiments.formats.direct_cast", *words]),
        "seconds": time.perf_counter() - start,
        **found,
    }
    name = "direct_cast_gemma" if options.model == "gemma" else "direct_cast"
    (options.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(table(found))
    plot(found, options.out / f"{name}.png")
    print(table(found))
    return found


if __name__ == "__main__":
    main()
