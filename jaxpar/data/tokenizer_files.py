"""Tokenisers from files: `tokenizer.json` through the package `tokenizers`, `.model` through `sentencepiece`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxpar.data.tokenizers import Text, Tokenizer, utf8
from jaxpar.errors import UserError

END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "<|im_end|>", "<|eot_id|>", "[SEP]")
"""What tokenisers call the end of a text, in the order in which they are looked for."""


class JsonTokenizer:
    """Around a `tokenizers.Tokenizer`.

    Args:
      inner: the tokeniser; truncation and padding are switched off.
      end: the token that ends a document. None: the first of `END_NAMES` that is there, else one id more than it has.
      bos: the id that begins a document. "auto": the one that the tokeniser's own post-processing puts first.
      name: for messages.

    Raises:
      UserError: `end` is not one of its tokens.
    """

    accepts_bytes = False

    def __init__(self, inner: Any, *, end: str | None = None, bos: int | str | None = "auto", name: str = "tokenizer"):
        inner.no_truncation()
        inner.no_padding()
        self.inner = inner
        vocabulary = inner.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise UserError(f"{name} has an empty vocabulary")
        self.size = max(vocabulary.values()) + 1  # ids may have holes: their number is not enough
        self.eod, self.size = _end(end, vocabulary.get, self.size, name)
        if bos == "auto":
            plain, full = (inner.encode("a", add_special_tokens=special).ids for special in (False, True))
            before = full[: full.index(plain[0])] if plain and plain[0] in full else []
            bos = before[0] if len(before) == 1 else None
        self.bos = bos
        self.identity = _identity("tokenizers", inner.to_str().encode(), self.eod, self.bos)

    def encode(self, text: Text) -> np.ndarray:
        return np.array(self.inner.encode(utf8(text), add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[Text]) -> list[np.ndarray]:
        found = self.inner.encode_batch([utf8(t) for t in texts], add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        known = lambda run: self.inner.decode(run, skip_special_tokens=True)
        return _decode(ids, self.eod, lambda i: 0 <= i < self.size and self.inner.id_to_token(i) is not None, known)


class SentencePieceTokenizer:
    """Around a `sentencepiece.SentencePieceProcessor`; arguments as for `JsonTokenizer`."""

    accepts_bytes = False

    def __init__(self, inner: Any, *, end: str | None = None, bos: int | str | None = "auto", name: str = "tokenizer"):
        self.inner = inner
        self.size = inner.vocab_size()
        if end is None and inner.eos_id() >= 0:
            self.eod = inner.eos_id()
        else:
            find = lambda token: i if inner.id_to_piece(i := inner.piece_to_id(token)) == token else None
            self.eod, self.size = _end(end, find, self.size, name)
        if bos == "auto":
            bos = inner.bos_id() if inner.bos_id() >= 0 else None
        self.bos = bos
        self.identity = _identity("sentencepiece", inner.serialized_model_proto(), self.eod, self.bos)

    def encode(self, text: Text) -> np.ndarray:
        return np.array(self.inner.encode(utf8(text)), np.int32)

    def encode_batch(self, texts: Sequence[Text]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self.inner.encode([utf8(t) for t in texts])]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return _decode(ids, self.eod, lambda i: 0 <= i < self.inner.vocab_size(), self.inner.decode)


def _end(end: str | None, find: Any, size: int, name: str) -> tuple[int, int]:
    """The id of the end of a document, and the number of ids with it."""
    if end is not None:
        if find(end) is None:
            raise UserError(f"{name} has no token {end!r} to end a document with (data.tokenizer.end)")
        return find(end), size
    for token in END_NAMES:
        if find(token) is not None:
            return find(token), size
    return size, size + 1


def _identity(kind: str, data: bytes, eod: int, bos: int | None) -> str:
    return f"{kind}:{hashlib.blake2b(data, digest_size=16).hexdigest()}:{eod}:{bos}"


def _decode(ids: Any, eod: int, is_known: Any, decode: Any) -> str:
    """Runs of known ids decoded together (characters may span tokens), anything else replaced."""
    pieces: list[str] = []
    run: list[int] = []
    for i in np.asarray(ids, np.int64).reshape(-1).tolist():
        if i == eod:
            continue
        if is_known(i):
            run.append(i)
            continue
        pieces += [decode(run)] if run else []
        pieces.append("\ufffd")
        run = []
    return "".join([*pieces, decode(run)] if run else pieces)


def load(path: str, end: str | None = None) -> Tokenizer:
    """The tokeniser in a file or folder. See `jaxpar.data.tokenizers.TokenizerFile`.

    Raises:
      UserError: the file is missing or corrupted, or its package is.
    """
    file = _file(path)
    if file.suffix.lower() == ".gguf":
        from jaxpar.data import gguf_tokenizer

        return gguf_tokenizer.load(file, end)
    said = _beside(file.parent)
    try:
        data = file.read_bytes()
    except OSError as e:
        raise UserError(f"cannot read the tokenizer {file}: {e.strerror}") from None
    is_json = data.lstrip()[:1] == b"{" or file.suffix == ".json"
    inner, kind = (
        (_json(file, data), JsonTokenizer) if is_json else (_sentencepiece(file, data), SentencePieceTokenizer)
    )
    bos = None if said.get("add_bos_token") is False else "auto"
    if end is None:
        candidate = said.get("eos_token")
        tokenizer = None
        if candidate is not None:
            try:
                tokenizer = kind(inner, end=candidate, bos=bos, name=str(file))
            except UserError:  # what stands beside the file is a hint, not an order
                tokenizer = None
        return tokenizer or kind(inner, bos=bos, name=str(file))
    return kind(inner, end=end, bos=bos, name=str(file))


def _file(path: str) -> Path:
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"the tokenizer was not found: {path}")
    if not found.is_dir():
        return found
    for name in ("tokenizer.json", "tokenizer.model"):
        if (found / name).is_file():
            return found / name
    models = sorted(found.glob("*.model"))
    if len(models) == 1:
        return models[0]
    raise UserError(f"the folder {path} holds no tokenizer.json and no single sentencepiece .model")


def _beside(folder: Path) -> dict[str, Any]:
    """What `tokenizer_config.json` says. A damaged one says nothing: the tokeniser itself is whole without it."""
    try:
        said = json.loads((folder / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(said, dict):
        return {}
    end = said.get("eos_token")
    said["eos_token"] = end.get("content") if isinstance(end, dict) else end if isinstance(end, str) else None
    return said


def _json(file: Path, data: bytes) -> Any:
    try:
        from tokenizers import Tokenizer as Inner
    except ImportError:
        raise UserError(f"{file} needs the package tokenizers: pip install 'jaxpar[tokenizers]'") from None
    try:
        return Inner.from_buffer(data)
    except Exception as e:  # the package raises bare Exception
        raise UserError(f"{file} is not a whole tokenizer.json: {_line(e)}") from None


def _sentencepiece(file: Path, data: bytes) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(f"{file} needs the package sentencepiece: pip install 'jaxpar[tokenizers]'") from None
    try:
        inner = SentencePieceProcessor(model_proto=data)
        size = inner.vocab_size()
    except Exception as e:
        raise UserError(f"{file} is neither a tokenizer.json nor a sentencepiece model: {_line(e)}") from None
    if not data or size < 1:
        raise UserError(f"{file} is neither a tokenizer.json nor a sentencepiece model: it holds no tokens")
    return inner


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
