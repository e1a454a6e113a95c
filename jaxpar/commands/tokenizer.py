"""`jaxpar tokenizer train`."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxpar.commands.base import checking, read
from jaxpar.data.config import AnySource, Stdlib, source_from
from jaxpar.errors import UserError


@dataclass(frozen=True)
class TokenizerConfig:
    """Train a byte-level BPE tokenizer (needs the extra `tokenizers`).

    Attributes:
      source: the documents: `stdlib`, or a path to text, JSONL or Parquet.
      vocabulary: number of token ids, the 256 bytes and the end of a document among them.
      out: the tokenizer.json to write; then `jaxpar train --tokenizer OUT`.
    """

    source: AnySource = field(default=Stdlib(), metadata={"parse": source_from})
    vocabulary: int = 4096
    out: str = "tokenizer.json"


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] not in ("train", "--help", "-h"):
        raise UserError("jaxpar tokenizer has one task: jaxpar tokenizer train [OPTIONS]")
    config = read(TokenizerConfig(), argv[1:] if argv[0] == "train" else argv, prog="jaxpar tokenizer train")
    from jaxpar.data.bpe import train_bpe

    with checking():
        train_bpe(config.source, config.vocabulary, config.out)
    print(f"{config.out}: {config.vocabulary} ids; next: jaxpar train --tokenizer {config.out}")
