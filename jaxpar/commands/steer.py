"""`jaxpar steer --model PATH --pairs FILE`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from jaxpar.commands.base import checking, read
from jaxpar.errors import UserError

DESCRIPTION = (
    "Make a steering vector (activation-steered compression, Azizi et al. 2025): the mean difference, over pairs of texts, of the "
    "residual stream behind a layer at their last tokens. The strength is the one at which the next token's distribution moves by "
    "a given divergence. Use it with jaxpar generate --steer FILE."
)
CALIBRATION = 32
"""Texts on which the strength is computed, the first ones that were not wanted."""


@dataclass(frozen=True)
class SteerConfig:
    """Make a steering vector from pairs of texts.

    Attributes:
      model: a run's folder, a Hugging Face folder, or a .gguf file.
      pairs: a JSONL file, {"wanted": text, "other": text} in each line; about a hundred pairs.
      out: the file to write.
      layer: behind which layer the stream is read and moved; 0 is the first. None: the middle one.
      divergence: how far the next token's distribution may move, in nats (Kullback-Leibler).
      rule: how the strength follows: bound, which holds as far as logits are linear in it, or second-order, an estimate, larger.
      compile_cache: keep compiled programs on disk for the next start.
    """

    model: str = "runs/first"
    pairs: str = "pairs.jsonl"
    out: str = "steering.npz"
    layer: int | None = None
    divergence: float = 0.05
    rule: Literal["bound", "second-order"] = "bound"
    compile_cache: bool = True

    def __post_init__(self):
        if not 0 < self.divergence < float("inf"):
            raise UserError(f"divergence = {self.divergence:g} nats must be above 0 and finite")


def pairs_of(file: Path) -> list[tuple[str, str]]:
    """(wanted, other) of each line.

    Raises:
      UserError: no such file; a line that is no pair, or fewer than two: a sign cannot be tested on one.
    """
    if not file.is_file():
        raise UserError(
            f'there is no file {file}; --pairs wants one with {{"wanted": text, "other": text}} in each line'
        )
    found = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            pair = json.loads(line)
            wanted, other = pair["wanted"], pair["other"]
        except (ValueError, KeyError, TypeError):
            wanted = other = None
        if not (isinstance(wanted, str) and isinstance(other, str) and wanted and other):
            raise UserError(f'{file}, line {number}, is no pair; it is to be {{"wanted": "a text", "other": "a text"}}')
        found.append((wanted, other))
    if len(found) < 2:
        raise UserError(
            f"{file} holds {len(found)} pairs; a direction needs at least 2, to test one by the other, and about 100 to be good"
        )
    return found


def main(argv: list[str]) -> int | None:
    config = read(SteerConfig(), argv, prog="jaxpar steer", description=DESCRIPTION)
    from jaxpar.start import start

    start(compile_cache=config.compile_cache)
    import numpy as np

    from jaxpar.loading import load
    from jaxpar.models import steering

    with checking():
        pairs = pairs_of(Path(config.pairs).expanduser())
        out = Path(config.out).expanduser()
        if not out.parent.is_dir():
            raise UserError(f"there is no folder {out.parent} to write {out.name} to")
        loaded = load(config.model)
        cfg, params = loaded.cfg, loaded.params
        layer = cfg.layers // 2 if config.layer is None else config.layer
        wanted, other = ([loaded.encode(text) for text in texts] for texts in zip(*pairs, strict=True))
        longest = max(map(len, wanted + other))
        if longest > cfg.context:
            raise UserError(
                f"the longest text of {config.pairs} has {longest} tokens, more than the model's context of {cfg.context}; "
                "shorten it"
            )
        differences = steering.differences(cfg, params, wanted, other, layer)
        agree = steering.agreeing(differences)
        if 2 * agree <= len(pairs):
            raise UserError(
                f"the sign is chance: {agree} of {len(pairs)} pairs point along the mean of the others behind layer {layer} of "
                f"{cfg.layers}; give pairs that differ in one thing, more of them, or another --layer"
            )
        vector = steering.Vector(np.asarray(differences.mean(0)), layer, cfg.layers, steering.mark(params))
        tokens, counts = steering.padded(other[:CALIBRATION])
        by = steering.strength(cfg, params, vector, tokens, config.divergence, config.rule, counts)
        moved = steering.divergence(cfg, params, vector, by, tokens, counts)
        replace(vector, strength=by).save(out)
    print(
        f"{loaded.source}: {len(pairs)} pairs behind layer {layer} of {cfg.layers}; {agree} of them point along the mean of the "
        f"others\nstrength {by:.4g} ({config.rule}) for {config.divergence:g} nats; measured on {len(counts)} texts: {moved:.4g} nats"
        f"\n{out}\n\ntry: jaxpar generate --model {config.model} --steer {out}"
    )
    return 0
