"""`jaxpar tune [OP] [OPTIONS]`: the fastest block sizes of an op's kernels at a shape, for the cache."""

from __future__ import annotations

import difflib

from jaxpar.commands.base import checking, read
from jaxpar.errors import UserError
from jaxpar.tuning import OPS, TuneConfig

DESCRIPTION = (
    f"Find the fastest block sizes of the kernels of an op ({', '.join(OPS)}: the first word; without one, attention) at a "
    "shape: candidates are compiled, those that compile are timed in turn, and the best is written to the tuning cache, from "
    "which kernels take it before their own table (* marks the table's). With --topology v5e:2x2 candidates are compiled for a chip that is not there, and listed."
)


def main(argv: list[str]) -> int | None:
    name, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else ("attention", argv)
    name = name.replace("-", "_")
    if name not in OPS:
        near = difflib.get_close_matches(name, OPS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"jaxpar tune knows no op {name!r}; ops are {', '.join(OPS)}{hint}")
    config = read(TuneConfig(op=OPS[name]()), rest, prog="jaxpar tune", description=DESCRIPTION)
    with checking():
        from jaxpar.tuning import tune

        tune(config)
