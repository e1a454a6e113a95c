"""Training a byte-level BPE tokeniser: what `jaxpar tokenizer train` does."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from jaxpar.data.sources.base import Source
from jaxpar.data.tokenizers import Tokenizer, utf8
from jaxpar.errors import UserError

END = "<|endoftext|>"
SMALLEST = 257


def train_bpe(source: Source, vocabulary: int, out: str | Path, *, progress: bool = False) -> Tokenizer:
    """Learn a byte-level BPE vocabulary and write it as a `tokenizer.json` (Radford et al. 2019, GPT-2, section 2.2).

    Every byte is in the vocabulary, so that any UTF-8 text can be encoded and decoded without loss. Id 0 is
    `<|endoftext|>`, the end of a document.

    Args:
      source: the text (`jaxpar.data.sources`).
      vocabulary: the number of ids. Fewer come out where the text has not so many pairs; see the result's `size`.
      out: the file to write; a folder, or a name without a suffix, gets a `tokenizer.json` inside.
      progress: show the package's own bars.

    Returns:
      The tokeniser, ready to use.

    Raises:
      UserError: bad input or no space; nothing is written then.
    """
    try:
        from tokenizers import Tokenizer as Inner
        from tokenizers import decoders, models, pre_tokenizers, trainers
    except ImportError:
        raise UserError("training a tokenizer needs the package tokenizers: pip install 'jaxpar[tokenizers]'") from None
    from jaxpar.data.tokenizer_files import JsonTokenizer

    if vocabulary < SMALLEST:
        raise UserError(
            f"a byte-level vocabulary needs at least {SMALLEST} ids (256 bytes and the end of a document), "
            f"got {vocabulary}"
        )
    file = Path(out).expanduser()
    if file.is_dir() or not file.suffix:
        file = file / "tokenizer.json"
    source.files()  # a missing file is told before anything else

    inner = Inner(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=progress,
    )
    count = 0
    failure: list[UserError] = []

    def texts():
        nonlocal count
        try:
            for document in source.documents():
                count += 1
                try:
                    yield utf8(document.text)
                except UserError as e:
                    raise UserError(f"{document.name}: {e}") from None
        except UserError as e:  # the package turns whatever an iterator raises into a bare Exception
            failure.append(e)

    inner.train_from_iterator(texts(), trainer)
    if failure:
        raise failure[0]
    if not count:
        raise UserError(f"there is no text in {source.describe()}")

    part = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(inner.to_str(pretty=True), encoding="utf-8")
        os.replace(part, file)
    except OSError as e:
        with contextlib.suppress(OSError):
            part.unlink()
        raise UserError(f"cannot write {file}: {e.strerror}") from None
    return JsonTokenizer(inner, end=END, name=str(file))
