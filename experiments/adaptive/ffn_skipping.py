"""Skipping feed-forward layers against skipping whole layers: loss and next-token agreement against what is left out.

Command:   python -m jaxpar.experiments.adaptive.ffn_skipping                       (16 layers, width 64, trained here)
           python -m jaxpar.experiments.adaptive.ffn_skipping --layers 8 --steps 150    (a few minutes)
           python -m jaxpar.experiments.adaptive.ffn_skipping --model gemma-3-270m.gguf --rows-read 8 --length 128
Expected:  results/ffn_skipping.json (or _loaded), .md and .png, 3 to 5 minutes. By cosine a quarter of the feed-forward layers
           costs 0.02 nats; a fifth of whole layers 0.14 and more, with masked keys most. Gemma 3 270M bears neither: 6 % of its
           feed-forward layers by cosine cost 0.7 nats, 17 % 2.6 (19 minutes beside other work). The paper: LLaMA-2 bears 25 % of its
           feed-forward layers left out, and collapses with 10 to 15 % of whole layers.

    ffn, cosine     FFN-SkipLLM (Jaiswal et al. 2024): the two feed-forward layers behind one whose cosine is above a threshold;
                    thresholds are quantiles of the cosines that the whole model has here
    ffn, random     each token leaves out each feed-forward layer by chance
    ffn, fixed      the same feed-forward layers for every token: the last ones but one
    layer, random   whole layers by chance; keys and values of what is left out: made from the stream as it is (propagate), masked
                    (mask), or those of the whole model (recompute: exact, and it costs the whole model once more)
    layer, fixed    the same layers for every token, with the same three remedies

Texts are given, and each token's next one is asked for: as decisions look at one token alone, this is what decoding sees, position by
position. The first tokens of a row run whole. FLOPs are those of a decoding step's layers for one row, where what is left out
does not run (`tests/models/routing` counts it); several rows at once would save less (see "spared" of `jaxpar generate`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar import flops, host_memory
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.context import Context
from jaxpar.models.routing.oracle import token_losses
from jaxpar.models.routing.record import Skip
from jaxpar.models.routing.skip import FFNSkip, FixedSkip, RandomSkip

RESULTS = Path(__file__).resolve().parent / "results"


def trained(options):
    """A model trained here, and held-out tokens [N, T + 1]."""
    from jaxpar.experiments.adaptive.duo import rows_of_one_document
    from jaxpar.experiments.small import Runs, controls, texts
    from jaxpar.optimisers_config import AdamW, WarmupCosine
    from jaxpar.presets import llama
    from jaxpar.steps.clip import clip_global

    data = texts(options.length, 16, options.steps, held_out=8)
    cfg = llama(options.layers, options.width, 4, context=options.length + 1, vocabulary=data.vocabulary)
    runs = Runs(cfg, AdamW(schedule=WarmupCosine(options.rate)), data, options.steps, (clip_global(1.0),))
    ((state, metrics),) = runs.train(runs.start(options.seed), controls(options.steps, 16), options.steps)
    print(f"trained {options.steps} steps, last loss {np.mean(metrics['loss'][-20:]):.3f}", flush=True)
    tokens, targets = rows_of_one_document(data.held_out)
    return cfg, state.params, np.concatenate([tokens, targets[:, -1:]], 1)[: options.rows_read]


def loaded(options):
    """A model that is there, and a text's tokens [N, T + 1]."""
    from jaxpar.loading import load

    model = load(options.model)
    ids = model.encode(Path(options.text).read_text(encoding="utf-8"))
    size = options.length + 1
    rows = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)][: options.rows_read]
    return model.cfg, model.params, np.array(rows, np.int32)


@partial(jax.jit, static_argnums=(0, 1))
def at_once(cfg, policy, params, inputs_BxT, active):
    """Logits [B, T, V] and the record, every token in one pass."""
    ctx = Context(skip=Skip(active, policy))
    state, aux = decoder.through(cfg, params, decoder.embed(cfg, params, inputs_BxT, ctx), ctx)
    return decoder.head(cfg, params, state, ctx), aux.record


@partial(jax.jit, static_argnums=(0, 1))
def recomputed(cfg, policy, params, inputs_BxT, active_BxT):
    """The same token by token, where every earlier token's keys and values are those of the whole model."""

    def step(cache, x):
        token_B, active_B = x
        ctx = Context(cache=cache, skip=Skip(active_B[:, None], policy))
        logits, _, aux = decoder.advance(cfg, params, token_B[:, None], ctx)
        _, cache = decoder.forward(cfg, params, token_B[:, None], cache)
        return cache, (logits[:, 0], aux.record.skipped[:, 0])

    cache = kv.empty(cfg, *inputs_BxT.shape)
    _, (logits, skipped) = jax.lax.scan(step, cache, (inputs_BxT.T, active_BxT.T))
    return jnp.swapaxes(logits, 0, 1), skipped.T


def costs(cfg, length: int) -> dict[str, float]:
    """FLOPs of one token's layer in decoding behind `length / 2` tokens, by part."""
    D, H, G, K = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_size
    scores = 4 * H * K * length / 2
    return {
        "feedforward": float(cfg.feedforward.flops(cfg)),
        "keys": 4.0 * D * G * K,
        "layer": flops.forward(cfg, length).projections / cfg.layers + scores + cfg.feedforward.flops(cfg),
    }


def cases(cfg, options, cosines):
    """(name, remedy or "", policy)."""
    ends = dict(first=options.first, last=options.last, warmup=options.warmup)
    free = cfg.layers - options.first - options.last
    inner = cosines[options.first : cfg.layers - options.last]
    for quantile in options.quantiles:
        threshold = min(float(np.quantile(inner, quantile)), 1.0)
        yield "ffn, cosine", "", FFNSkip(threshold=threshold, run=options.run, **ends)
    for share in options.shares:
        fixed = max(1, round(share * free))
        yield "ffn, random", "", RandomSkip(share=share, **ends)
        yield "ffn, fixed", "", FixedSkip(layers=fixed, **ends)
        for remedy in ("propagate", "mask", "recompute"):
            keys = "propagate" if remedy == "recompute" else remedy
            yield "layer, random", remedy, RandomSkip(share=share, site="layer", keys=keys, **ends)
            yield "layer, fixed", remedy, FixedSkip(layers=fixed, site="layer", keys=keys, **ends)


def study(options) -> dict:
    cfg, params, tokens = loaded(options) if options.model else trained(options)
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    active = jnp.broadcast_to(jnp.arange(inputs.shape[1]) >= options.warmup, inputs.shape)
    counted = np.asarray(active)
    never = FFNSkip(threshold=1.0, first=options.first, last=options.last)
    logits, record = at_once(cfg, never, params, inputs, jnp.zeros_like(active))
    whole = np.asarray(logits.argmax(-1))
    loss = float(np.asarray(token_losses(logits, targets))[counted].mean())
    cosines = np.asarray(record.cosines)
    cost, rows = costs(cfg, options.length), []
    for name, remedy, policy in cases(cfg, options, cosines[:, counted]):
        if remedy == "recompute":
            logits, skipped = recomputed(cfg, policy, params, inputs, active)
        else:
            logits, record = at_once(cfg, policy, params, inputs, active)
            skipped = record.skipped
        share = float(np.asarray(skipped)[counted].mean()) / cfg.layers
        per_part = {"": cost["feedforward"], "propagate": cost["layer"] - cost["keys"], "mask": cost["layer"]}
        # With the whole model run for its keys too, nothing is saved: the skipping pass comes on top.
        saved = share * per_part[remedy] / cost["layer"] if remedy != "recompute" else None
        row = {
            "what": name,
            "remedy": remedy,
            "policy": {**vars(policy)},
            "share": share,
            "flops saved": saved,
            "loss": float(np.asarray(token_losses(logits, targets))[counted].mean()),
            "agreement": float((np.asarray(logits.argmax(-1)) == whole)[counted].mean()),
        }
        rows.append(row)
        print(
            f"{name} {remedy}: left out {share:.3f}, loss {row['loss']:.3f}, agreement {row['agreement']:.3f}",
            flush=True,
        )
    profile = [{"mean": float(x.mean()), "least": float(x.min())} for x in cosines[:, counted]]
    return {"layers": cfg.layers, "loss": loss, "rows": rows, "cosines": profile}


def table(found: dict) -> str:
    lines = [
        f"whole model: {found['loss']:.3f} nats a token; mean cosine by layer: "
        + ", ".join(f"{x['mean']:.3f}" for x in found["cosines"]),
        "",
        "| what | keys and values | left out of all | layers' FLOPs saved | loss | agreement |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(found["rows"], key=lambda row: (row["what"], row["remedy"], row["share"])):
        saved = "none" if row["flops saved"] is None else f"{row['flops saved']:.3f}"
        numbers = f"{row['share']:.3f} | {saved} | {row['loss']:.3f} | {row['agreement']:.3f}"
        lines.append(f"| {row['what']} | {row['remedy'] or 'all there'} | {numbers} |")
    return "\n".join(lines) + "\n"


def plot(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5))
    kinds = sorted({(row["what"], row["remedy"]) for row in found["rows"]})
    for what, remedy in kinds:
        mine = sorted(
            (row for row in found["rows"] if (row["what"], row["remedy"]) == (what, remedy)), key=lambda r: r["share"]
        )
        for ax, key in zip(axes, ("loss", "agreement"), strict=True):
            ax.plot([r["share"] for r in mine], [r[key] for r in mine], marker="o", label=f"{what} {remedy}".strip())
    axes[0].axhline(found["loss"], color="grey", linewidth=0.8)
    axes[0].set(xlabel="share left out", ylabel="loss (nats a token)")
    axes[1].set(xlabel="share left out", ylabel="next token as the whole model's")
    axes[1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a model to load: a run's folder, a Hugging Face folder, a .gguf file")
    parser.add_argument("--text", default=argparse.__file__, help="the text that a loaded model reads")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rows-read", type=int, default=32, help="rows of text that are read")
    parser.add_argument("--first", type=int, default=2, help="layers at the start that always run")
    parser.add_argument("--last", type=int, default=1, help="layers at the end that always run")
    parser.add_argument("--warmup", type=int, default=6, help="tokens of a row that run whole")
    parser.add_argument("--run", type=int, default=2, help="feed-forward layers left out behind a redundant one")
    parser.add_argument("--quantiles", type=float, nargs="*", default=[0.95, 0.8, 0.6, 0.3, 0.0])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.1, 0.25, 0.5])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    host_memory.settle()
    found = study(options)
    print(table(found))
    about = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "command": " ".join(
            ["python -m jaxpar.experiments.adaptive.ffn_skipping", *(sys.argv[1:] if argv is None else argv)]
        ),
        "options": {name: value for name, value in vars(options).items() if name not in ("out", "text", "model")},
    }
    name = "ffn_skipping_loaded" if options.model else "ffn_skipping"
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{name}.json").write_text(json.dumps({**about, "results": found}, indent=1))
    (options.out / f"{name}.md").write_text(table(found))
    plot(found, options.out / f"{name}.png")
    return found


if __name__ == "__main__":
    main()
