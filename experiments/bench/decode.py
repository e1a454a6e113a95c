"""Tokens a second of adaptive decoding beside plain greedy decoding, at equal output and at stated loss of agreement.

Command:   python -m jaxpar.experiments.bench.decode                          (8 layers of width 192, batch 1)
           python -m jaxpar.experiments.bench.decode --layers 24 --width 1024 --heads 16 --steps 5000 --at 4 8   (on a GPU)
           python -m jaxpar.experiments.bench.decode --quick                  (a minute: that it runs)
Expected:  results/decode_cpu.json, .md and .png (or the chip's name), 4 minutes on 2 cores. Speculation's tokens equal plain
           decoding's, or the run ends with an error; drafts of 5 behind layer 2 were 1.8 times as fast as plain decoding.

A Llama is trained on the built-in text with exits (CALM's weights), and continues held-out texts greedily, one at a time. All
ways of decoding are timed in turn, a whole continuation of each a round; quoted is the median over rounds of the ratio to plain
decoding in the same round. Speculation gives plain decoding's tokens (checked). Early exit gives others: for each threshold
the share of tokens that are plain decoding's, up to the first that is not, and the layers that a token ran. One threshold is
calibrated (Learn-then-Test): with probability 1 - delta the expected share of tokens whose exit says otherwise than the last
layer is at most `risk`, for texts as those that it was calibrated on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxpar import host_memory
from jaxpar.adaptive.calibrate import learn_then_test
from jaxpar.adaptive.confidence import TopTwo
from jaxpar.adaptive.decode import exit_early
from jaxpar.adaptive.policy import ExitEarly, Propagate, Recompute
from jaxpar.adaptive.seen import judged, seen
from jaxpar.adaptive.speculate import speculate
from jaxpar.adaptive.threshold import Threshold
from jaxpar.experiments.adaptive import exiting
from jaxpar.experiments.small import texts
from jaxpar.generation import generate
from jaxpar.models.exits.config import Exits

RESULTS = Path(__file__).resolve().parent / "results"
QUICK = dict(layers=3, width=32, heads=2, length=32, rows=4, steps=4, tokens=8, prompt=4, prompts=1, rounds=1)


def agreement(rows: list[list[int]], plain: list[list[int]]) -> float:
    """The share of plain decoding's tokens in front of each row's first other token."""
    same = [
        np.cumprod([a == b for a, b in zip(row, other, strict=False)]).sum()
        for row, other in zip(rows, plain, strict=True)
    ]
    return float(sum(same) / sum(map(len, plain)))


def calibrated(cfg, params, data, options) -> tuple[float | None, dict]:
    """The threshold, and what every candidate would do to the calibration texts."""
    thresholds = np.linspace(0.0, 0.99, 34)
    # Held-out rows, but for those that are continued below.
    tokens = data.held_out.tokens.reshape(-1, data.held_out.tokens.shape[-1])[options.prompts :]
    asked = jax.jit(lambda params, tokens: seen(cfg, params, tokens, TopTwo()).replace(x=None))(params, tokens)
    wrong, depth = judged(asked, thresholds)
    found = learn_then_test(wrong, thresholds, risk=options.risk, delta=options.delta)
    means = {"thresholds": thresholds.tolist(), "wrong": wrong.mean(0).tolist(), "exit": depth.mean(0).tolist()}
    return found, means


def ways(cfg, params, prompts, threshold: float | None, options) -> dict[str, Callable]:
    """By name: a function that continues all prompts, one at a time, and gives the rows and what to say of them."""
    n = options.tokens
    one_by_one = lambda run: [run([p]) for p in prompts]

    def plain():
        return [generate(cfg, params, [p], new_tokens=n)[0] for p in prompts], {}

    def drafts(layer, draft):
        def run():
            found = one_by_one(lambda p: speculate(cfg, params, p, new_tokens=n, layer=layer, draft=draft))
            rounds = sum(sum(f.rounds) for f in found)
            accepted = sum(sum(f.accepted) for f in found)
            told = {"acceptance": accepted / (draft * rounds), "tokens_per_round": n * len(prompts) / rounds}
            return [f.rows[0] for f in found], told

        return run

    def early(value, remedy):
        policy = ExitEarly(Threshold(value), TopTwo(), remedy)

        def run():
            found = one_by_one(lambda p: exit_early(cfg, params, p, policy, new_tokens=n))
            return [f.rows[0] for f in found], {"depth": statistics.mean(f.depth for f in found)}

        return run

    found = {"plain": plain}
    found |= {f"drafts of {k} behind layer {e}": drafts(e, k) for e in cfg.exits.at for k in options.draft}
    values = {f"threshold {v}": v for v in options.thresholds} | {"threshold 1 (never)": 1.0}
    if threshold is not None:
        values |= {f"threshold {threshold:.2f}, calibrated": threshold}
    for name, value in values.items():
        found |= {f"{name}, recompute": early(value, Recompute()), f"{name}, propagate": early(value, Propagate())}
    return found


def measured(runs: dict[str, Callable], rounds: int, tokens: int) -> dict[str, dict]:
    expected, found = runs["plain"]()[0], {}
    for name, run in runs.items():  # compiled here
        rows, told = run()
        if name.startswith("drafts"):
            assert rows == expected, f"{name}: tokens are not plain greedy decoding's"
        found[name] = {**told, "agreement": agreement(rows, expected), "all": []}
    for i in range(rounds):
        for name in list(runs) if i % 2 else list(reversed(runs)):
            start = time.perf_counter()
            runs[name]()
            found[name]["all"].append(time.perf_counter() - start)
    first = found["plain"]["all"]
    for row in found.values():
        row["speed"] = statistics.median(b / a for a, b in zip(row["all"], first, strict=True))
        row["tokens_per_second"] = tokens / statistics.median(row["all"])
    return found


def table(found: dict) -> str:
    lines = [
        "| decoding | tokens/s | speed over plain | as plain | accepted | tokens a call | layers a token |",
        "|---" * 7 + "|",
    ]
    for name, row in found.items():
        cell = lambda key, form, row=row: form.format(row[key]) if key in row else "-"
        lines.append(
            f"| {name} | {row['tokens_per_second']:.0f} | {row['speed']:.2f} | {100 * row['agreement']:.1f} % | "
            f"{cell('acceptance', '{:.2f}')} | {cell('tokens_per_round', '{:.2f}')} | {cell('depth', '{:.2f}')} |"
        )
    return "\n".join(lines) + "\n"


def plot(found: dict, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for word, color in (
        ("drafts", "tab:blue"),
        ("recompute", "tab:red"),
        ("propagate", "tab:orange"),
        ("plain", "black"),
    ):
        rows = [row for name, row in found.items() if name.startswith(word) or name.endswith(word)]
        axes.plot([100 * r["agreement"] for r in rows], [r["speed"] for r in rows], "o", ms=4, color=color, label=word)
    axes.axhline(1.0, lw=0.5, color="black")
    axes.set(xlabel="tokens as plain decoding's, %", ylabel="speed over plain decoding")
    axes.legend()
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> dict:
    sizes = dict(layers=8, width=192, steps=200, tokens=128, prompt=32, prompts=4, rounds=5)
    parser = exiting.arguments(__doc__, **sizes, risk=0.05, delta=0.1)
    parser.add_argument("--at", type=int, nargs="+", default=[2, 4], help="exits")
    parser.add_argument("--draft", type=int, nargs="+", default=[3, 5], help="drafts in a round")
    parser.add_argument("--thresholds", type=float, nargs="*", default=[0.5, 0.9], help="beside the calibrated one")
    parser.add_argument("--quick", action="store_true", help="a tiny model, that it runs")
    parser.set_defaults(out=RESULTS)
    options = parser.parse_args(argv)
    if options.quick:
        vars(options).update(QUICK, at=[1], draft=[2], thresholds=[0.5])
    host_memory.settle()
    data = texts(options.length, options.rows, options.steps)
    cfg = exiting.model(options, data, Exits(tuple(options.at)))
    params, _ = exiting.trained(exiting.training(cfg, data, options), options)
    each = exiting.losses(cfg, params, data, cfg.exits.at)
    threshold, candidates = calibrated(cfg, params, data, options)
    print(f"held-out loss {' '.join(f'{x:.3f}' for x in each)}; calibrated threshold: {threshold}", flush=True)
    prompts = exiting.prompts(data, options.prompts, options.prompt)
    found = measured(ways(cfg, params, prompts, threshold, options), options.rounds, options.tokens * len(prompts))
    chip = jax.devices()[0].device_kind.lower().replace(" ", "_")
    file = options.out / f"decode_{chip}.json"
    results = {"held_out": each, "calibration": {"threshold": threshold, **candidates}, "decoding": found}
    exiting.written("bench.decode", argv, options, results, file)
    file.with_suffix(".md").write_text(table(found))
    plot(found, file.with_suffix(".png"))
    print(table(found))
    return results


if __name__ == "__main__":
    main()
