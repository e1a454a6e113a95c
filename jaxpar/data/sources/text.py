"""Text files and folders."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from jaxpar.data.sources.base import Document, find, unreadable
from jaxpar.errors import UserError

LARGEST = 2**20
PIECES = 256
BLOCK = 2**20


@dataclass(frozen=True)
class TextFiles:
    """A text file, or a folder of them with all its sub-folders (hidden ones left out).

    Bytes that are not UTF-8 pass through unchanged with the bytes tokenizer; others refuse them.

    Attributes:
      path: the file or folder.
      pattern: which files of a folder, as a glob: `**/*.md`.
      separator: text between the documents of a file, such as `<|endoftext|>`; it belongs to none of them. None: a
        file is a document, except for `document_bytes`.
      document_bytes: longer documents are cut after about so many bytes, at the end of a line. None: 1 MiB, and a
        source that is a single file without a separator is cut into about 256 documents, since documents are what is
        divided between training and validation.
    """

    path: str
    pattern: str = "**/*"
    separator: str | None = None
    document_bytes: int | None = None

    def __post_init__(self):
        if self.separator == "":
            raise UserError("data.source.separator is empty; leave it out for none")
        if self.document_bytes is not None and self.document_bytes < 1:
            raise UserError(f"data.source.document_bytes must be at least 1, got {self.document_bytes}")

    def describe(self) -> str:
        return f"the text of {self.path}"

    def files(self) -> list[Path]:
        return find(self.path, "the text source", pattern=self.pattern)

    def documents(self) -> Iterator[Document]:
        files = self.files()
        root = Path(self.path).expanduser()
        total = max(1, sum(file.stat().st_size for file in files))
        before = 0
        for file in files:
            size = file.stat().st_size
            limit = self.document_bytes or LARGEST
            if self.document_bytes is None and self.separator is None and root.is_file():
                limit = min(max(size // PIECES, 1024), LARGEST)
            name = file.name if root.is_file() else file.relative_to(root).as_posix()
            several = size > limit or self.separator is not None
            try:
                with open(file, "rb") as f:
                    pieces = cut(f, limit) if self.separator is None else split(f, self.separator.encode(), limit)
                    for i, text in enumerate(pieces):
                        yield Document(f"{name}#{i}" if several else name, text, (before + f.tell()) / total)
            except OSError as e:
                raise unreadable(file, e) from None
            before += size


def cut(file: BinaryIO, limit: int) -> Iterator[bytes]:
    """Pieces of `limit` bytes, made longer to the end of a line, or, where lines are longer than that, of a character.

    The pieces together are the file.
    """
    while text := file.read(limit):
        if not text.endswith(b"\n"):
            text += file.readline(limit)
        # Only after a cut inside an endless line: the continuation bytes of a UTF-8 character, at most three.
        while not text.endswith(b"\n") and (following := file.read(1)):
            if following[0] & 0xC0 != 0x80:
                file.seek(-1, 1)
                break
            text += following
            if len(text) > 2 * limit + 3:  # not UTF-8 at all
                break
        yield text


def split(file: BinaryIO, separator: bytes, limit: int) -> Iterator[bytes]:
    """What stands between separators, without empty pieces, each cut as `cut` does."""
    rest, start = bytearray(), 0  # a bytearray grows without being copied, however long there is no separator
    while block := file.read(BLOCK):
        rest += block
        if (at := rest.find(separator, start)) >= 0:
            for text in (rest[:at], *(parts := rest[at + len(separator) :].split(separator))[:-1]):
                yield from cut(io.BytesIO(text), limit)
            rest = parts[-1]
        # What was searched without success needs no second search, but for a separator that the block cut in two.
        start = max(0, len(rest) - len(separator) + 1)
    yield from cut(io.BytesIO(rest), limit)
