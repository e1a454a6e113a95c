"""GGUF files: metadata, tensors, and the vocabulary they carry.

Tensor types and dequantisation are the `gguf` package's. The header is parsed here: that package makes several NumPy
views for each entry, which takes it 20 s for a vocabulary of 262,144 tokens, where this takes a fraction of one.
Format: ggml's docs/gguf.md, versions 2 and 3.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpar.models.families.gguf_metadata import FACTORS

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Codes of value types -> `struct` formats."""


def _gguf():
    try:
        import gguf
    except ImportError:
        raise ValueError("reading GGUF files needs the package gguf: pip install 'jaxpar[huggingface]'") from None
    return gguf


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: its shape (outermost dimension first), the code of its type, its first byte."""

    shape: tuple[int, ...]
    type: int
    start: int


class _Cursor:
    """Little-endian values, one after the other."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def value(self, form: str) -> Any:
        (found,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return found

    def text(self) -> str:
        length = self.value("Q")
        if length > len(self.data) - self.at:
            raise EOFError
        found = self.data[self.at : self.at + length]
        self.at += length
        return found.decode("utf-8", errors="replace")

    def of_type(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.value(SCALARS[kind])
        inner, count = self.value("I"), self.value("Q")
        if inner in (STRING, ARRAY):
            return [self.of_type(inner) for _ in range(count)]
        dtype = np.dtype(SCALARS[inner]).newbyteorder("<")
        found = np.frombuffer(self.data, dtype, count, self.at).tolist()
        self.at += count * dtype.itemsize
        return found


class GGUFFile:
    """An open file. A source of tensors for `convert.fill`.

    Attributes:
      path: of the file.
      metadata: every key.
      tensors: name -> Tensor.

    Raises:
      FileNotFoundError, ValueError: one sentence: missing, no GGUF file, cut short, of a version or in parts.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"there is no file {self.path}")
        with self.path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise ValueError(f"{self.path} is not a GGUF file: it does not begin with {MAGIC.decode()!r}")
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            self._parse()
        except (struct.error, EOFError, LookupError, ArithmeticError, MemoryError, TypeError, ValueError) as e:
            if isinstance(e, ValueError) and "GGUF" in str(e):
                raise
            size = self.path.stat().st_size
            raise ValueError(f"the GGUF file {self.path} is cut short or corrupted ({size} bytes): {e!r}") from e

    def _parse(self) -> None:
        at = _Cursor(self._data)
        at.at = len(MAGIC)
        version = at.value("I")
        if version not in (2, 3):
            raise ValueError(f"the GGUF file {self.path} is of version {version:#x}; little-endian 2 and 3 are read")
        tensors, keys = at.value("Q"), at.value("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = at.text()
            self.metadata[name] = at.of_type(at.value("I"))
        found = []
        for _ in range(tensors):
            name = at.text()
            shape = [at.value("Q") for _ in range(at.value("I"))]
            found.append((name, tuple(reversed(shape)), at.value("I"), at.value("Q")))
        step = self.metadata.get("general.alignment", 32)
        first = -(-at.at // step) * step
        self.tensors = {name: Tensor(shape, kind, first + start) for name, shape, kind, start in found}
        if self.metadata.get("split.count", 1) > 1:
            raise ValueError(f"the GGUF file {self.path} is one of several parts; merge them with llama-gguf-split")
        if "general.architecture" not in self.metadata:
            raise ValueError(f"the GGUF file {self.path} does not say its general.architecture")

    @property
    def architecture(self) -> str:
        return self.metadata["general.architecture"]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def read(self, name: str) -> np.ndarray:
        """A tensor, dequantised to float32."""
        gguf = _gguf()
        tensor = self.tensors[name]
        try:
            kind = gguf.GGMLQuantizationType(tensor.type)
            shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, kind)
        except ValueError as e:
            raise ValueError(f"the GGUF file {self.path}: tensor {name}: {e}") from e
        size = int(np.prod(shape, dtype=np.int64))
        if tensor.start + size > len(self._data):
            raise ValueError(
                f"the GGUF file {self.path} is cut short: tensor {name} ends at byte {tensor.start + size}, and it "
                f"has {len(self._data)}"
            )
        stored = np.frombuffer(self._data, np.uint8, size, tensor.start).reshape(shape)
        try:
            found = gguf.dequantize(stored, kind)
        except NotImplementedError:
            raise ValueError(f"the GGUF file {self.path}: tensor {name} is {kind.name}, which cannot be read") from None
        return found.reshape(tensor.shape).astype(np.float32, copy=False)

    def factors(self) -> list[float] | None:
        """The frequency factors of RoPE; None where the file has none."""
        return self.read(FACTORS).tolist() if FACTORS in self.tensors else None


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of its tokenizer. Token types: 1 normal, 2 unknown, 3 control, 4 user-defined, 6 byte.

    Attributes:
      architecture: the file's.
      model: the kind of tokenizer: "llama" (SentencePiece), "gpt2" (byte-level BPE), ...
      pre: the name of the rule by which a byte-level tokenizer splits text first.
      tokens, scores, types: one for each id; scores and types may be empty.
      merges: pairs, best first; empty where the file has none.
      bos, eos, unknown, padding: ids.
      stops: ids that end a text or a turn.
      add_bos, add_eos: whether `encode` puts them on.
      space_prefix: whether text gets a leading space (SentencePiece).
    """

    architecture: str
    model: str
    pre: str | None
    tokens: list[str]
    scores: list[float]
    types: list[int]
    merges: list[tuple[str, str]]
    bos: int | None
    eos: int | None
    unknown: int | None
    padding: int | None
    stops: tuple[int, ...]
    add_bos: bool
    add_eos: bool
    space_prefix: bool


def vocabulary(file: GGUFFile) -> Vocabulary:
    """The tokenizer's part of the metadata.

    Raises:
      ValueError: the file carries no vocabulary.
    """
    get = lambda key, default=None: file.metadata.get(f"tokenizer.ggml.{key}", default)
    if not get("tokens"):
        raise ValueError(f"the GGUF file {file.path} carries no vocabulary (tokenizer.ggml.tokens)")
    stops = (get(f"{name}_token_id") for name in ("eos", "eot", "eom"))
    return Vocabulary(
        architecture=file.architecture,
        model=get("model", "llama"),
        pre=get("pre"),
        tokens=get("tokens"),
        scores=get("scores", []),
        types=get("token_type", []),
        merges=[tuple(merge.split(" ")) for merge in get("merges", [])],
        bos=get("bos_token_id"),
        eos=get("eos_token_id"),
        unknown=get("unknown_token_id"),
        padding=get("padding_token_id"),
        stops=tuple(dict.fromkeys(i for i in stops if i is not None)),
        # As llama.cpp: a SentencePiece vocabulary that does not say otherwise gets its first token.
        add_bos=get("add_bos_token", get("model", "llama") == "llama"),
        add_eos=get("add_eos_token", False),
        space_prefix=get("add_space_prefix", True),
    )
