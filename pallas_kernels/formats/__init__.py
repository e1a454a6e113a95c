"""Number formats of few bits: MX and NV blocks, and integers and floats with a scale a tensor, a row or a group.

fmt = formats.get("mxfp8_e4m3")             a frozen dataclass; no JAX is imported for it
q = formats.quantise(w, fmt, axis=0)        a pytree: packed codes, scales
formats.dequantise(q, jnp.bfloat16)
formats.fake_quantise(x, "nvint4", -1)      rounded forwards, the identity backwards

On Hopper GPUs products quantise rows to int8 by a kernel (`mosaic_gpu`); all else here is XLA's.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jaxpar.pallas_kernels.formats.format import NAMES, Format, get

if TYPE_CHECKING:
    from jaxpar.pallas_kernels.formats.quantised import (
        QUANTISE,
        Quantised,
        dequantise,
        fake_quantise,
        laid_along,
        quantise,
        split,
    )
    from jaxpar.pallas_kernels.formats.rotation import rotate, signs

_WITH_JAX = {
    "QUANTISE": "quantised",
    "Quantised": "quantised",
    "dequantise": "quantised",
    "fake_quantise": "quantised",
    "laid_along": "quantised",
    "quantise": "quantised",
    "rotate": "rotation",
    "signs": "rotation",
    "split": "quantised",
}


def __getattr__(name: str) -> Any:
    # Configurations name formats, and `jaxpar --help` must not import JAX.
    if name in _WITH_JAX:
        return getattr(importlib.import_module(f"{__name__}.{_WITH_JAX[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "NAMES",
    "QUANTISE",
    "Format",
    "Quantised",
    "dequantise",
    "fake_quantise",
    "get",
    "laid_along",
    "quantise",
    "rotate",
    "signs",
    "split",
]
