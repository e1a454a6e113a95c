"""Duo-LLM: loss against the budget of big modules, for oracles, learned routers, fixed and random routes, and the null control.

Command:   python -m jaxpar.experiments.adaptive.duo                        (5 layers, width 64, 600 steps, 2 seeds; 4 minutes)
           python -m jaxpar.experiments.adaptive.duo --seeds 1 --steps 150  (a few minutes)
           python -m jaxpar.experiments.adaptive.duo --width 512 --layers 8 --steps 5000 --length 256    (on a GPU)
Expected:  results/duo.json, .md and .png. Oracles are below every fixed route by construction; the paper finds them far below, and
           routers near the best fixed route. At this size routers end at the best fixed route, and an oracle gains no more on
           its routes' mean (0.207 to 0.248 nats a byte at 1 to 3 of 5) than the null control on its copies' (0.197 to 0.259):
           what it gains is selection.

A Llama with a small (1/16) and a big feed-forward module in every layer is trained with a choice by chance for each token in each
layer (Alizadeh et al. 2024, stage 1). Then, on held-out text, for every budget of b big modules among the L layers:

    fixed       the best of all C(L, b) routes, the same for every token
    random      the mean of these routes
    oracle      token by token the lowest loss of the routes, each run on the whole text (uniform), or with the keys and values of
                the routes that earlier tokens took (sequential)
    null        token by token the lowest loss of as many noisy copies of the all-big model, whose losses of a token lie as far apart
                as the routes'. An oracle's gain on its routes' mean beside the null's on its copies' mean is what is more than
                selection
    router      a linear router a layer, trained with everything else frozen to the budget b / L (stage 3); hard choices, at
                the share of big modules that it then really uses

and the difficulty of tokens, all-small loss minus oracle loss, beside the all-small loss.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxpar import host_memory
from jaxpar.experiments.small import Runs, controls, texts
from jaxpar.models import decoder
from jaxpar.models.context import Context
from jaxpar.models.feedforward.duo import BIG, SMALL, Duo, with_routers
from jaxpar.models.routing import oracle
from jaxpar.optimisers_config import AdamW, WarmupCosine
from jaxpar.presets import llama
from jaxpar.steps.clip import clip_global

RESULTS = Path(__file__).resolve().parent / "results"


def study(options) -> dict:
    data = texts(options.length, options.rows, options.steps, held_out=options.held_out)
    cfg = llama(options.layers, options.width, 4, hidden=4 * options.width, context=options.length)
    cfg = cfg.replace(vocabulary=data.vocabulary, feedforward=Duo(small=options.small))
    optimiser = AdamW(schedule=WarmupCosine(options.rate))
    runs = Runs(cfg, optimiser, data, options.steps, (clip_global(1.0),))
    found = {}
    for seed in range(options.seeds):
        start, state = time.perf_counter(), runs.start(seed)
        ((state, metrics),) = runs.train(state, controls(options.steps, options.rows), options.steps)
        print(f"seed {seed}: trained, last loss {np.mean(metrics['loss'][-20:]):.3f}", flush=True)
        found[seed] = measured(cfg, state.params, data, options, seed)
        found[seed]["seconds"] = time.perf_counter() - start
    return found


losses_of = jax.jit(oracle.losses_of, static_argnums=0)
sequential = jax.jit(oracle.sequential, static_argnums=0)
perturbed = jax.jit(oracle.perturbed, static_argnames=("cfg", "models"))


def rows_of_one_document(batches):
    """Tokens and targets [N, T] of the rows in which every target counts and every token sees those before it."""
    flat = lambda x: np.asarray(x).reshape(-1, x.shape[-1])
    segments = flat(batches.segments)
    whole = (segments == segments[:, :1]).all(1) & (flat(batches.weights) > 0).all(1)
    return flat(batches.tokens)[whole], flat(batches.targets)[whole]


def fitted(copies, wanted: float, turns: int) -> float:
    """The noise at which copies lie so far apart."""
    return oracle.matched(lambda sigma: oracle.spread(copies(sigma=sigma)), wanted, turns=turns)


def measured(cfg, params, data, options, seed: int) -> dict:
    """All curves of one trained model."""
    L = cfg.layers
    tokens, targets = rows_of_one_document(data.held_out)
    mean = lambda losses: float(np.asarray(losses, np.float64).mean())
    every = np.asarray(losses_of(cfg, params, tokens, targets, oracle.routes(L)))
    bigs = (oracle.routes(L) == BIG).sum(1)
    some = slice(0, options.sequential_rows)
    rows, key = {}, jax.random.key(seed)
    for b in range(L + 1):
        mine = every[bigs == b]
        by_route = [mean(x) for x in mine]
        copies = partial(perturbed, cfg, params, tokens, targets, key=key, models=len(mine))
        sigma = fitted(copies, oracle.spread(mine), options.turns) if len(mine) > 1 else 0.0
        null = np.asarray(copies(sigma=sigma))
        one, _ = sequential(cfg, params, tokens[some], targets[some], oracle.routes(L, b))
        rows[b] = {
            "routes": len(mine),
            "fixed": min(by_route),
            "random": statistics.mean(by_route),
            "oracle, uniform": mean(mine.min(0)),
            "oracle, sequential": mean(one),
            "oracle, uniform, same rows": mean(mine.min(0)[some]),
            "null": mean(null.min(0)),
            "null, mean": mean(null),
            "gain": statistics.mean(by_route) - mean(mine.min(0)),
            "null gain": mean(null) - mean(null.min(0)),
            "sigma": sigma,
            "flops": b * cfg.feedforward.flops_of(cfg)[BIG] + (L - b) * cfg.feedforward.flops_of(cfg)[SMALL],
        }
        if 0 < b < L:
            rows[b] |= routed(cfg, params, data, options, b / L, (tokens, targets), mean, key)
        print(
            f"  b = {b}: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[b].items() if k not in ("flops", "sigma")),
            flush=True,
        )
    small, best = every[bigs == 0][0], every.min(0)
    hard = oracle.difficulty(small, best).ravel()
    return {
        "budgets": rows,
        "difficulty": {
            "mean": float(hard.mean()),
            "none": float((hard == 0).mean()),
            "of the hardest tenth": float(np.sort(hard)[-len(hard) // 10 :].sum() / max(hard.sum(), 1e-9)),
            "correlation with the loss": float(np.corrcoef(hard, small.ravel())[0, 1]),
        },
    }


def routed(cfg, params, data, options, budget: float, held_out, mean, key) -> dict:
    """Routers trained to a budget with all else frozen: held-out loss with hard choices, and the share of big modules."""
    cfg, params = with_routers(cfg, params, key, budget=budget, strength=options.strength)
    tx = optax.adam(options.router_rate)

    def with_router(router):
        feedforward = {**params["layers"]["feedforward"], "router": router}
        return {**params, "layers": {**params["layers"], "feedforward": feedforward}}

    def loss(router, batch):
        ctx = Context(batch.positions, batch.segments, key=key, sample_ids=batch.sample_ids)
        sums = decoder.loss(cfg, with_router(router), batch.tokens, batch.targets, batch.weights, ctx)
        return sums.loss_sum / sums.weight_sum

    @jax.jit
    def train(router):
        n = data.train.tokens.shape[0]

        def step(carry, i):
            router, state = carry
            batch = jax.tree.map(lambda x: x[i % n], data.train)
            value, grads = jax.value_and_grad(loss)(router, batch)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(router, updates), state), value

        return jax.lax.scan(step, (router, tx.init(router)), jnp.arange(options.router_steps))[0][0]

    router = train(params["layers"]["feedforward"]["router"])
    tokens, targets = held_out

    @jax.jit
    def evaluate(router):
        state, aux = decoder.through(cfg, with_router(router), decoder.embed(cfg, params, tokens, Context()), Context())
        logits = decoder.head(cfg, params, state, Context())
        return oracle.token_losses(logits, targets), jnp.mean(aux.tally.big / aux.tally.tokens)

    losses, share = evaluate(router)
    return {"router": mean(losses), "router, share": float(share)}


def table(found: dict) -> str:
    """Medians over seeds."""
    seeds = list(found.values())
    columns = (
        "fixed",
        "random",
        "router",
        "oracle, uniform",
        "gain",
        "null gain",
        "oracle, sequential",
        "oracle, uniform, same rows",
    )
    lines = ["| big of all | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for b in seeds[0]["budgets"]:
        rows = [seed["budgets"][b] for seed in seeds]
        cells = [f"{statistics.median(row[c] for row in rows):.3f}" if c in rows[0] else "-" for c in columns]
        if "router" in rows[0]:
            cells[2] += f" ({statistics.median(row['router, share'] for row in rows):.2f})"
        lines.append(f"| {b} of {len(seeds[0]['budgets']) - 1} | " + " | ".join(cells) + " |")
    hard = {k: statistics.median(seed["difficulty"][k] for seed in seeds) for k in seeds[0]["difficulty"]}
    lines += ["", "difficulty: " + ", ".join(f"{k} {v:.3f}" for k, v in hard.items())]
    return "\n".join(lines) + "\n"


def plot(found: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds = list(found.values())
    budgets = list(seeds[0]["budgets"])
    L = len(budgets) - 1
    figure, ax = plt.subplots(figsize=(7, 4.5))
    for name in ("random", "fixed", "null", "oracle, uniform"):
        ax.plot(
            [int(b) / L for b in budgets],
            [statistics.median(seed["budgets"][b][name] for seed in seeds) for b in budgets],
            marker="o",
            label=name,
        )
    inner = [b for b in budgets if "router" in seeds[0]["budgets"][b]]
    at = lambda b, name: statistics.median(seed["budgets"][b][name] for seed in seeds)
    ax.plot([at(b, "router, share") for b in inner], [at(b, "router") for b in inner], marker="x", label="router")
    ax.set(xlabel="share of big modules", ylabel="held-out loss (nats a byte)")
    ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--width", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--small", type=float, default=1 / 16, help="the small module's hidden size over the big one's")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--router-steps", type=int, default=150)
    parser.add_argument("--router-rate", type=float, default=1e-2)
    parser.add_argument("--strength", type=float, default=10.0, help="of the routers' budget in their loss")
    parser.add_argument("--held-out", type=int, default=4, help="batches of held-out rows")
    parser.add_argument("--sequential-rows", type=int, default=8, help="held-out rows of the sequential oracle")
    parser.add_argument("--turns", type=int, default=8, help="of the bisection for the null control's noise")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    options = parser.parse_args(argv)
    host_memory.settle()
    found = study(options)
    print(table(found))
    about = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "command": " ".join(["python -m jaxpar.experiments.adaptive.duo", *(sys.argv[1:] if argv is None else argv)]),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "duo.json").write_text(json.dumps({**about, "results": found}, indent=1))
    (options.out / "duo.md").write_text(table(found))
    plot(found, options.out / "duo.png")
    return found


if __name__ == "__main__":
    main()
