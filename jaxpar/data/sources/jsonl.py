"""JSON lines: one object a line, the text in one of its fields."""

from __future__ import annotations

import gzip
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpar.data.sources.base import Document, find, unreadable
from jaxpar.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Jsonl:
    """A file of JSON lines (also compressed: .gz), or a folder of them.

    Lines that are blank, and texts that are empty or null, are left out.

    Attributes:
      path: the file or folder.
      field: the field that holds the text.
      weight_field: the field that holds a document's weight, a number of at least 0, by which the loss of each of its
        tokens is multiplied. None: every document counts 1.
    """

    path: str
    field: str = "text"
    weight_field: str | None = None

    def describe(self) -> str:
        return f"the JSON lines of {self.path}"

    def files(self) -> list[Path]:
        return find(self.path, "the JSONL source", SUFFIXES)

    def documents(self) -> Iterator[Document]:
        files = self.files()
        total = max(1, sum(file.stat().st_size for file in files))
        before = 0
        for file in files:
            try:
                with open(file, "rb") as raw:
                    lines = gzip.open(raw) if file.suffix == ".gz" else raw
                    for number, line in enumerate(lines, 1):
                        if not line.strip():
                            continue
                        name = f"{file}:{number}"
                        text, weight = self._read(line, f"line {number} of {file}")
                        if text:
                            yield Document(name, text, (before + raw.tell()) / total, weight)
            except (EOFError, gzip.BadGzipFile, zlib.error) as e:
                raise UserError(f"{file} is not whole gzip data ({e}); copy it again") from None
            except OSError as e:
                raise unreadable(file, e) from None
            before += file.stat().st_size

    def _read(self, line: bytes, where: str) -> tuple[bytes, float]:
        try:
            record = json.loads(line)
        except UnicodeDecodeError as e:
            raise UserError(f"{where} is not UTF-8 (byte {e.start} of the line)") from None
        except (ValueError, RecursionError) as e:
            why = f"{e.msg}, column {e.colno}" if isinstance(e, json.JSONDecodeError) else str(e)
            raise UserError(f"{where} is not JSON: {why}") from None
        if not isinstance(record, dict):
            raise UserError(f'{where} is {_type(record)}, but each line must be an object like {{"text": ...}}')
        text = self._field(record, self.field, where, "data.source.field")
        if text is not None and not isinstance(text, str):
            raise UserError(f"{where}: the field {self.field!r} is {_type(text)}, but must be a string")
        weight = 1.0
        if self.weight_field is not None:
            weight = self._field(record, self.weight_field, where, "data.source.weight_field")
            if isinstance(weight, bool) or not isinstance(weight, int | float):
                raise UserError(f"{where}: the weight {self.weight_field!r} is {_type(weight)}, but must be a number")
            if not 0 <= weight <= 1e30 or math.isnan(weight):
                raise UserError(f"{where}: the weight {self.weight_field!r} is {weight}; it must be a number from 0 on")
        # JSON can spell half of a surrogate pair, which UTF-8 cannot; it becomes "?", as everywhere in Python.
        return (text or "").encode("utf-8", "replace"), float(weight)

    def _field(self, record: dict[str, Any], name: str, where: str, option: str) -> Any:
        if name not in record:
            there = ", ".join(map(repr, record)) or "none"
            raise UserError(f"{where} has no field {name!r}; its fields are: {there} (choose with {option})")
        return record[name]


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
