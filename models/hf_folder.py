"""The files of a Hugging Face model folder: `config.json` and safetensors, whole or in shards."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")
DTYPES = {"float32": np.dtype("float32"), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def read_json(path: Path) -> dict:
    """A JSON object.

    Raises:
      FileNotFoundError, ValueError: one sentence.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path.name} in {path.parent}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise ValueError(f"{path} is not valid JSON ({e})") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__}, and must hold an object")
    return found


class HFFolder:
    """The tensors of a folder's safetensors files: a source of tensors for `convert.fill`, and a context manager.

    Raises:
      FileNotFoundError, ValueError: one sentence: no weights, a missing shard, a file that is cut short.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder)
        self._stack = contextlib.ExitStack()
        self._file_of: dict[str, Any] = {}
        with contextlib.ExitStack() as opening:
            opening.callback(self._stack.close)
            for name in self._files():
                file = self._open(name)
                self._file_of.update((key, file) for key in file.keys())  # noqa: SIM118
            opening.pop_all()

    def __enter__(self) -> HFFolder:
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def _files(self) -> list[str]:
        if (self.path / INDEX).is_file():
            shards = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ValueError(f"{self.path / INDEX} has no weight_map")
            return sorted(set(shards.values()))
        if (self.path / WEIGHTS).is_file():
            return [WEIGHTS]
        others = [p.name for pattern in ("*.bin", "*.pth", "*.pt", "*.h5") for p in self.path.glob(pattern)]
        also = f"; it has {others[0]}, and only safetensors files are read" if others else ""
        raise FileNotFoundError(f"there is neither {WEIGHTS} nor {INDEX} in {self.path}{also}")

    def _open(self, name: str) -> Any:
        path = self.path / name
        if not path.is_file():
            raise FileNotFoundError(f"{self.path / INDEX} names {name}, which is not there")
        try:
            return self._stack.enter_context(safe_open(path, framework="np"))
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path} is cut short, corrupted, or no safetensors file ({e})") from e

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._file_of.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor, as float32."""
        file = self._file_of[name]
        kind = file.get_slice(name).get_dtype()
        if kind not in FLOATS:
            raise ValueError(f"{self.path}: tensor {name} is {kind}; only {', '.join(FLOATS)} are read")
        return file.get_tensor(name).astype(np.float32, copy=False)


def write_folder(
    folder: str | Path,
    config: dict,
    tensors: Iterable[tuple[str, np.ndarray]],
    total_bytes: int,
    shard_bytes: int,
    files: Iterable[Path] = (),
) -> Path:
    """Write a model folder whole, or not at all: it appears under its name when everything in it is on disk.

    Args:
      folder: must not exist, or be empty.
      config: becomes `config.json`.
      tensors: names and values, made one at a time; at most `shard_bytes` of them are held.
      total_bytes: how many bytes they are together.
      files: copied beside them (a tokenizer).

    Raises:
      FileExistsError: the folder holds something.
      ValueError: the disk has too little room.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; name a new folder, or remove that one first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    files = list(files)
    needed, free = total_bytes + sum(f.stat().st_size for f in files), shutil.disk_usage(folder.parent).free
    if needed > free:
        raise ValueError(f"the model needs {needed:,} bytes, and the disk of {folder.parent} has {free:,} free")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed writer left
    partial.mkdir()
    try:
        _write_weights(partial, tensors, total_bytes, shard_bytes)
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in files:
            shutil.copyfile(file, partial / file.name)
        for path in (*partial.iterdir(), partial):
            _sync(path)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(folder.parent)
    return folder


def _write_weights(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], total: int, shard_bytes: int) -> None:
    shards: list[list[str]] = []
    held: dict[str, np.ndarray] = {}

    def flush():
        save_file(held, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(held))
        held.clear()

    for name, value in tensors:
        if held and sum(v.nbytes for v in held.values()) + value.nbytes > shard_bytes:
            flush()
        held[name] = np.ascontiguousarray(value)
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / WEIGHTS)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {key: names[i] for i, keys in enumerate(shards) for key in keys},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
