"""The built-in corpus: the sources of Python's own standard library. Every machine that runs jaxpar has it."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxpar.data.sources.base import Document, unreadable
from jaxpar.errors import UserError

LEFT_OUT = frozenset(
    (
        *("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"),  # tests, others' packages
        *("encodings", "pydoc_data", "__phello__"),  # tables and generated text
        *("idlelib", "lib2to3", "distutils", "turtledemo", "ensurepip"),  # not in every installation
    )
)


@dataclass(frozen=True)
class Stdlib:
    """The .py files of this Python's standard library: about 9 MB in 400 files of Python and English.

    Left out are tests, tables, and parts that not every installation has. The text differs a little between versions
    of Python.

    Attributes:
      megabytes: read only about this much, in units of 10^6 bytes, files chosen evenly. None: everything.
    """

    megabytes: float | None = None

    def __post_init__(self):
        if self.megabytes is not None and not self.megabytes > 0:
            raise UserError(
                f"data.source.megabytes must be positive, got {self.megabytes}; leave it out for everything"
            )

    def describe(self) -> str:
        return "the Python standard library"

    def _root(self) -> Path:
        return Path(sysconfig.get_paths()["stdlib"])

    def files(self) -> list[Path]:
        root = self._root()
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in LEFT_OUT and not f.startswith(("config-", ".")))
            found += [Path(folder, name) for name in names if name.endswith(".py")]
        found = [file for file in found if file.is_file() and file.stat().st_size]
        if not found:
            raise UserError(
                f"this Python has no standard library sources under {root}; give text with --source PATH instead"
            )
        name = lambda file: file.relative_to(root).as_posix()
        if self.megabytes is not None:
            # By the hash of the name, so that a part of it is like the whole and not its first letters.
            found.sort(key=lambda file: hashlib.blake2b(name(file).encode(), digest_size=8).digest())
            kept, size = [], 0
            for file in found:
                if kept and size >= self.megabytes * 1e6:
                    break
                kept.append(file)
                size += file.stat().st_size
            found = kept
        return sorted(found, key=name)

    def documents(self) -> Iterator[Document]:
        root, files = self._root(), self.files()
        total, done = sum(file.stat().st_size for file in files), 0
        for file in files:
            try:
                text = file.read_bytes()
            except OSError as e:
                raise unreadable(file, e) from None
            done += len(text)
            yield Document(file.relative_to(root).as_posix(), text, done / total)
