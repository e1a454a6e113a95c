"""`jaxpar train | generate | explain | schedule | plan | formats | tune | inspect | steer | convert | tokenizer | doctor`.

Each command's options are the fields of a dataclass (`jaxpar.options`), and its work is done elsewhere. Nothing heavy is
imported before it is known that it is needed: `jaxpar --help` does not import JAX.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxpar import __version__
from jaxpar.errors import UserError


@dataclass(frozen=True)
class Command:
    """One word of the command line.

    Attributes:
      summary: a line for `jaxpar --help`.
      run: takes the words behind the command, and gives the exit code (None: 0).
    """

    summary: str
    run: Callable[[list[str]], int | None]


def _train(argv: list[str]) -> int | None:
    from jaxpar.commands.train import main

    return main(argv)


def _generate(argv: list[str]) -> int | None:
    from jaxpar.commands.generate import main

    return main(argv)


def _explain(argv: list[str]) -> int | None:
    from jaxpar.commands.explain import main

    return main(argv)


def _schedule(argv: list[str]) -> int | None:
    from jaxpar.commands.schedule import main

    return main(argv)


def _plan(argv: list[str]) -> int | None:
    from jaxpar.commands.plan import main

    return main(argv)


def _formats(argv: list[str]) -> int | None:
    from jaxpar.commands.formats import main

    return main(argv)


def _tune(argv: list[str]) -> int | None:
    from jaxpar.commands.tune import main

    return main(argv)


def _inspect(argv: list[str]) -> int | None:
    from jaxpar.commands.inspect import main

    return main(argv)


def _steer(argv: list[str]) -> int | None:
    from jaxpar.commands.steer import main

    return main(argv)


def _convert(argv: list[str]) -> int | None:
    from jaxpar.commands.convert import main

    return main(argv)


def _tokenizer(argv: list[str]) -> int | None:
    from jaxpar.commands.tokenizer import main

    return main(argv)


def _doctor(argv: list[str]) -> int | None:
    from jaxpar.commands.doctor import main

    return main(argv)


COMMANDS = {
    "train": Command("train a language model, or go on with an interrupted run", _train),
    "generate": Command("continue a prompt with a run's model, a Hugging Face folder or a GGUF file", _generate),
    "explain": Command(
        "show how a model is spread over a mesh, in bytes and collectives, before anything runs", _explain
    ),
    "schedule": Command("show a pipeline schedule, its bubble and its memory, and compare schedules", _schedule),
    "plan": Command("plan SkipPipe's paths over machines with unlike links, against whole pipelines", _plan),
    "formats": Command("show number formats of few bits, and what they lose by formula and measured", _formats),
    "tune": Command("find the fastest block sizes of an op's kernels, and keep them", _tune),
    "inspect": Command("look into a model: what each layer reads, gives and knows", _inspect),
    "steer": Command("make a steering vector from pairs of texts, for generate --steer", _steer),
    "convert": Command("write a run's model, or a GGUF file, as a Hugging Face folder", _convert),
    "tokenizer": Command("train a byte-level BPE tokenizer", _tokenizer),
    "doctor": Command("say what is installed, tested and missing", _doctor),
}


def usage() -> str:
    lines = [
        f"jaxpar {__version__}: parallelism and adaptive computation for language models, on JAX",
        "",
        "usage: jaxpar COMMAND [OPTIONS]        jaxpar COMMAND --help lists a command's options",
        "",
        *(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()),
        "",
        "Start with: jaxpar train",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The `jaxpar` program. Returns the exit code: 0, 2 for bad input, 128 + signal after an interrupt."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv) or 0
    except UserError as error:
        if os.environ.get("JAXPAR_TRACEBACK"):
            raise
        print(f"jaxpar: {error}", file=sys.stderr)
        return 2
    except SystemExit as end:  # `--help` of a command
        return int(end.code or 0)
    except KeyboardInterrupt:
        print("jaxpar: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone (`jaxpar ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    if argv[0] in ("--version", "version"):
        print(f"jaxpar {__version__}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else f"; commands are {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}{hint}")
    from jaxpar import host_memory

    host_memory.settle()
    return COMMANDS[name].run(rest)


if __name__ == "__main__":
    sys.exit(main())
