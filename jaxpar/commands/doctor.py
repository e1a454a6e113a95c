"""`jaxpar doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.commands.base import read


@dataclass(frozen=True)
class DoctorConfig:
    """Say what is installed, tested and missing: versions against the tested ranges, devices, folders, extras."""


def main(argv: list[str]) -> int | None:
    read(DoctorConfig(), argv, prog="jaxpar doctor")
    from jaxpar.doctor import doctor

    return doctor()
