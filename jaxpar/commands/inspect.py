"""`jaxpar inspect --model PATH`."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jaxpar.commands.base import checking, read
from jaxpar.data.config import AnySource
from jaxpar.data.sources.named import source_from
from jaxpar.data.sources.stdlib import Stdlib
from jaxpar.errors import UserError

DESCRIPTION = (
    "Look into a model: depth weights, norms and cosines of every layer, the loss if the model ended there, and how deep tokens "
    "would go if a confidence were enough to leave. Writes inspect.json and inspect.png into the folder --out."
)


@dataclass(frozen=True)
class InspectConfig:
    """Look into a model.

    Attributes:
      model: a run's folder, a Hugging Face folder, or a .gguf file.
      out: the folder to write to. None: the run's folder, or the current one.
      source: the text that it reads; of the built-in corpus the part that runs hold out.
      rows: rows of text.
      length: tokens of a row.
      confidence: exits' thresholds: the most likely token's probability less the second one's.
      compile_cache: keep compiled programs on disk for the next start.
    """

    model: str = "runs/first"
    out: str | None = None
    source: AnySource = field(default=Stdlib(), metadata={"parse": source_from})
    rows: int = 4
    length: int = 128
    confidence: tuple[float, ...] = (0.5, 0.8, 0.9, 0.95)
    compile_cache: bool = True

    def __post_init__(self):
        for name in ("rows", "length"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


def _rows(config: InspectConfig, encode) -> Iterator[list[int]]:
    """The beginnings of documents that are long enough, those first that runs hold out."""
    from jaxpar.data.cache import is_held_out
    from jaxpar.data.config import DataConfig

    size = config.length + 1
    for held_out in (True, False):  # a source of few documents may hold out none
        for document in config.source.documents():
            if is_held_out(document.text, DataConfig().validation_fraction) == held_out:
                # Tokens of more than 16 bytes on average are no text; what is longer need not be encoded.
                ids = encode(document.text[: 16 * size].decode("utf-8", errors="ignore"))[:size]
                if len(ids) == size:
                    yield ids


def batch_of(config: InspectConfig, encode, context: int):
    """Rows of the source's held-out documents, one document (or a part of one) a row.

    Raises:
      UserError: rows longer than the model's context, or too little text.
    """
    import numpy as np

    from jaxpar.step import Batch

    rows, length = config.rows, config.length
    if length > context:
        raise UserError(
            f"length = {length} tokens is more than the model's context of {context}; choose at most {context}"
        )
    found = list(itertools.islice(_rows(config, encode), rows))
    if len(found) < rows:
        raise UserError(
            f"{config.source.describe()} has {len(found)} documents of more than {length} tokens, and rows = {rows} are asked "
            "for; choose fewer rows, a smaller length, or more text"
        )
    tokens = np.asarray(found, np.int32)
    ones = np.ones((rows, length), np.float32)
    places = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(tokens[:, :-1], tokens[:, 1:], ones, places, ones.astype(np.int32), np.arange(rows, dtype=np.int32))


def main(argv: list[str]) -> int | None:
    config = read(InspectConfig(), argv, prog="jaxpar inspect", description=DESCRIPTION)
    from jaxpar.start import start

    start(compile_cache=config.compile_cache)
    from jaxpar.inspecting import findings
    from jaxpar.loading import load, run_checkpoints
    from jaxpar.report import depth

    with checking():
        loaded = load(config.model)
        model = Path(config.model).expanduser()
        default = model if model.is_dir() and run_checkpoints(model) is not None else Path()
        out = default if config.out is None else Path(config.out).expanduser()
        batch = batch_of(config, loaded.encode, loaded.cfg.context)
        found = findings(loaded.cfg, loaded.params, batch, config.confidence)
        out.mkdir(parents=True, exist_ok=True)
    print(f"{loaded.source}: {found['layers']} layers, residual stream {found['residual']}, {found['tokens']} tokens\n")
    print(depth.table(found))
    depth.write(out / "inspect.json", json.dumps({"model": loaded.source, **found}, indent=1).encode())
    depth.write(out / "inspect.png", depth.picture(found, loaded.source))
    print(f"\n{out / 'inspect.json'}, {out / 'inspect.png'}")
    return 0
