"""The tuning cache: a JSON file of the fastest block sizes of one kind of chip under one JAX version.

    {"chip": "v5e", "jax": "0.10.2", "driver": "...",
     "entries": [{"op": "attention", "implementation": "mosaic_tpu", "dtype": "bfloat16",
                  "sizes": {"head_size": 128, "keys": 4096, "queries": 4096}, "tiles": {...}, "date": ..., "seconds": ...}]}

`tiles.look_up` takes an entry before the rows of its table. Which file: `$JAXPAR_TUNE_CACHE`, else `default(chip)`, which need
not be there. A file that is there is never passed over in silence: where it is torn, or for another chip or JAX version, every
kernel that looks its block sizes up raises.

An entry is for a class of shapes, each size rounded up to a power of two. Block sizes are upper bounds that are fitted to the
shape, so that an entry can be used for all of its class.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

VARIABLE = "JAXPAR_TUNE_CACHE"
ANEW = "measure again with `jaxpar tune`"


@dataclasses.dataclass(frozen=True)
class Entry:
    """The block sizes of an implementation of an op for a dtype and a class of shapes.

    Attributes:
      sizes: pairs of a dimension's name and its size, rounded up; sorted.
      tiles: pairs of a field of the op's tiles and its value.
      record: what else the file keeps of it (date, seconds, ...).
    """

    op: str
    implementation: str
    dtype: str
    sizes: tuple[tuple[str, int], ...]
    tiles: tuple[tuple[str, int], ...]
    record: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> tuple:
        return self.op, self.implementation, self.dtype, self.sizes


@dataclasses.dataclass(frozen=True)
class Cache:
    """What a file holds.

    Attributes:
      chip: its short name, as in `tiles.CHIPS`.
      jax: JAX's version.
      driver: of the chip, as its platform names it.
    """

    chip: str
    jax: str
    driver: str
    entries: tuple[Entry, ...] = ()

    def with_entry(self, new: Entry) -> Cache:
        """With this entry in place of one of its key."""
        kept = tuple(entry for entry in self.entries if entry.key != new.key)
        return dataclasses.replace(self, entries=(*kept, new))


def shape_class(sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """Each size rounded up to a power of two: what an entry is for."""
    return tuple(sorted((name, 1 << max(size - 1, 0).bit_length()) for name, size in sizes.items()))


def default(chip: str) -> Path:
    """`tiles/CHIP.json` beside the compiled programs: below `$JAXPAR_CACHE`, `$XDG_CACHE_HOME/jaxpar` or `~/.cache/jaxpar`."""
    if own := os.environ.get("JAXPAR_CACHE"):
        root = Path(own).expanduser().absolute()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().absolute() / "jaxpar"
    return root / "tiles" / f"{chip}.json"


def named() -> Path | None:
    """The file that `$JAXPAR_TUNE_CACHE` names, or None."""
    path = os.environ.get(VARIABLE)
    return Path(path).expanduser().absolute() if path else None


def find(op: str, implementation: str, chip: str | None, dtype, sizes: Mapping[str, int], kind: type):
    """The tiles of the cache in force, a `kind`; None where it has no entry for this.

    Args:
      chip: short name; None where it is not known.

    Raises:
      ValueError: a file that is torn or for another chip or JAX version, one that is named and is not there, or an entry
        that is no `kind`.
    """
    path = named()
    if path is None:
        if chip is None or not (path := default(chip)).exists():
            return None
    elif not path.exists():
        raise ValueError(f"{VARIABLE} = {path}, and there is no such file; {ANEW}, or unset it")
    cache = _read(path, os.stat(path).st_mtime_ns)
    check(cache, chip, path)
    key = op, implementation, dtype if isinstance(dtype, str) else jnp.dtype(dtype).name, shape_class(sizes)
    for entry in cache.entries:
        if entry.key == key:
            return _made(entry, kind, path)
    return None


def check(cache: Cache, chip: str | None, path: Path) -> None:
    """Raises ValueError where the file is for another chip, or another version of JAX."""
    if cache.chip != chip:
        here = f"is for a {chip}" if chip else "names no chip that is known"
        raise ValueError(
            f"the tuning cache {path} is for a {cache.chip}, and this call {here}; {ANEW}, to another file"
        )
    if cache.jax != jax.__version__:
        raise ValueError(
            f"the tuning cache {path} was measured with JAX {cache.jax}, and this is JAX {jax.__version__}; remove the file, "
            f"and {ANEW}"
        )


def read(path: Path) -> Cache:
    """What a file holds.

    Raises:
      ValueError: it is no tuning cache, or a torn one, or it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        whole = lambda pairs: tuple(sorted((str(name), _integer(value)) for name, value in pairs.items()))
        entries = tuple(
            Entry(
                *(str(entry[name]) for name in ("op", "implementation", "dtype")),
                whole(entry["sizes"]),
                whole(entry["tiles"]),
                tuple((name, value) for name, value in entry.items() if name not in _KEYS),
            )
            for entry in content["entries"]
        )
        return Cache(str(content["chip"]), str(content["jax"]), str(content["driver"]), entries)
    except OSError as error:
        raise ValueError(
            f"the tuning cache {path} cannot be read ({error.strerror}); {ANEW}, to another file"
        ) from error
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no whole tuning cache ({type(error).__name__}: {error}); remove the file, and {ANEW}"
        ) from error


_KEYS = ("op", "implementation", "dtype", "sizes", "tiles")
_read = lru_cache(maxsize=8)(lambda path, changed: read(path))


def _integer(value) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{value!r} is no whole number")
    return value


def _made(entry: Entry, kind: type, path: Path):
    tiles = dict(entry.tiles)
    wanted = [field.name for field in dataclasses.fields(kind)]
    if sorted(tiles) != sorted(wanted) or min(tiles.values()) < 1:
        raise ValueError(
            f"the tuning cache {path} has for {entry.op} the tiles {tiles}; they need {', '.join(wanted)}, each at least 1; "
            f"remove the file, and {ANEW}"
        )
    return kind(**tiles)


def write(path: Path, cache: Cache) -> None:
    """The whole file or nothing of it, also when killed in between. Makes the folder."""
    as_row = lambda entry: {
        **{name: getattr(entry, name) for name in ("op", "implementation", "dtype")},
        "sizes": dict(entry.sizes),
        "tiles": dict(entry.tiles),
        **dict(entry.record),
    }
    content = {
        "chip": cache.chip,
        "jax": cache.jax,
        "driver": cache.driver,
        "entries": list(map(as_row, cache.entries)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
