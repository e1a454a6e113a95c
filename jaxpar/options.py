"""The command line of a configuration dataclass: tyro, and what a person types on top of it.

tyro makes an option of every field, with its type, default and the text of the docstring. Added here:

- `--model.norm layer-norm` chooses a member of a union (a strategy); its own fields follow as `--model.norm.epsilon`.
- `--layers 8` stands for `--model.layers 8` wherever one field only ends that way.
- a field whose metadata has a `parse` function takes one value: `--mesh data=2,tensor=2`, `--source folder/`.
- a typo gets the names that are near.

Everything follows from the types: a new strategy needs no line here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Sequence
from typing import Any

from jaxpar.errors import UserError


def kebab(name: str) -> str:
    """`LayerNorm` -> `layer-norm`, `RMSNorm` -> `rms-norm`, `AdamW` -> `adam-w`."""
    name = re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1-\2", name)
    return re.sub(r"([a-z0-9])([A-Z])", r"\1-\2", name).lower()


def _same(a: str, b: str) -> bool:
    plain = lambda s: s.lower().replace("-", "").replace("_", "")
    return plain(a) == plain(b)


def _members(hint: Any) -> dict[str, type | None]:
    """The members of a union of strategies, by their names on the command line; empty for any other type."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return {}
    args = typing.get_args(hint)
    classes = {kebab(a.__name__): a for a in args if dataclasses.is_dataclass(a)}
    if classes and type(None) in args:
        return {**classes, "none": None}
    return classes


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One field of the tree: where it is, and how a plain value for it is read."""

    path: tuple[str, ...]
    members: dict[str, type | None]
    parse: Any
    nested: bool

    @property
    def flag(self) -> str:
        return "--" + ".".join(self.path).replace("_", "-")


def entries(config: Any, path: tuple[str, ...] = ()) -> list[_Entry]:
    """Every field that can be given, for the strategies that `config` holds now."""
    found = []
    hints = _hints(type(config))
    for f in dataclasses.fields(config):
        if not f.init:
            continue
        value = getattr(config, f.name)
        nested = dataclasses.is_dataclass(value)
        here = (*path, f.name)
        found.append(_Entry(here, _members(hints[f.name]), f.metadata.get("parse"), nested))
        if nested:
            found.extend(entries(value, here))
    return found


def choices(config: Any) -> str:
    """The strategies, one line each, for the help text."""
    lines = [f"  {e.flag} {{{','.join(e.members)}}}" for e in entries(config) if len(e.members) > 1]
    return "\n".join(lines)


def parse(config: Any, argv: Sequence[str], *, prog: str, description: str = "") -> Any:
    """`config` changed by the command line.

    Args:
      config: the start: a preset.
      argv: the words after the command's name.
      prog: what the help calls the program.

    Raises:
      UserError: an unknown or ambiguous option, an unknown choice, or a value of the wrong type; SystemExit(0) after
        `--help`.
    """
    words = _split(argv)
    config, rest = _choose(config, words)
    return _tyro(config, rest, prog, description)


def _split(argv: Sequence[str]) -> list[tuple[str, list[str]]]:
    """`--a=1 --b 2 3` -> [("--a", ["1"]), ("--b", ["2", "3"])]."""
    words: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            flag, equals, value = word.partition("=")
            words.append((flag.replace("_", "-"), [value] if equals else []))
        elif word == "-h":
            words.append(("--help", []))
        elif words:
            words[-1][1].append(word)
        else:
            raise UserError(f"{word!r} is not an option; options start with --, see --help")
    return words


def _choose(config: Any, words: list[tuple[str, list[str]]]) -> tuple[Any, list[str]]:
    """Settle whole-field choices first, because they decide which further options there are."""
    pending, rest = list(words), []
    # Outer choices before inner ones: `--model.positions.scaling yarn-scaling` exists once positions are settled.
    changed = True
    while changed:
        changed = False
        for word in list(pending):
            entry = _find(config, word[0], strict=False)
            if entry is None or not (entry.members or entry.parse):
                continue
            config = _replace(config, entry.path, _value(config, entry, word))
            pending.remove(word)
            changed = True
    for flag, values in pending:
        if flag == "--help":
            rest.append(flag)
            continue
        rest += [
            _find(config, flag, strict=True).flag if not _negated(config, flag) else _negated(config, flag),
            *values,
        ]
    return config, rest


def _negated(config: Any, flag: str) -> str | None:
    """The full flag of `--no-NAME`, where NAME is a boolean field."""
    head, dot, last = flag[2:].rpartition(".")
    if not last.startswith("no-"):
        return None
    entry = _find(config, f"--{head}{dot}{last[3:]}", strict=False)
    if entry is None:
        return None
    *parents, name = entry.flag[2:].split(".")
    return "--" + ".".join([*parents, f"no-{name}"])


def _find(config: Any, flag: str, *, strict: bool) -> _Entry | None:
    """The field that `flag` names in full or by the only matching end of its name."""
    every = entries(config)
    name = flag[2:]
    for e in every:
        if e.flag[2:] == name:
            return e
    ends = [e for e in every if e.flag[2:].endswith("." + name)]
    if len(ends) == 1:
        return ends[0]
    # `--length` is rather `--data.length` than `--model.x.length`: the shallowest, if it is the only one there.
    top = [e for e in ends if len(e.path) == min(len(x.path) for x in ends)]
    if len(top) == 1:
        return top[0]
    if not strict:
        return None
    if ends:
        raise UserError(f"{flag} could be {' or '.join(e.flag for e in ends)}; give the longer name")
    # Compared as far as it was typed: the last part of a name for `--layer`, the whole for `--model.layer`.
    tail = lambda e: ".".join(e.flag[2:].split(".")[-(name.count(".") + 1) :])
    names = [tail(e) for e in every]
    near = dict.fromkeys(
        e.flag for n in difflib.get_close_matches(name, names, n=3, cutoff=0.7) for e in every if tail(e) == n
    )
    hint = f"; did you mean {' or '.join(near)}?" if near else "; see --help"
    raise UserError(f"unknown option {flag}{hint}")


def _value(config: Any, entry: _Entry, word: tuple[str, list[str]]) -> Any:
    flag, values = word
    if len(values) != 1:
        listed = f" ({', '.join(entry.members)})" if entry.members else ""
        raise UserError(f"{flag} takes one value{listed}, got {len(values)}: {' '.join(values)}".rstrip(": "))
    [text] = values
    for name, cls in entry.members.items():
        if _same(name, text):
            now = config
            for step in entry.path:
                now = getattr(now, step)
            return None if cls is None else (now if type(now) is cls else _make(cls, flag))
    if entry.parse is not None:
        return entry.parse(text)
    near = difflib.get_close_matches(text, entry.members, n=2, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"{flag} is one of {', '.join(entry.members)}, but got {text!r}{hint}")


def _make(cls: type, flag: str) -> Any:
    """A strategy with its defaults. Fields without one are left open for the options that follow."""
    needed = [
        f.name
        for f in dataclasses.fields(cls)
        if f.init and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if not needed:
        return cls()
    import tyro

    blank = object.__new__(cls)
    for f in dataclasses.fields(cls):
        if f.name in needed:
            value = tyro.MISSING
        elif f.default is not dataclasses.MISSING:
            value = f.default
        else:
            value = f.default_factory()
        object.__setattr__(blank, f.name, value)
    return blank


def _replace(config: Any, path: tuple[str, ...], value: Any) -> Any:
    """A copy with one field changed, made without running `__post_init__`: the end result is checked once, by tyro."""
    copy = object.__new__(type(config))
    for name, old in vars(config).items():
        object.__setattr__(copy, name, old)
    inner = value if len(path) == 1 else _replace(getattr(config, path[0]), path[1:], value)
    object.__setattr__(copy, path[0], inner)
    return copy


def _tyro(config: Any, argv: list[str], prog: str, description: str) -> Any:
    import contextlib
    import io

    import tyro

    listed = choices(config)
    description = description or (type(config).__doc__ or "").split("Attributes:")[0].strip()
    text = description + (f"\n\nStrategies, and the options that choose them:\n{listed}" if listed else "")
    stream = io.StringIO()
    try:
        if "--help" in argv:
            return tyro.cli(
                tyro.conf.AvoidSubcommands[type(config)], default=config, args=argv, prog=prog, description=text
            )
        with contextlib.redirect_stderr(stream), contextlib.redirect_stdout(stream):
            return tyro.cli(tyro.conf.AvoidSubcommands[type(config)], default=config, args=argv, prog=prog)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(_sentence(stream.getvalue(), argv)) from None


def _sentence(box: str, argv: list[str]) -> str:
    """tyro's framed message as one line: without the frame, its title, and the argument's help text."""
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in box.splitlines()]
    text = " ".join(line for line in lines if line)
    text = re.sub(r"-{4,}", " ", text).split("Argument helptext:")[0].split("For full helptext")[0]
    text = re.sub(r"^\s*(Value error|Missing argument|Parsing error|Unrecognized options)\s+", "", text)
    text = re.sub(r"\s+", " ", text)
    text = re.sub(
        r"Error parsing (\S+): invalid literal for int\(\) with base 10:", r"\1 takes a whole number, got", text
    )
    text = re.sub(r"Error parsing (\S+): could not convert string to float:", r"\1 takes a number, got", text)
    text = re.sub(r"Error parsing \S+: ", "", text)
    choice = re.search(r"invalid choice ('.*?') for argument '(--\S+?)[ ']?'?\. Expected one of \((.*?),?\)\.", text)
    if choice:  # as for strategies, which are not tyro's choices
        text = f"{choice[2]} is one of {choice[3].replace(chr(39), '')}, but got {choice[1]}"
    text = re.sub(r"\s+", " ", text).strip()
    return text or f"these options cannot be read: {' '.join(argv)}"
