"""`jaxpar explain [PRESET] [OPTIONS]`: the options of `jaxpar train`, and nothing is trained."""

from __future__ import annotations

from jaxpar.commands.base import checking, preset, read
from jaxpar.errors import UserError

DESCRIPTION = (
    "Show how the model of a run is spread over its mesh: each parameter's dimensions and mesh axes, bytes on a device, "
    "and what a step sends. Takes the options of `jaxpar train`; no device of the mesh is needed. --compile counts the "
    "collectives in the compiled step as well (with --fake-devices, anywhere); --topology v5e:2x4 compiles it for that TPU "
    "slice, which need not be there (extra tpu-aot)."
)


def main(argv: list[str]) -> int | None:
    compiled = "--compile" in argv
    argv, topology = _topology([word for word in argv if word != "--compile"])
    config, rest = preset(argv)
    config = read(config, rest, prog="jaxpar explain", description=DESCRIPTION)
    with checking():
        from jaxpar.explaining import explain_run

        print(explain_run(config, compiled=compiled, topology=topology))


def _topology(argv: list[str]) -> tuple[list[str], str | None]:
    """The words without `--topology NAME` or `--topology=NAME`, and the name.

    Raises:
      UserError: no name.
    """
    for i, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag == "--topology":
            rest = argv[:i] + argv[i + 1 :] if equals else argv[:i] + argv[i + 2 :]
            name = value if equals else next(iter(argv[i + 1 : i + 2]), "")
            if not name or name.startswith("--"):
                raise UserError("--topology names the TPU slice to compile for; write for instance --topology v5e:2x4")
            return rest, name
    return argv, None
