"""`jaxpar train [PRESET] [OPTIONS]`."""

from __future__ import annotations

from jaxpar.commands.base import checking, preset, read
from jaxpar.presets import DEFAULT, PRESETS

DESCRIPTION = (
    "Train a language model. The same command again goes on where the run was interrupted.\n\n"
    f"The first word may name a preset: {', '.join(PRESETS)} (without one: {DEFAULT}). Options can be shortened to the "
    "end of their name where that is unique: --layers 8 for --model.layers 8."
)


def main(argv: list[str]) -> int | None:
    config, rest = preset(argv)
    config = read(config, rest, prog="jaxpar train", description=DESCRIPTION)
    from jaxpar.run import prepare
    from jaxpar.train import go

    with checking():  # what goes wrong later is either a `UserError` or a bug, which keeps its traceback
        run = prepare(config)
    return go(run).exit_code
