"""`jaxpar explain [PRESET] [OPTIONS]`: the options of `jaxpar train`, and nothing is trained."""

from __future__ import annotations

from jaxpar.commands.base import checking, preset, read

DESCRIPTION = (
    "Show how the model of a run is spread over its mesh: each parameter's dimensions and mesh axes, bytes on a device, "
    "and what a step sends. Takes the options of `jaxpar train`; no device of the mesh is needed. --compile counts the "
    "collectives in the compiled step as well (with --fake-devices, anywhere)."
)


def main(argv: list[str]) -> int | None:
    compiled = "--compile" in argv
    config, rest = preset([word for word in argv if word != "--compile"])
    config = read(config, rest, prog="jaxpar explain", description=DESCRIPTION)
    with checking():
        from jaxpar.explaining import explain_run

        print(explain_run(config, compiled=compiled))
