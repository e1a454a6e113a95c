"""Formulas and measurements over the crest factor, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxpar.pallas_kernels.formats import measure, theory
from jaxpar.pallas_kernels.formats.format import Format


def plot(formats: Sequence[Format], file: str | Path, values: int, seed: int = 0) -> None:
    """A curve a format by formula, and points measured on `measure.with_crest` data; crossovers of the paper's pairs.

    Raises:
      ValueError: a name whose ending is no picture.
    """
    # Figure without pyplot: no global state, and a notebook's own figures are left alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = {f.name for f in formats}
    for i, fmt in enumerate(formats):
        colour = f"C{i % 10}"
        limit = min(math.sqrt(measure.row_length(fmt)), 6.0)
        if theory.applies(fmt):
            crests = np.linspace(1.1, limit, 60)
            axes.plot(crests, [theory.qsnr(fmt, k) for k in crests], color=colour, ls="-" if i < 10 else "--")
        points = np.arange(1.25, limit - 0.05, 0.5)
        found = [measure.measured(measure.with_crest(fmt, k, values, seed), fmt) for k in points]
        axes.plot(points, found, "os^v"[i // 10 % 4], color=colour, ms=4, label=fmt.name)
    for integer, floating in theory.PAIRS:
        if {integer, floating} <= names and (k := theory.crossover(integer, floating)) < theory.largest_crest(integer):
            axes.plot(k, theory.qsnr(integer, k), "x", color="black", ms=9)
    axes.set(
        xlabel="crest factor: largest magnitude of a block over its root mean square",
        ylabel="signal over quantisation noise (dB)",
        title="lines: formula; points: measured; ×: where integers and floats cross",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(Path(file), dpi=130)
