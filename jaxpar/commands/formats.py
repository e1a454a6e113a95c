"""`jaxpar formats [NAME ...] [OPTIONS]`: number formats of few bits, what they hold, and what they lose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jaxpar.commands.base import checking, read

DESCRIPTION = (
    "Show number formats: bits a value, block, scale, and the signal-to-quantisation-noise ratio by formula and measured, on "
    "normally distributed values and at crest factors; and where integers and floats of the same size cross. The first "
    "words are formats, such as mxfp4 nvint4 int8_row int4_g128 mxint8-asymmetric mxfp8-ocp; without any, all that are listed."
)


@dataclass(frozen=True)
class FormatsConfig:
    """What the formats are measured on.

    Attributes:
      values: how many values, for each measurement.
      crests: crest factors: the largest magnitude of a block over its root mean square.
      seed: of the data.
      plot: a picture of formulas and measurements to write (.png, .svg, .pdf).
    """

    values: int = 65536
    crests: tuple[float, ...] = (2.0, 3.0, 5.0)
    seed: int = 0
    plot: str | None = None

    def __post_init__(self):
        if self.values < 4096:
            raise ValueError(f"values = {self.values}; give at least 4096, or the figures are mostly chance")
        for k in self.crests:
            if not k > 1:
                raise ValueError(
                    f"crests: {k:g} is no crest factor, the largest magnitude over the root mean square: give numbers above 1"
                )


def main(argv: list[str]) -> int | None:
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    config = read(FormatsConfig(), argv[first:], prog="jaxpar formats", description=DESCRIPTION)
    with checking():
        print(show(argv[:first], config))


def show(names: list[str], config: FormatsConfig) -> str:
    """What the command prints; writes the picture that is asked for.

    Raises:
      ValueError: an unknown format, with the nearest.
      FileNotFoundError: no folder for the picture.
    """
    from jaxpar.pallas_kernels.formats.format import NAMES, get
    from jaxpar.pallas_kernels.formats.theory import PAIRS

    formats = [get(name) for name in (names or NAMES)]
    if config.plot and not Path(config.plot).expanduser().resolve().parent.is_dir():
        raise FileNotFoundError(f"{config.plot}: there is no folder {Path(config.plot).expanduser().resolve().parent}")

    from jaxpar.pallas_kernels.formats import draw, report

    rows = [report.row(fmt, config.crests, config.values, config.seed) for fmt in formats]
    text = report.table(rows)
    here = {fmt.name for fmt in formats}
    pairs = [tuple(get(name) for name in pair) for pair in PAIRS if set(pair) <= here]
    if pairs:
        text += "\n\n" + report.crossovers(pairs, config.values, config.seed)
    text += "\n\n" + report.note(config.values, config.seed)
    if config.plot:
        chosen = formats if names else [get(name) for pair in PAIRS for name in pair]
        draw.plot(chosen, Path(config.plot).expanduser(), config.values, config.seed)
        text += f"\n\n{config.plot}: the picture"
    return text
