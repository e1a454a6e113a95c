"""What a source of text is, and what all of them share: listing files, and saying what they hold."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxpar.errors import UserError

HASHED_BYTES = 64 * 2**20
"""Sources up to this size are told apart by their contents (50 ms), larger ones by path, sizes and times."""


class Document(NamedTuple):
    """One piece of text.

    Attributes:
      name: where it came from, for messages: `notes/a.txt`, `train.jsonl:17`.
      text: its bytes; UTF-8 except where the source's files are something else.
      done: the part of the source that has been read by now, from 0 to 1.
      weight: multiplies the loss of each of its tokens.
    """

    name: str
    text: bytes
    done: float
    weight: float = 1.0


@runtime_checkable
class Source(Protocol):
    """A source is a frozen dataclass (its own configuration) with these methods. A new one needs no other line than
    its place in `jaxpar.data.config.AnySource`."""

    def files(self) -> list[Path]:
        """Every file that is read, sorted.

        Raises:
          UserError: there is none.
        """
        ...

    def documents(self) -> Iterator[Document]:
        """All documents, always in the same order; empty ones are left out.

        Raises:
          UserError: a document that cannot be read, with the place where it stands.
        """
        ...

    def describe(self) -> str:
        """A few words for messages: "the files of corpus/"."""
        ...


def existing(path: str, what: str) -> Path:
    """The path, or a sentence."""
    if not path:
        raise UserError(f"{what} needs a path")
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"{what} not found: {path}")
    return found


def find(path: str, what: str, suffixes: tuple[str, ...] = (), pattern: str = "**/*") -> list[Path]:
    """A file itself, or the files of a folder and its sub-folders that match, without hidden ones, sorted by name."""
    root = existing(path, what)
    if root.is_file():
        return [root]
    try:
        matching = list(root.glob(pattern))
    except (ValueError, NotImplementedError) as e:
        raise UserError(f"data.source.pattern {pattern!r} is no relative glob such as **/*.txt: {e}") from None
    found = [
        file
        for file in matching
        if file.is_file()
        and (not suffixes or file.name.endswith(suffixes))
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
    if not found:
        wanted = f" ending in {' or '.join(suffixes)}" if suffixes else f" matching {pattern!r}"
        raise UserError(f"the folder {path} holds no file{wanted}")
    # By parts, as text: the same order on every machine.
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def unreadable(file: Path, error: OSError) -> UserError:
    return UserError(f"cannot read {file}: {error.strerror or error}")


def _digest(file: Path) -> str:
    try:
        with open(file, "rb") as f:
            return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as e:
        raise unreadable(file, e) from None


def manifest(source: Any) -> dict[str, Any]:
    """What a source holds, as far as it can be told without reading everything: two equal manifests mean equal
    documents. Plain values, so that it can be hashed and printed.

    Raises:
      UserError: a file that cannot be read.
    """
    files = source.files()
    root = Path(os.path.commonpath([f.parent for f in files]))
    try:
        stats = [file.stat() for file in files]
    except OSError as e:
        raise unreadable(Path(e.filename), e) from None
    options = {f.name: getattr(source, f.name) for f in dataclasses.fields(source) if f.name != "path"}
    if sum(s.st_size for s in stats) <= HASHED_BYTES:
        listed = [[f.relative_to(root).as_posix(), _digest(f)] for f in files]
        return {"kind": type(source).__name__, "options": options, "files": listed}
    listed = [[f.relative_to(root).as_posix(), s.st_size, s.st_mtime_ns] for f, s in zip(files, stats, strict=True)]
    return {"kind": type(source).__name__, "options": options, "root": str(root.resolve()), "files": listed}
