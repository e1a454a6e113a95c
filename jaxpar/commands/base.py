"""What the commands share: presets as the first word, and bad input as one sentence."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from typing import Any

from jaxpar import options
from jaxpar.errors import UserError
from jaxpar.presets import DEFAULT, PRESETS


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """The phase in which everything is checked: its errors are the user's to mend, and get no traceback.

    Models and meshes do not know `UserError`; what they raise here is a sentence all the same.
    """
    try:
        yield
    except UserError:
        raise
    except (
        ValueError,
        FileNotFoundError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
        ImportError,
    ) as error:
        raise UserError(str(error)) from error


def preset(argv: list[str]) -> tuple[Any, list[str]]:
    """The configuration that the command line starts from, and the words that change it.

    Raises:
      UserError: an unknown preset.
    """
    if not argv or argv[0].startswith("-"):
        return PRESETS[DEFAULT](), argv
    name, *rest = argv
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"unknown preset {name!r}; presets are {', '.join(PRESETS)}{hint}")
    return PRESETS[name](), rest


def read(config: Any, argv: list[str], *, prog: str, description: str = "") -> Any:
    """`config` changed by the command line; see `jaxpar.options.parse`."""
    with checking():
        return options.parse(config, argv, prog=prog, description=description)
