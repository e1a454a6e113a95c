"""Text to token ids and back.

A tokeniser is chosen by a strategy in the configuration (`Bytes`, `TokenizerFile`), and `load()` makes the working
object, a `Tokenizer`. `encode` adds no special tokens: the caller puts them where they belong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from jaxpar.errors import UserError

Text = str | bytes


@runtime_checkable
class Tokenizer(Protocol):
    """What the rest of jaxpar knows of a tokeniser.

    Attributes:
      size: the number of ids; every id is below it. A model's vocabulary must be at least this.
      eod: the id that ends a document.
      bos: the id that begins a document, for tokenisers that were made to have one. None: documents begin with text.
      identity: equal for tokenisers that give equal ids for every text; part of the tokenised cache's key.
      accepts_bytes: whether bytes that are not UTF-8 can be encoded.
    """

    size: int
    eod: int
    bos: int | None
    identity: str
    accepts_bytes: bool

    def encode(self, text: Text) -> np.ndarray:
        """int32 [n], without a begin or end. A special token that is written out in the text becomes its id, as in
        `transformers` (sentencepiece knows only its user-defined symbols there).

        Raises:
          UserError: bytes that are not UTF-8 (unless `accepts_bytes`).
        """
        ...

    def encode_batch(self, texts: Sequence[Text]) -> list[np.ndarray]:
        """The same for several, where possible on several cores."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text; special tokens are left out, an id that stands for nothing becomes "\\ufffd"."""
        ...


class ByteTokenizer:
    """One id for each byte, and 256 for the end of a document. `decode` of any ids gives a string."""

    size, eod, bos, identity, accepts_bytes = 257, 256, None, "bytes", True

    def encode(self, text: Text) -> np.ndarray:
        data = text.encode("utf-8", "replace") if isinstance(text, str) else text
        return np.frombuffer(data, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[Text]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        found = np.asarray(ids, np.int64).reshape(-1)
        found = found[found != self.eod]
        # 0xFF occurs in no UTF-8 text, so that a padding id of the vocabulary becomes the replacement character.
        return np.where((found >= 0) & (found < 256), found, 0xFF).astype(np.uint8).tobytes().decode("utf-8", "replace")


@dataclass(frozen=True)
class Bytes:
    """UTF-8 bytes: 256 ids and one for the end of a document. Needs no file, and takes any data."""

    def load(self) -> Tokenizer:
        return ByteTokenizer()


@dataclass(frozen=True)
class TokenizerFile:
    """A tokenizer.json (needs the package `tokenizers`), a sentencepiece .model (needs `sentencepiece`), a folder that
    holds one of them, such as that of a model, or a GGUF file. Both packages are in the extra `tokenizers`.

    Attributes:
      path: the file or folder.
      end: the token that ends a document, such as `<|endoftext|>`. None: what the files beside it (tokenizer_config,
        config) call the end of text, else the best known names; a tokeniser that has none gets one id more.
    """

    path: str
    end: str | None = None

    def load(self) -> Tokenizer:
        """
        Raises:
          UserError: the file is missing or corrupted, or a package is.
        """
        from jaxpar.data import tokenizer_files

        return tokenizer_files.load(self.path, self.end)


AnyTokenizer = Bytes | TokenizerFile


def tokenizer_from(text: str) -> AnyTokenizer:
    """`bytes`, or the path of a tokeniser, as one types it."""
    if text == "bytes":
        return Bytes()
    if not Path(text).expanduser().exists():
        raise UserError(f"the tokenizer (bytes, a file or a folder) was not found: {text}")
    return TokenizerFile(text)


def utf8(text: Text) -> str:
    """The string, for tokenisers that know characters only.

    Raises:
      UserError: bytes that are not UTF-8.
    """
    if isinstance(text, str):
        # Half of a surrogate pair has no UTF-8, and the packages would raise something unreadable.
        return text.encode("utf-8", "replace").decode("utf-8")
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(
            f"byte {e.start} of the text is not UTF-8; convert it, or use --tokenizer bytes, which takes any data"
        ) from None
