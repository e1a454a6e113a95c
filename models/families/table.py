"""A family of published models as one declarative table, used in both directions.

A `Row` says where a parameter of ours lies in a Hugging Face file and in a GGUF file, and how it is laid out there. A
`Family` is its rows, its `config.json` in both directions, and its GGUF metadata. Whether a configuration fits a family
needs no rules of its own: it is written as `config.json`, read back and compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import einops

from jaxpar.models.config import ModelConfig
from jaxpar.models.families.gguf_metadata import Keys
from jaxpar.models.positions import Learned, Rope

LAYER = "{layer}"
TRAINING_ONLY = ("init_std", "dropout", "dtype", "remat", "layer_loop", "loss_chunk", "attention_implementation")
"""Fields of `ModelConfig` that do not change what a trained model computes (in exact arithmetic)."""


@dataclass(frozen=True)
class Layout:
    """How a tensor is laid out in a file, as an einops pattern `theirs -> ours`; its own inverse by turning it round.

    Attributes:
      pattern: for example `(h k) d -> d h k`. Empty: the same on both sides.
      sizes: lengths that the shape of ours does not tell, for example `two=2`.
      plus: what the file's values exceed ours by (GGUF stores Gemma's norms as 1 + scale).
    """

    pattern: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    plus: float = 0.0

    def _sizes(self, ours: tuple[int, ...]) -> dict[str, int]:
        sizes = dict(self.sizes)
        for axes, length in zip(_groups(self.pattern.split("->")[1]), ours, strict=True):
            known = math.prod(sizes[a] for a in axes if a in sizes)
            for axis in axes:
                sizes.setdefault(axis, length // known)
        return sizes

    def theirs(self, ours: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in the file of a parameter whose shape here is `ours`."""
        if not self.pattern:
            return ours
        sizes = self._sizes(ours)
        return tuple(math.prod(sizes[a] for a in axes) for axes in _groups(self.pattern.split("->")[0]))

    def read(self, x, ours: tuple[int, ...]):
        """From the file's layout to ours."""
        if self.pattern:
            sizes = self._sizes(ours)
            x = einops.rearrange(x, self.pattern, **{a: sizes[a] for a in _names(self.pattern)})
        return x - self.plus if self.plus else x

    def write(self, x):
        """From our layout to the file's."""
        if self.pattern:
            left, right = self.pattern.split("->")
            sizes = self._sizes(x.shape)
            x = einops.rearrange(x, f"{right} -> {left}", **{a: sizes[a] for a in _names(self.pattern)})
        return x + self.plus if self.plus else x


def _groups(side: str) -> list[list[str]]:
    """`(h k) d` -> [[h, k], [d]]."""
    return [(a or b).split() for a, b in re.findall(r"\(([^)]*)\)|(\S+)", side)]


def _names(pattern: str) -> set[str]:
    return set(re.findall(r"\w+", pattern))


@dataclass(frozen=True)
class Row:
    """One tensor of the file.

    Attributes:
      path: ours, as in `spec.flatten`. Several: the file's tensor holds them together, and its layout puts them on a
        new leading dimension (GPT-2's fused query, key, value).
      name: in a Hugging Face file; `{layer}` stands for the layer's index.
      layout: how it lies there.
      gguf: in a GGUF file.
      gguf_layout: how it lies there. None: as in the Hugging Face file.
    """

    path: str | tuple[str, ...]
    name: str
    layout: str | Layout
    gguf: str
    gguf_layout: str | Layout | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        return (self.path,) if isinstance(self.path, str) else self.path

    @property
    def stacked(self) -> bool:
        return LAYER in self.name

    def column(self, gguf: bool) -> tuple[str, Layout]:
        """The name and the layout of this row in one of the two kinds of file."""
        layout = self.gguf_layout if gguf and self.gguf_layout is not None else self.layout
        return self.gguf if gguf else self.name, Layout(layout) if isinstance(layout, str) else layout


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face's.

    Attributes:
      name: as `config.json` writes it in `model_type`.
      architecture: as it writes it in `architectures`.
      rows: the table.
      to_config: a `config.json` -> ModelConfig. ValueError with one sentence for what we do not have.
      from_config: the other way. ValueError where one of its numbers cannot be written.
      gguf: `general.architecture` of its GGUF files. None: they go by another family's.
      gguf_config: their metadata -> a `config.json`.
      aliases: further `model_type`s that are read, but not written.
      spellings: `(a, b)`: in some files the table's names begin with `a` instead of `b`.
      left_out: patterns of tensors that a file may hold and a language model does not need.
    """

    name: str
    architecture: str
    rows: tuple[Row, ...]
    to_config: Callable[[dict], ModelConfig]
    from_config: Callable[[ModelConfig], dict]
    gguf: str | None
    gguf_config: Callable[[Keys], dict]
    aliases: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    left_out: tuple[str, ...] = (r"\.rotary_emb\.inv_freq$",)

    def table(self, specs: dict[str, Any]) -> Iterator[Row]:
        """The rows of the parameters that exist.

        Args:
          specs: path -> ParamSpec, as `spec.flatten(decoder.spec(cfg))`.

        Raises:
          ValueError: a parameter has no row.
        """
        rows = [row for row in self.rows if all(path in specs for path in row.paths)]
        without = set(specs) - {path for row in rows for path in row.paths}
        if without:
            raise ValueError(f"a {self.name} file has no place for the parameter {min(without)}")
        return iter(rows)

    def misfit(self, cfg: ModelConfig) -> str | None:
        """Why this family cannot hold a model of this configuration; None where it can."""
        try:
            back = self.to_config(self.from_config(cfg))
        except ValueError as e:
            return str(e)
        ours, theirs = meaning(cfg), meaning(back)
        for name, value in ours.items():
            if theirs[name] != value:
                return f"{name} is {value!r}, where {self.name} has {theirs[name]!r}"
        return None


def meaning(cfg: ModelConfig) -> dict[str, Any]:
    """What a configuration computes, so that two ways of writing the same model are equal."""
    found = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in TRAINING_ONLY}
    slides = [cfg.slides(layer) for layer in range(cfg.layers)]
    found["window_pattern"] = tuple(slides) if any(slides) else ()
    found["window"] = cfg.window if any(slides) else None
    found["attention_scale"] = cfg.scale
    found["embedding_scale"] = 1.0 if cfg.embedding_scale is None else cfg.embedding_scale
    if isinstance(cfg.positions, Rope):
        found["positions"] = (Rope.__name__, cfg.positions.fraction, tuple(map(cfg.positions.of_layer, slides)))
    if isinstance(cfg.positions, Learned):
        found["positions"] = Learned.__name__
    return found


def require(cfg: ModelConfig, family: str, **kinds: type) -> None:
    """ValueError unless these fields of the configuration are of these classes."""
    for name, kind in kinds.items():
        if type(getattr(cfg, name)) is not kind:
            raise ValueError(f"{name} is {type(getattr(cfg, name)).__name__}, where {family} has {kind.__name__}")


def shortest_pattern(slides: list[bool]) -> tuple[bool, ...]:
    """The shortest pattern that, repeated, gives these layers."""
    for n in range(1, len(slides) + 1):
        if all(s == slides[i % n] for i, s in enumerate(slides)):
            return tuple(slides[:n])
    return (True,)
