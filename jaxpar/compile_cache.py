"""The persistent compile cache: a second start of the same program loads it instead of compiling."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_root() -> Path:
    """`$JAXPAR_CACHE`, else `$XDG_CACHE_HOME/jaxpar`, else `~/.cache/jaxpar`."""
    if own := os.environ.get("JAXPAR_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser().absolute() / "jaxpar"


def folder() -> Path:
    """Where compiled programs go: what JAX was told by its own variable, else `cache_root()/compiled`."""
    return Path(os.environ.get("JAX_COMPILATION_CACHE_DIR") or cache_root() / "compiled")


def problem(path: Path) -> str | None:
    """Why nothing can be written to `path`, or None. Makes the folder."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        return error.strerror or str(error)
    return None


def enable(on: bool = True, *, say: Callable[[str], None] = print) -> Path | None:
    """Turns the cache on (before the first compilation), or off.

    Returns:
      The folder; None where it is off, or cannot be written to, which is said in one sentence and is no error.
    """
    import jax

    if not on:
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    path = folder()
    if why := problem(path):
        say(f"compiled programs are not kept: {path} cannot be written to ({why}); set JAXPAR_CACHE to another folder")
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    # JAX's default keeps only what took a second to compile; a run has many programs below that.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def size(path: Path) -> tuple[int, int]:
    """(files, bytes) in the cache."""
    sizes = [p.stat().st_size for p in path.glob("*") if p.is_file()] if path.is_dir() else []
    return len(sizes), sum(sizes)
