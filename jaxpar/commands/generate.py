"""`jaxpar generate --model PATH --prompt TEXT`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Literal

from jaxpar.adaptive.policy import Decoding
from jaxpar.commands.base import checking, read
from jaxpar.errors import UserError
from jaxpar.models.routing.skip import Skipping
from jaxpar.paging import Paged
from jaxpar.quantise.choose import AnyQuantised, parse, quantised
from jaxpar.sampling import Sampler


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt.

    Attributes:
      model: a run's folder, a Hugging Face folder, or a .gguf file.
      prompt: the text to continue; several are continued as one batch, or with pages one after another as there is room.
      tokens: the most tokens to add to each.
      sampler: how tokens are chosen; `--temperature 0` (greedy) is the default.
      skip: parts of layers that tokens leave out. None: none.
      decoding: how exits are used: tokens leave early (exit-early), or an exit, or the model that `skip` leaves, drafts what the
        whole model verifies (speculate: the tokens of plain greedy decoding). None: every token runs through all layers.
      pages: keys and values lie in pages that prompts share, of which some run at once while others wait: the same
        tokens, and no room is kept for the longest row in every row. None: a dense cache, and all prompts at once.
      steer: a file of `jaxpar steer`, whose vector is added to the stream at each prompt's last token and at every new one.
        None: nothing is added.
      steer_strength: times the vector. None: as the file says; negative leads away from what was wanted.
      quantise: the number formats of weights, activations and cache: w8a16, w4a16, w8a8, w4a8, w4a4, w4ax (8 bits where
        activations have outliers), groups as in w4g32a16, keys and values as in w4a4kv4; or a format for weights and
        activations (mxfp8). None: as the model was saved.
      seed: of the draws.
      dtype: compute dtype. None: the model's own.
      compile_cache: keep compiled programs on disk for the next start.
    """

    model: str = "runs/first"
    prompt: tuple[str, ...] = ("def ",)
    tokens: int = 64
    sampler: Sampler = Sampler()
    skip: Skipping | None = None
    decoding: Decoding | None = None
    pages: Paged | None = None
    steer: str | None = None
    steer_strength: float | None = None
    quantise: AnyQuantised | None = field(default=None, metadata={"parse": parse})
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    compile_cache: bool = True


def main(argv: list[str]) -> int | None:
    config = read(GenerateConfig(), argv, prog="jaxpar generate")
    if not config.prompt:
        raise UserError("there is no prompt; give one, for example --prompt 'def '")
    if config.steer is None and config.steer_strength is not None:
        raise UserError(
            f"steer_strength = {config.steer_strength:g} multiplies a vector, and none is given; add --steer FILE, which "
            "jaxpar steer makes"
        )
    from jaxpar.start import start

    start(compile_cache=config.compile_cache)
    import jax

    from jaxpar.adaptive.generate import continued
    from jaxpar.loading import load
    from jaxpar.models.context import Ops
    from jaxpar.models.steering import Vector

    with checking():
        loaded = load(config.model)
        cfg = loaded.cfg if config.dtype is None else loaded.cfg.replace(dtype=config.dtype)
        params, ops, note, steering = loaded.params, Ops(), "", None
        if config.steer is not None:
            vector = Vector.load(config.steer)
            by = vector.strength if config.steer_strength is None else config.steer_strength
            steering = vector.steering(cfg, params, by)
        if config.quantise is not None:
            params, ops, note = quantised(config.quantise, cfg, loaded, ops)
        found = continued(
            cfg,
            params,
            [loaded.encode(text) for text in config.prompt],
            new_tokens=config.tokens,
            sampler=config.sampler,
            stop=loaded.stop,
            key=jax.random.key(config.seed),
            vocabulary=loaded.vocabulary,
            ops=ops,
            skip=config.skip,
            decoding=config.decoding,
            pages=config.pages,
            steering=steering,
        )
    for i, (text, row) in enumerate(zip(config.prompt, found.rows, strict=True)):
        if i:
            print("\n---")
        print(text + loaded.decode(row))
    if note:
        print(note, file=sys.stderr)
    if steering is not None:
        print(f"steered behind layer {vector.layer} of {cfg.layers}, {by:.4g} times the vector", file=sys.stderr)
    if found.note:
        print(found.note, file=sys.stderr)
    if config.skip is not None and config.decoding is None:
        what = "feed-forward parts" if config.skip.site == "feedforward" else "layers"
        print(
            f"left out {100 * found.skipped:.1f} % of the new tokens' {what}; {100 * found.spared:.1f} % did not run at all",
            file=sys.stderr,
        )
