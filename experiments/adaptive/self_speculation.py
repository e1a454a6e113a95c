"""Self-speculation: how many drafts of each exit are accepted, and how many tokens a call of the whole model gives.

Command:   python -m jaxpar.experiments.adaptive.self_speculation             (8 layers, 600 steps, exits at 1, 2, 4)
           python -m jaxpar.experiments.adaptive.self_speculation --layers 24 --width 1024 --heads 16 --length 1024 --steps 20000 --at 4 8 12   (on a GPU)
Expected:  results/self_speculation.json, .md and .png, 9 minutes. Every row of tokens equals plain greedy decoding's, or the run
           ends with an error. Nine of ten drafts are accepted behind every exit, as so small a model repeats itself.

A Llama on the built-in text, trained with exits under LayerSkip's weights (Elhoushi et al. 2024; with an exit behind the first
layer, to which they give none, under CALM's). Held-out texts are continued greedily in one ragged batch, by drafts of each
length behind each exit. Beside what was counted stands what chance would give: with an acceptance of a for each draft,
independently, a round of K drafts has (1 - a^(K+1)) / (1 - a) tokens (Leviathan et al. 2023, eq. 1); a there is the share of
first drafts that are accepted. Layers a token are what drafts and verification ran, all of a round's tokens counted.
"""

from __future__ import annotations

from pathlib import Path

from jaxpar import host_memory
from jaxpar.adaptive.speculate import speculate
from jaxpar.experiments.adaptive import exiting
from jaxpar.experiments.small import texts
from jaxpar.generation import generate
from jaxpar.models.exits.config import Calm, Exits, LayerSkip


def measured(cfg, params, prompts, options) -> dict[str, dict]:
    """By exit and draft length. Raises AssertionError where a token differs from plain decoding's."""
    plain = generate(cfg, params, prompts, new_tokens=options.tokens)
    found = {}
    for layer in options.at:
        first = None
        for draft in options.draft:
            one = speculate(cfg, params, prompts, new_tokens=options.tokens, layer=layer, draft=draft)
            assert one.rows == plain, (
                f"tokens of drafts of {draft} behind layer {layer} are not plain greedy decoding's"
            )
            if first is None:
                single = one if draft == 1 else speculate(
                    cfg, params, prompts, new_tokens=options.tokens, layer=layer, draft=1
                )  # fmt: skip
                first = single.acceptance
            chance = draft + 1 if first == 1 else (1 - first ** (draft + 1)) / (1 - first)
            ran = (draft + 1) * cfg.layers * sum(one.rounds) / sum(map(len, one.rows))
            found[f"layer {layer}, {draft} drafts"] = {
                "layer": layer,
                "draft": draft,
                "acceptance": one.acceptance,
                "first_draft": first,
                "tokens_per_round": one.tokens_per_round,
                "by_chance": chance,
                "layers_per_token": ran,
                "calls_saved": 1 - 1 / one.tokens_per_round,
            }
            print(
                f"layer {layer}, {draft} drafts: {100 * one.acceptance:.1f} % accepted, {one.tokens_per_round:.2f} tokens a call",
                flush=True,
            )
    return found


def table(found: dict) -> str:
    lines = ["| exit | drafts | accepted | first draft | tokens a call | if independent | layers run a token |"]
    lines.append("|---" * 7 + "|")
    for row in found.values():
        lines.append(
            f"| {row['layer']} | {row['draft']} | {100 * row['acceptance']:.1f} % | {100 * row['first_draft']:.1f} % | "
            f"{row['tokens_per_round']:.2f} | {row['by_chance']:.2f} | {row['layers_per_token']:.1f} |"
        )
    return "Tokens equal plain greedy decoding's in every row.\n\n" + "\n".join(lines) + "\n"


def plot(found: dict, file: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for i, layer in enumerate(sorted({row["layer"] for row in found.values()})):
        rows = [row for row in found.values() if row["layer"] == layer]
        drafts = [row["draft"] for row in rows]
        axes.plot(
            drafts, [row["tokens_per_round"] for row in rows], marker="o", color=f"C{i}", label=f"behind layer {layer}"
        )
        axes.plot(drafts, [row["by_chance"] for row in rows], ls=":", color=f"C{i}")
    axes.set(xlabel="drafts in a round", ylabel="tokens for each call of the whole model (dotted: if independent)")
    axes.legend()
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> dict:
    parser = exiting.arguments(__doc__, tokens=96, prompt=16, prompts=8)
    parser.add_argument("--at", type=int, nargs="+", default=[1, 2, 4], help="exits")
    parser.add_argument("--draft", type=int, nargs="+", default=[1, 2, 4, 6], help="drafts in a round")
    options = parser.parse_args(argv)
    host_memory.settle()
    data = texts(options.length, options.rows, options.steps)
    at = tuple(options.at)
    cfg = exiting.model(options, data, Exits(at, loss=Calm() if at[0] == 1 else LayerSkip()))
    params, _ = exiting.trained(exiting.training(cfg, data, options), options)
    each = exiting.losses(cfg, params, data, at)
    print(
        "held-out loss: "
        + ", ".join(f"{loss:.3f} behind {layer}" for loss, layer in zip(each, (*at, cfg.layers), strict=True))
    )
    # Of unequal lengths, so that the batch is ragged from the start.
    prompts = [
        p[: max(2, options.prompt - i)] for i, p in enumerate(exiting.prompts(data, options.prompts, options.prompt))
    ]
    found = measured(cfg, params, prompts, options)
    file = options.out / "self_speculation.json"
    exiting.written("adaptive.self_speculation", argv, options, {"held_out": each, "drafts": found}, file)
    file.with_suffix(".md").write_text(table(found))
    plot(found, file.with_suffix(".png"))
    print(table(found))
    return found


if __name__ == "__main__":
    main()
