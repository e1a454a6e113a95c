"""What formats lose on data: the ratio that `theory` predicts, measured."""

from __future__ import annotations

import math

import jax
import numpy as np

from jaxpar.pallas_kernels.formats.format import Format, get
from jaxpar.pallas_kernels.formats.quantised import fake_quantise
from jaxpar.pallas_kernels.formats.scales import E8M0

ROW = 512
"""The length of rows for formats whose block is a row or a tensor."""

_cast = jax.jit(fake_quantise, static_argnums=(1, 2), static_argnames=("stacked",))


def measured(x, fmt: str | Format, axis: int = -1, *, stacked: int = 0) -> float:
    """The signal-to-quantisation-noise ratio of casting x, in dB; infinite where nothing is lost.

    Args:
      x: float array that has no NaN and no infinity in it, and is not all zero.
    """
    x = np.asarray(x, np.float32)
    lost = np.asarray(_cast(x, get(fmt), axis, stacked=stacked), np.float64) - x
    noise = float((lost**2).sum())
    return math.inf if noise == 0 else 10 * math.log10(float((x.astype(np.float64) ** 2).sum()) / noise)


def crest(x, fmt: str | Format, axis: int = -1) -> float:
    """The crest factor of x's blocks, averaged as noise is: sqrt(mean amax² / mean x²)."""
    block = get(fmt).block
    rows = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    size = {"tensor": rows.size, "row": rows.shape[-1]}.get(block, block)
    return math.sqrt((np.abs(rows.reshape(-1, size)).max(1) ** 2).mean() / (rows**2).mean())


def row_length(fmt: str | Format) -> int:
    block = get(fmt).block
    return block if isinstance(block, int) else ROW


def gaussian(fmt: str | Format, values: int, seed: int = 0) -> np.ndarray:
    """float32 [values / row, row] of normally distributed values: rows are blocks."""
    size = row_length(fmt)
    return np.random.default_rng(seed).standard_normal((max(1, values // size), size)).astype(np.float32)


def with_crest(fmt: str | Format, factor: float, values: int, seed: int = 0) -> np.ndarray:
    """float32 [values / row, row]: the formula's data. Normally distributed rows, of which one value is raised to the crest
    factor; where others would be above it, they are clipped to it. The root mean square of each row is 1, or, where scales
    are powers of two, 1 to 2, so that they lie anywhere between two of them: as much energy at each place.

    Raises:
      ValueError: a factor that rows of this length cannot have: it is less than the root of their length, and above 1.
    """
    size = row_length(fmt)
    if not 1 < factor < math.sqrt(size):
        raise ValueError(
            f"{get(fmt).name}: a crest factor of {factor:g} is outside of 1 to sqrt({size}) = {math.sqrt(size):.2f}, what "
            f"{size} values can have"
        )
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((max(1, values // size), size))
    x[:, 0] = np.sign(x[:, 0])
    for _ in range(200):  # clipping lowers the mean square, which lowers the largest value
        rest = (x[:, 1:] ** 2).sum(1, keepdims=True)
        top = factor * np.sqrt(rest / (size - factor**2))
        if (np.abs(x[:, 1:]) <= top * (1 + 1e-6)).all():
            break
        # Growing what is left instead of shrinking the bound to nothing: the ratio alone counts.
        x[:, 1:] = np.clip(x[:, 1:], -top, top) / np.sqrt(rest / (size - 1))
    x[:, :1] = np.sign(x[:, :1]) * top
    x[:, 1:] = np.clip(x[:, 1:], -top, top)
    x /= np.sqrt((x**2).mean(1, keepdims=True))
    if isinstance(get(fmt).scale, E8M0):
        # Rows with u near 1 count for up to 4 times as much, so there are as many fewer: density proportional to 4^-u.
        x /= np.sqrt(1 - 0.75 * draw.uniform(0, 1, (len(x), 1)))
    return draw.permuted(x, axis=1).astype(np.float32)


def measured_crossover(integer: str | Format, floating: str | Format, values: int, seed: int = 0) -> float | None:
    """The least crest factor at which the integer format stops to be ahead, on `with_crest` data; None: there is none.

    Near the largest crest factor that a block can have, where one value has all of its energy, there may be others.
    """
    previous = None
    for factor in np.arange(1.2, math.sqrt(row_length(integer)), 0.2):
        x = with_crest(integer, factor, values, seed)
        ahead = measured(x, integer) - measured(x, floating)
        if previous is not None and previous[1] > 0 >= ahead:
            low, high = previous[0], factor
            # The difference is smooth there, if not for the draw: a straight line is exact enough.
            return float(low + (high - low) * previous[1] / (previous[1] - ahead))
        previous = (factor, ahead)
    return None
