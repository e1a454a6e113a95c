"""Products in number formats in NumPy: what the other implementations are compared with."""

from __future__ import annotations

import numpy as np

from jaxpar.pallas_kernels.formats import elements
from jaxpar.pallas_kernels.formats.packing import unpack
from jaxpar.pallas_kernels.formats.quantised import Quantised
from jaxpar.pallas_kernels.formats.scales import E4M3, E8M0


def values(x) -> np.ndarray:
    """float64: an array's own, or those of codes and scales by the tables of their formats, in exact arithmetic."""
    if not isinstance(x, Quantised):
        return np.asarray(x).astype(np.float64)
    codes = np.asarray(unpack(x.codes, x.format.stored_bits, x.axis))
    return x.format.element.values()[codes] * scales(x)


def scales(q: Quantised) -> np.ndarray:
    """float64 of q's shape: the scale of each value."""
    found = np.asarray(q.scales)
    if isinstance(q.format.scale, E8M0):
        found = np.ldexp(1.0, found.astype(np.int32) - 127)
    elif isinstance(q.format.scale, E4M3):
        found = elements.E4M3.values()[found] * np.asarray(q.tensor, np.float64)
    found = found.astype(np.float64)
    count = q.shape[q.axis]
    return np.broadcast_to(np.repeat(found, count // found.shape[q.axis], q.axis), q.shape)


def product_reference(a, b, axes: tuple[int, int]) -> np.ndarray:
    """Σ over `axes[0]` of a and `axes[1]` of b, float64 [other of a, other of b]. NaN scales are not for this."""
    x, y = (values(q) if axis == -1 else values(q).T for q, axis in zip((a, b), axes, strict=True))
    return x @ y.T


def integer_sums(a: Quantised, b: Quantised, axes: tuple[int, int]) -> np.ndarray:
    """int64: the sum of products of the whole numbers of two integer formats, without scales."""
    table = lambda q: (q.format.element.values() * 2**q.format.element.fraction).astype(np.int64)
    whole = [table(q)[np.asarray(unpack(q.codes, q.format.stored_bits, q.axis))] for q in (a, b)]
    x, y = (w if axis == -1 else w.T for w, axis in zip(whole, axes, strict=True))
    return x @ y.T
