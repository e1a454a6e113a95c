"""The configuration of the data: where text comes from and how it becomes batches. Free of JAX at import."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jaxpar.data.sources.base import Source
from jaxpar.data.sources.jsonl import Jsonl
from jaxpar.data.sources.named import source_from
from jaxpar.data.sources.stdlib import Stdlib
from jaxpar.data.sources.tables import HuggingFace, Parquet
from jaxpar.data.sources.text import TextFiles
from jaxpar.data.tokenizers import AnyTokenizer, Bytes, TokenizerFile, tokenizer_from
from jaxpar.errors import UserError

AnySource = Stdlib | TextFiles | Jsonl | Parquet | HuggingFace


@dataclass(frozen=True)
class DataConfig:
    """Text to batches.

    Attributes:
      source: where documents come from; also `stdlib`, or a path, whose kind is told by its name.
      validation_source: a source of its own for held-out documents. None: a part of `source` is held out.
      validation_fraction: the part of the documents that is held out, between 0 and 1. A document's own contents decide
        (their hash), not its place: the split is the same on all machines, survives added documents, and a larger
        fraction holds out the same documents and more.
      tokenizer: how text becomes token ids; also `bytes` or a path.
      length: tokens in a row T.
      batch: rows in a batch B, over all devices and processes.
      packing: "stream": documents follow one another, and rows are cut from that, so that rows hold several documents
        (which do not see each other) and parts of long ones. "document": each row holds one document or a part of a
        longer one, and is padded.
      shuffle: a new order of rows in each pass over the data; otherwise they come as they stand.
      seed: of that order.
      vocabulary_multiple: the model's vocabulary is rounded up to a multiple of this many ids, which lets mesh axes
        divide it.
      prefetch: batches made ahead in the background; 0 for none.
      cache_dir: folder of tokenised text. None: `$JAXPAR_CACHE`, else `jaxpar` in the user's cache folder.
    """

    source: AnySource = field(default=Stdlib(), metadata={"parse": source_from})
    validation_source: AnySource | None = field(default=None, metadata={"parse": source_from})
    validation_fraction: float = 0.05
    tokenizer: AnyTokenizer = field(default=Bytes(), metadata={"parse": tokenizer_from})
    length: int = 256
    batch: int = 16
    packing: Literal["stream", "document"] = "stream"
    shuffle: bool = True
    seed: int = 0
    vocabulary_multiple: int = 64
    prefetch: int = 2
    cache_dir: str | None = None

    def __post_init__(self):
        if not 0 < self.validation_fraction < 1:
            raise UserError(
                f"data.validation_fraction must lie between 0 and 1 (both excluded), got {self.validation_fraction}"
            )
        for name in ("length", "batch", "vocabulary_multiple"):
            if getattr(self, name) < 1:
                raise UserError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("prefetch", "seed"):
            if getattr(self, name) < 0:
                raise UserError(f"data.{name} must be at least 0, got {getattr(self, name)}")
        if self.seed >= 2**32:
            raise UserError(f"data.seed must be below 2^32, got {self.seed}")
        if self.packing not in ("stream", "document"):
            raise UserError(f"data.packing is stream or document, got {self.packing!r}")


def cache_dir(config: DataConfig) -> Path:
    """Where tokenised text is kept."""
    if config.cache_dir is not None:
        return Path(config.cache_dir).expanduser()
    if given := os.environ.get("JAXPAR_CACHE"):
        return Path(given).expanduser() / "data"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "jaxpar" / "data"


def vocabulary_of(config: DataConfig) -> int:
    """The model's vocabulary: the tokenizer's, rounded up to a multiple."""
    return round_up(config.tokenizer.load().size, config.vocabulary_multiple)


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


__all__ = [
    "AnySource",
    "AnyTokenizer",
    "Bytes",
    "DataConfig",
    "HuggingFace",
    "Jsonl",
    "Parquet",
    "Source",
    "Stdlib",
    "TextFiles",
    "TokenizerFile",
    "cache_dir",
    "source_from",
    "tokenizer_from",
    "vocabulary_of",
]
