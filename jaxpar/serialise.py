"""Frozen dataclasses to JSON and back: how a checkpoint and `metrics.jsonl` hold a configuration.

A member of a union (a strategy) is written with its class name under "kind". Reading checks every field against the
dataclass, so that a configuration of another version fails with a sentence and not with a silent default.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from jaxpar.errors import UserError


def to_json(value: Any) -> Any:
    """Nested dataclasses, tuples and plain values -> dicts, lists and plain values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if "kind" in fields:
            raise TypeError(f"{type(value).__name__} has a field 'kind', which says here what class it is; rename it")
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {k: to_json(v) for k, v in value.items()}
    return value


def from_json(cls: Any, value: Any, where: str = "config") -> Any:
    """The inverse of `to_json`, for the type `cls` (a dataclass, a union, or a plain type).

    Raises:
      UserError: an unknown kind or field, or a field that is missing.
    """
    if dataclasses.is_dataclass(cls):
        return _dataclass(cls, value, where)
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if origin in (typing.Union, types.UnionType):
        return _union(args, value, where)
    if origin is tuple and isinstance(value, list):
        element = args[0] if args else Any
        return tuple(from_json(element, v, f"{where}[{i}]") for i, v in enumerate(value))
    if cls is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return value


def _dataclass(cls, value, where):
    if not isinstance(value, dict):
        raise UserError(f"{where} should hold the fields of {cls.__name__}, but is {value!r}")
    value = dict(value)
    kind = value.pop("kind", cls.__name__)
    if kind != cls.__name__:
        raise UserError(f"{where} is a {kind}, but {cls.__name__} was expected")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    if unknown := sorted(value.keys() - known.keys()):
        raise UserError(f"{where} has the fields {unknown}, which {cls.__name__} of this version does not know")
    needed = {
        name
        for name, f in known.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(needed - value.keys()):
        raise UserError(f"{where} lacks the fields {missing} of {cls.__name__}")
    return cls(**{name: from_json(hints[name], v, f"{where}.{name}") for name, v in value.items()})


def _union(members, value, where):
    if value is None and type(None) in members:
        return None
    classes = {m.__name__: m for m in members if dataclasses.is_dataclass(m)}
    if isinstance(value, dict) and classes:
        kind = value.get("kind", next(iter(classes)) if len(classes) == 1 else None)
        if kind not in classes:
            raise UserError(f"{where} is of kind {kind!r}, but can be {', '.join(classes)}")
        return _dataclass(classes[kind], value, where)
    plain = [m for m in members if m is not type(None) and not dataclasses.is_dataclass(m)]
    return from_json(plain[0], value, where) if plain else value
