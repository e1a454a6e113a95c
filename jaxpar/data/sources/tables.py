"""Columns of text: Parquet files, and Hugging Face `datasets` saved on disk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpar.data.sources.base import Document, existing, find, unreadable
from jaxpar.errors import UserError

ROWS = 256
"""Rows read at a time."""


def _import(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"this source needs the package {name.split('.')[0]}: pip install 'jaxpar[datasets]'") from None


def _bytes(value: Any, column: str, where: str) -> bytes:
    if value is None:
        return b""
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise UserError(
            f"{where}: the column {column!r} holds values of type {type(value).__name__}, but must hold text"
        )
    return value.encode("utf-8", "replace")


def _check_column(column: str, there: list[str], what: str) -> None:
    if column not in there:
        listed = ", ".join(map(repr, there)) or "none"
        raise UserError(f"{what} has no column {column!r}; its columns are: {listed} (choose with data.source.column)")


@dataclass(frozen=True)
class Parquet:
    """A Parquet file, or a folder of them. Needs the extra `datasets`.

    Texts that are empty or null are left out.

    Attributes:
      path: the file or folder.
      column: the column that holds the text.
    """

    path: str
    column: str = "text"

    def describe(self) -> str:
        return f"the Parquet data of {self.path}"

    def files(self) -> list[Path]:
        return find(self.path, "the Parquet source", (".parquet",))

    def documents(self) -> Iterator[Document]:
        pyarrow = _import("pyarrow")
        parquet = _import("pyarrow.parquet")
        files = self.files()
        for i, file in enumerate(files):
            try:
                with parquet.ParquetFile(file) as table:
                    _check_column(self.column, table.schema_arrow.names, str(file))
                    rows, row = max(1, table.metadata.num_rows), 0
                    for batch in table.iter_batches(batch_size=ROWS, columns=[self.column]):
                        for value in batch.column(0).to_pylist():
                            name = f"{file}:{row}"
                            row += 1
                            if text := _bytes(value, self.column, f"row {row - 1} of {file}"):
                                yield Document(name, text, (i + row / rows) / len(files))
            except pyarrow.ArrowException as e:
                raise UserError(f"{file} is not a whole Parquet file: {_line(e)}") from None
            except OSError as e:
                raise unreadable(file, e) from None


@dataclass(frozen=True)
class HuggingFace:
    """A folder that `datasets` has written with `save_to_disk`. Needs the extra `datasets`.

    Attributes:
      path: the folder.
      split: which split, where the folder holds several ("train").
      column: the column that holds the text.
    """

    path: str
    split: str | None = None
    column: str = "text"

    def describe(self) -> str:
        return f"the data set {self.path}"

    def files(self) -> list[Path]:
        root = existing(self.path, "the data set")
        if not (root / "dataset_dict.json").exists() and not (root / "state.json").exists():
            raise UserError(
                f"{self.path} is not a data set saved with datasets' save_to_disk (no state.json or dataset_dict.json)"
            )
        if self.split is not None and (root / self.split / "state.json").exists():
            return find(str(root / self.split), "the split")
        return find(self.path, "the data set")

    def documents(self) -> Iterator[Document]:
        datasets = _import("datasets")
        self.files()
        try:
            data = datasets.load_from_disk(self.path)
        except Exception as e:  # it lets out whatever its own readers raise
            raise UserError(f"{self.path} cannot be read as a data set: {_line(e)}") from None
        if isinstance(data, datasets.DatasetDict):
            there = ", ".join(map(repr, data))
            if self.split is None and len(data) > 1:
                raise UserError(f"{self.path} holds several splits, {there}; choose one with data.source.split")
            name = next(iter(data)) if self.split is None else self.split
            if name not in data:
                raise UserError(f"{self.path} has no split {name!r}; its splits are: {there}")
            data = data[name]
        _check_column(self.column, data.column_names, self.path)
        row, rows = 0, max(1, len(data))
        for batch in data.select_columns([self.column]).with_format(None).iter(batch_size=ROWS):
            for value in batch[self.column]:
                row += 1
                if text := _bytes(value, self.column, f"row {row - 1} of {self.path}"):
                    yield Document(f"{self.path}:{row - 1}", text, row / rows)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
