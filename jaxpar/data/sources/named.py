"""A source by a plain word, as one types it: `--source corpus.jsonl`."""

from __future__ import annotations

from jaxpar.data.sources.base import Source, existing
from jaxpar.data.sources.jsonl import SUFFIXES, Jsonl
from jaxpar.data.sources.stdlib import Stdlib
from jaxpar.data.sources.tables import HuggingFace, Parquet
from jaxpar.data.sources.text import TextFiles


def source_from(text: str) -> Source:
    """`stdlib`, or a path, whose name and contents tell what it is.

    | path | source |
    |---|---|
    | file ending in .jsonl, .ndjson, .json, also with .gz | `Jsonl` |
    | file ending in .parquet | `Parquet` |
    | any other file | `TextFiles` |
    | folder written by datasets' `save_to_disk` | `HuggingFace` |
    | folder whose files end in one of these | the same as for a file |
    | any other folder | `TextFiles` |

    Raises:
      UserError: there is nothing at that path.
    """
    if text == "stdlib":
        return Stdlib()
    path = existing(text, "the data source (stdlib, a file or a folder)")
    if path.is_file():
        return _by_name([path.name])(text)
    names = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    if names & {"state.json", "dataset_dict.json"}:
        return HuggingFace(text)
    return _by_name([file.name for file in path.rglob("*") if file.is_file() and not file.name.startswith(".")])(text)


def _by_name(names: list[str]):
    for suffixes, kind in ((SUFFIXES, Jsonl), ((".parquet",), Parquet)):
        if names and all(name.endswith(suffixes) for name in names):
            return kind
    return TextFiles
