"""What the studies of early exits share: a model trained with exits on the built-in text, its losses behind every exit, and
prompts to continue."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.adaptive.curriculum import exit_weights
from jaxpar.experiments.small import Runs, Texts, controls
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.exits.config import Exits
from jaxpar.optimisers_config import AdamW, WarmupCosine
from jaxpar.presets import llama
from jaxpar.steps.clip import clip_global

RESULTS = Path(__file__).resolve().parent / "results"


def model(options, data: Texts, exits: Exits) -> ModelConfig:
    """A Llama of the size that the options say."""
    context = max(options.length, 1024)
    return llama(options.layers, options.width, options.heads, context=context, vocabulary=data.vocabulary, exits=exits)


def training(cfg: ModelConfig, data: Texts, options, more=()) -> Runs:
    """Runs of it; `more` transforms stand where skipping does."""
    around = (exit_weights(cfg.exits, cfg.layers), *more, clip_global(1.0))
    return Runs(cfg, AdamW(schedule=WarmupCosine(options.rate)), data, options.steps, around)


def trained(runs: Runs, options, seed: int = 0) -> tuple[Any, dict]:
    """Parameters at the end, and metrics [steps]."""
    ((state, metrics),) = runs.train(runs.start(seed), controls(options.steps, options.rows), options.steps)
    return state.params, metrics


def losses(cfg: ModelConfig, params: Any, data: Texts, at: tuple[int, ...]) -> list[float]:
    """Held-out loss in nats a token behind each of the layers `at` and behind the last."""

    @jax.jit
    def all_of_them(params):
        def one(batch):
            ctx = Context(batch.positions, batch.segments)
            states, _ = decoder.segments(cfg, params, decoder.embed(cfg, params, batch.tokens, ctx), ctx, at)
            sums = [
                decoder.head(cfg, params, state, ctx, batch.targets, batch.weights, at=layer)
                for state, layer in zip(states, (*at, None), strict=True)
            ]
            return jnp.stack([s.loss_sum for s in sums]), sums[-1].weight_sum

        sums, weights = jax.lax.map(one, data.held_out)
        return sums.sum(0) / weights.sum()

    return np.asarray(all_of_them(params)).tolist()


def prompts(data: Texts, count: int, tokens: int) -> list[list[int]]:
    """The first tokens of held-out rows."""
    rows = np.asarray(data.held_out.tokens).reshape(-1, data.held_out.tokens.shape[-1])
    return rows[:count, :tokens].tolist()


def arguments(doc: str, **defaults: Any) -> argparse.ArgumentParser:
    """The options of a model's size and training; `defaults` replace those here."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    standing = dict(layers=8, width=128, heads=4, length=128, rows=16, steps=600, rate=3e-3)
    for name, value in {**standing, **defaults}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write to")
    return parser


def written(module: str, argv: list[str] | None, options, results: Any, file: Path) -> None:
    """The results as JSON, with what they were made with and by which command."""
    about = {
        "date": datetime.date.today().isoformat(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "command": " ".join([f"python -m jaxpar.experiments.{module}", *(sys.argv[1:] if argv is None else argv)]),
        "options": {name: value for name, value in vars(options).items() if name != "out"},
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**about, "results": results}, indent=1))
