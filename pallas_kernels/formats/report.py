"""Formats as a table: what they hold, and what they lose, by formula and measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxpar.pallas_kernels.formats import measure, theory
from jaxpar.pallas_kernels.formats.format import Format


@dataclass(frozen=True)
class Loss:
    """The signal-to-quantisation-noise ratio on one kind of data, in dB.

    Attributes:
      crest: the crest factor of the blocks.
      theory: `theory.qsnr` there; None where the formula is not of this format.
      measured: None where blocks cannot have this crest factor.
    """

    crest: float
    theory: float | None
    measured: float | None


@dataclass(frozen=True)
class Row:
    """One format, on normally distributed values and at each crest factor."""

    format: Format
    gaussian: Loss
    crests: tuple[Loss, ...]


def row(fmt: Format, crests: Sequence[float], values: int, seed: int) -> Row:
    """Measures one format."""
    formula = lambda k: theory.qsnr(fmt, k) if theory.applies(fmt) else None
    x = measure.gaussian(fmt, values, seed)
    k = measure.crest(x, fmt)
    losses = []
    for factor in crests:
        possible = factor**2 < measure.row_length(fmt)
        losses.append(
            Loss(
                factor,
                formula(factor) if possible else None,
                measure.measured(measure.with_crest(fmt, factor, values, seed), fmt) if possible else None,
            )
        )
    return Row(fmt, Loss(k, formula(k), measure.measured(x, fmt)), tuple(losses))


def table(rows: Sequence[Row]) -> str:
    crests = [loss.crest for loss in rows[0].crests]
    head = ["format", "bits", "block", "scale", "largest", "crest", "formula", "measured"]
    head += [word for _ in crests for word in ("formula", "measured")]
    lines = [head]
    for r in rows:
        fmt = r.format
        line = [
            fmt.name,
            f"{fmt.bits_per_value(measure.ROW):.4g}",
            str(fmt.block),
            fmt.scale.name,
            f"{fmt.element.largest:.6g}",
            f"{r.gaussian.crest:.2f}",
        ]
        for loss in (r.gaussian, *r.crests):
            line += ["-" if v is None else f"{v:.2f}" for v in (loss.theory, loss.measured)]
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    show = lambda line: "  ".join(
        c.ljust(w) if i in (0, 2, 3) else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
    )
    # Above each pair of columns, what data it is of.
    start = [sum(w + 2 for w in widths[:i]) for i in range(len(head) + 1)]
    over = " " * start[5] + "normally distributed".ljust(start[8] - start[5])
    over += "".join(f"crest factor {k:g}".ljust(start[10 + 2 * i] - start[8 + 2 * i]) for i, k in enumerate(crests))
    return "\n".join(line.rstrip() for line in [over, *map(show, lines)])


def crossovers(pairs: Sequence[tuple[Format, Format]], values: int, seed: int) -> str:
    """For each integer and float format of the same size: below which crest factor the integers lose less."""
    lines = [["integers ahead of floats below the crest factor", "published", "formula", "measured"]]
    for integer, floating in pairs:
        found = measure.measured_crossover(integer, floating, values, seed)
        limit = theory.largest_crest(integer)
        lines.append(
            [
                f"{integer.name} and {floating.name}",
                f"{theory.crossover(integer, floating, as_published=True):.2f}",
                f"{theory.crossover(integer, floating):.2f}",
                f"none: ahead up to {limit:.2f}, what {integer.block} values can have"
                if found is None
                else f"{found:.2f}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(3)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), line[1].rjust(widths[1]), line[2].rjust(widths[2]), line[3]])
        for line in lines
    )


NOTE = (
    "Signal over quantisation noise in dB. Bits a value with scales; int..._row: of rows of {row}. Data: {values:,} values, seed "
    "{seed}; for a crest\nfactor (largest magnitude of a block over its root mean square) normally distributed blocks with one "
    'value raised to it. "published" is\nthe formula of INT v.s. FP (arXiv 2510.25602) with its constants, "formula" has 2^(b-1) - 1 '
    "integer steps and exact means of the scale."
)


def note(values: int, seed: int) -> str:
    return NOTE.format(row=measure.ROW, values=values, seed=seed)
