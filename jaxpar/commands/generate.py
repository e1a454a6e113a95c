"""`jaxpar generate --model PATH --prompt TEXT`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal

from jaxpar.commands.base import checking, read
from jaxpar.errors import UserError
from jaxpar.models.routing.skip import Skipping
from jaxpar.sampling import Sampler


@dataclass(frozen=True)
class GenerateConfig:
    """Continue a prompt.

    Attributes:
      model: a run's folder, a Hugging Face folder, or a .gguf file.
      prompt: the text to continue; several are continued as one batch.
      tokens: the most tokens to add to each.
      sampler: how tokens are chosen; `--temperature 0` (greedy) is the default.
      skip: parts of layers that tokens leave out. None: none.
      seed: of the draws.
      dtype: compute dtype. None: the model's own.
      compile_cache: keep compiled programs on disk for the next start.
    """

    model: str = "runs/first"
    prompt: tuple[str, ...] = ("def ",)
    tokens: int = 64
    sampler: Sampler = Sampler()
    skip: Skipping | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] | None = None
    compile_cache: bool = True


def main(argv: list[str]) -> int | None:
    config = read(GenerateConfig(), argv, prog="jaxpar generate")
    if not config.prompt:
        raise UserError("there is no prompt; give one, for example --prompt 'def '")
    from jaxpar.start import start

    start(compile_cache=config.compile_cache)
    import jax

    from jaxpar.generation import continued
    from jaxpar.loading import load

    with checking():
        loaded = load(config.model)
        cfg = loaded.cfg if config.dtype is None else loaded.cfg.replace(dtype=config.dtype)
        found = continued(
            cfg,
            loaded.params,
            [loaded.encode(text) for text in config.prompt],
            new_tokens=config.tokens,
            sampler=config.sampler,
            stop=loaded.stop,
            key=jax.random.key(config.seed),
            vocabulary=loaded.vocabulary,
            skip=config.skip,
        )
    for i, (text, row) in enumerate(zip(config.prompt, found.rows, strict=True)):
        if i:
            print("\n---")
        print(text + loaded.decode(row))
    if config.skip is not None:
        what = "feed-forward parts" if config.skip.site == "feedforward" else "layers"
        print(
            f"left out {100 * found.skipped:.1f} % of the new tokens' {what}; {100 * found.spared:.1f} % did not run at all",
            file=sys.stderr,
        )
