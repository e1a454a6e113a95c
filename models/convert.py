"""Published models in and out: Hugging Face folders and GGUF files <-> (ModelConfig, parameters).

    cfg, params = load("folder")            # or "model.gguf"
    save_hf(cfg, params, "other-folder")

Every tensor of a file is used, known to hold nothing learned, or refused by name; every parameter is found or named.
Parameters are read into the stack layer by layer: memory is the float32 parameters and one tensor.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.families import FAMILIES
from jaxpar.models.families.gguf_metadata import FACTORS, Keys
from jaxpar.models.families.table import LAYER, Family, Row
from jaxpar.models.gguf_file import GGUFFile, vocabulary
from jaxpar.models.hf_folder import CONFIG, DTYPES, HFFolder, read_json, write_folder
from jaxpar.models.spec import ParamSpec, flatten

Tree = Any
log = logging.getLogger("jaxpar")

UNEMBED = "head/unembed/kernel"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""Files that hold a whole tokenizer, the preferred first."""
TOKENIZER_COMPANIONS = (
    *TOKENIZER_FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


class Source(Protocol):
    """Where tensors come from: `HFFolder` or `GGUFFile`."""

    path: Path

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor."""

    def read(self, name: str) -> np.ndarray:
        """A tensor, as float32."""


def is_gguf(path: str | Path) -> bool:
    """Whether this path means a GGUF file rather than a folder."""
    return Path(path).suffix.lower() == ".gguf" or Path(path).is_file()


def load(path: str | Path) -> tuple[ModelConfig, Tree]:
    """A GGUF file or a Hugging Face folder; see `load_gguf` and `load_hf`."""
    return load_gguf(path) if is_gguf(path) else load_hf(path)


def load_config(path: str | Path) -> ModelConfig:
    """The configuration alone, without reading weights."""
    return _gguf_config(GGUFFile(path))[1] if is_gguf(path) else _hf_config(Path(path))[1]


def load_hf(folder: str | Path) -> tuple[ModelConfig, Tree]:
    """A Hugging Face folder: `config.json` and safetensors.

    Returns:
      The configuration and the parameters as NumPy float32, of the shapes that `decoder.spec` declares.

    Raises:
      FileNotFoundError, ValueError: one sentence: an option that we do not have, a tensor that is missing, unknown or
        of another shape, a file that is cut short.
    """
    family, cfg = _hf_config(Path(folder))
    with HFFolder(folder) as source:
        return cfg, fill(cfg, family, source, gguf=False)


def load_gguf(path: str | Path) -> tuple[ModelConfig, Tree]:
    """A GGUF file, dequantised; otherwise as `load_hf`."""
    source = GGUFFile(path)
    family, cfg = _gguf_config(source)
    return cfg, fill(cfg, family, source, gguf=True)


def _hf_config(folder: Path) -> tuple[Family, ModelConfig]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    hf = read_json(folder / CONFIG)
    kind = hf.get("model_type")
    for family in FAMILIES:
        if kind in (family.name, *family.aliases):
            return family, family.to_config(hf)
    known = ", ".join(name for family in FAMILIES for name in (family.name, *family.aliases))
    raise ValueError(f"{folder / CONFIG}: model_type is {kind!r}; known are {known}")


def _gguf_config(file: GGUFFile) -> tuple[Family, ModelConfig]:
    for family in FAMILIES:
        if family.gguf == file.architecture:
            keys = Keys(file.metadata, file.shapes(), file.factors())
            hf = family.gguf_config(keys)
            keys.done()
            return family, family.to_config(hf)
    known = ", ".join(family.gguf for family in FAMILIES if family.gguf)
    raise ValueError(f"{file.path} holds a {file.architecture!r} model; known are {known}")


def fill(cfg: ModelConfig, family: Family, source: Source, gguf: bool) -> Tree:
    """The parameters of `cfg` from the tensors of `source`, by the family's table."""
    specs = flatten(decoder.spec(cfg))
    there = source.shapes()
    spelled = _spelling(family, there) if not gguf else lambda name: name
    found: dict[str, np.ndarray] = {}
    used = {FACTORS} if gguf else set()
    for row in family.table(specs):
        template, layout = row.column(gguf)
        one = _one_shape(row, specs)
        for layer in range(cfg.layers if row.stacked else 1):
            name = spelled(template.replace(LAYER, str(layer)))
            if name not in there:
                raise ValueError(f"{source.path} has no tensor {name!r}, which {' and '.join(row.paths)} needs")
            if there[name] != layout.theirs(one):
                raise ValueError(
                    f"{source.path}: tensor {name} has shape {there[name]}, and its configuration asks for "
                    f"{layout.theirs(one)}"
                )
            used.add(name)
            value = layout.read(source.read(name), one)
            for path, part in zip(row.paths, value if len(row.paths) > 1 else [value], strict=True):
                if row.stacked:
                    found.setdefault(path, np.empty(specs[path].shape, np.float32))[layer] = part
                else:
                    found[path] = np.ascontiguousarray(part)
    _check_rest(cfg, family, source, set(there) - used, found, spelled, gguf)
    return _nest(found)


def _spelling(family: Family, there: dict[str, Any]):
    """How this file spells the table's names: told by its embedding."""
    embedding = next(row.name for row in family.rows if row.path == "embedding/tokens")
    for theirs, ours in (("", ""), *family.spellings):
        spelled = lambda name, a=theirs, b=ours: a + name[len(b) :] if name.startswith(b) else name
        if spelled(embedding) in there:
            return spelled
    return lambda name: name


def _one_shape(row: Row, specs: dict[str, ParamSpec]) -> tuple[int, ...]:
    """The shape, in our layout, of what one tensor of the file holds."""
    shapes = {specs[path].shape[1:] if row.stacked else specs[path].shape for path in row.paths}
    if len(shapes) > 1:
        raise ValueError(f"{row.name} holds {', '.join(row.paths)} together, so they must have one shape, not {shapes}")
    (shape,) = shapes
    return shape if len(row.paths) == 1 else (len(row.paths), *shape)


def _check_rest(cfg, family, source, rest: set[str], found, spelled, gguf: bool) -> None:
    """Account for every tensor that no parameter asked for."""
    unembed = next(row for row in family.rows if row.path == UNEMBED).column(gguf)
    name = spelled(unembed[0])
    if cfg.tied_embeddings and name in rest:
        # Some files carry the output projection although it is tied. It must then be the embedding.
        tokens = found["embedding/tokens"]
        if source.shapes()[name] != tokens.shape or not np.array_equal(source.read(name), tokens):
            raise ValueError(
                f"{source.path}: tie_word_embeddings is true, but tensor {name} is not the embedding; set "
                "tie_word_embeddings to false in config.json"
            )
        rest = rest - {name}
    unknown = {name for name in rest if not any(re.search(pattern, name) for pattern in family.left_out)}
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ValueError(f"{source.path}: tensor {min(unknown)!r}{more} has no place in this {family.name} model")
    if rest:
        log.info("%s: %d tensors are not of the language model and were left out", source.path, len(rest))


def _nest(flat: dict[str, Any]) -> Tree:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree


def family_of(cfg: ModelConfig, name: str | None = None) -> Family:
    """The family that can hold a model of this configuration.

    Args:
      name: a `model_type`. None: the first that fits.

    Raises:
      ValueError: none fits, and why.
    """
    if name is not None and name not in [family.name for family in FAMILIES]:
        raise ValueError(f"there is no family {name!r}; known are {', '.join(family.name for family in FAMILIES)}")
    why = {}
    for family in FAMILIES:
        if name in (None, family.name):
            reason = family.misfit(cfg)
            if reason is None:
                return family
            why[family.name] = reason
    raise ValueError(
        "this model cannot be written as a Hugging Face model: "
        + "; ".join(f"not {family}, because {reason}" for family, reason in why.items())
    )


@dataclass(frozen=True)
class TokenIds:
    """Ids that mean something to a tokenizer; stops end a text or a turn."""

    bos: int | None = None
    stops: tuple[int, ...] = ()
    padding: int | None = None


def token_ids(path: str | Path) -> TokenIds:
    """What a GGUF file, or a folder's `generation_config.json` and `config.json`, says of them."""
    if is_gguf(path):
        found = vocabulary(GGUFFile(path))
        return TokenIds(found.bos, found.stops, found.padding)
    said = read_json(Path(path) / CONFIG)
    said = {**said.get("text_config", {}), **{k: v for k, v in said.items() if v is not None}}
    if (Path(path) / "generation_config.json").is_file():
        said.update((k, v) for k, v in read_json(Path(path) / "generation_config.json").items() if v is not None)
    stops = said.get("eos_token_id")
    stops = () if stops is None else tuple(stops) if isinstance(stops, list) else (stops,)
    return TokenIds(said.get("bos_token_id"), stops, said.get("pad_token_id"))


def tokenizer_path(path: str | Path) -> Path | None:
    """The file that holds a model's tokenizer: in a folder, or the GGUF file itself. None: there is none."""
    if is_gguf(path):
        return Path(path)
    return next((Path(path) / name for name in TOKENIZER_FILES if (Path(path) / name).is_file()), None)


def tokenizer_files(folder: str | Path) -> list[Path]:
    """Everything in a folder that belongs to its tokenizer, to be kept beside exported weights."""
    return [Path(folder) / name for name in TOKENIZER_COMPANIONS if (Path(folder) / name).is_file()]


def export_config(
    cfg: ModelConfig, family: Family, dtype: str = "float32", ids: TokenIds = TokenIds()
) -> dict[str, Any]:
    """The `config.json` of an exported model."""
    return {
        **family.from_config(cfg),
        "model_type": family.name,
        "architectures": [family.architecture],
        "dtype": dtype,
        "bos_token_id": ids.bos,
        "eos_token_id": list(ids.stops) if len(ids.stops) > 1 else next(iter(ids.stops), None),
        "pad_token_id": ids.padding,
    }


def save_hf(
    cfg: ModelConfig,
    params: Tree,
    folder: str | Path,
    *,
    dtype: str = "float32",
    family: str | None = None,
    ids: TokenIds = TokenIds(),
    files: Iterable[Path] = (),
    shard_bytes: int = 2 << 30,
) -> Path:
    """Write a Hugging Face folder, whole or not at all.

    Args:
      params: arrays of NumPy or JAX, of the shapes that `decoder.spec(cfg)` declares.
      folder: must not exist, or be empty.
      dtype: "float32" or "bfloat16", of the file.
      family: a `model_type`. None: the first that fits.
      ids: written to `config.json`.
      files: copied beside the weights (a tokenizer: `tokenizer_files`).
      shard_bytes: a larger model is written in several files.

    Raises:
      FileExistsError, ValueError: one sentence: no family fits, shapes that differ, no room.
    """
    if dtype not in DTYPES:
        raise ValueError(f"weights are written as {' or '.join(DTYPES)}, not {dtype!r}")
    chosen = family_of(cfg, family)
    specs = flatten(decoder.spec(cfg))
    arrays = flatten(params)
    for path in sorted(set(specs) ^ set(arrays)):
        raise ValueError(f"the parameters {'lack' if path in specs else 'have an unknown'} {path}")
    for path, s in specs.items():
        if tuple(arrays[path].shape) != s.shape:
            raise ValueError(f"parameter {path} has shape {tuple(arrays[path].shape)}, and {s.shape} is needed")
    rows = list(chosen.table(specs))
    total = sum(s.size for s in specs.values()) * DTYPES[dtype].itemsize
    config = export_config(cfg, chosen, dtype, ids)
    return write_folder(folder, config, _tensors(cfg, rows, arrays, DTYPES[dtype]), total, shard_bytes, files)


def _tensors(cfg, rows: list[Row], arrays: dict[str, Any], dtype) -> Iterator[tuple[str, np.ndarray]]:
    for row in rows:
        template, layout = row.column(gguf=False)
        held = [np.asarray(arrays[path]) for path in row.paths]
        for layer in range(cfg.layers if row.stacked else 1):
            parts = [x[layer] for x in held] if row.stacked else held
            value = layout.write(np.stack(parts) if len(parts) > 1 else parts[0])
            yield template.replace(LAYER, str(layer)), value.astype(dtype)


def convert(
    source: str | Path, target: str | Path, *, dtype: str = "float32", files: Iterable[Path] = (), **options
) -> tuple[ModelConfig, Path]:
    """A GGUF file or a Hugging Face folder -> a Hugging Face folder, with the tokenizer that a folder has.

    Args:
      files: further files to put beside the weights.
      options: as `save_hf`.
    """
    kept = [] if is_gguf(source) else tokenizer_files(source)
    cfg, params = load(source)
    return cfg, save_hf(cfg, params, target, dtype=dtype, ids=token_ids(source), files=[*kept, *files], **options)
