"""What a number format is, and every format by name. No JAX is imported with this module.

    mxint8 mxint6 mxint4                          blocks of 32, a power of two each (OCP MX for INT8; INT v.s. FP for the others)
    mxfp8_e4m3 mxfp8_e5m2 mxfp6_e2m3 mxfp6_e3m2 mxfp4            the same with floats (OCP MX 1.0)
    nvint4 nvfp4                                  blocks of 16, an E4M3 scale each, a float32 a tensor
    ELEMENT_tensor ELEMENT_row ELEMENT_gN         a float32 a tensor, a row, or N values of a row; ELEMENT is int8, int6, int4,
                                                  fp8_e4m3, fp8_e5m2, fp6_e2m3, fp6_e3m2 or fp4

`mxfp8` and `mxfp6` are E4M3 and E2M3, as in INT v.s. FP (arXiv 2510.25602). A row is all values along the quantised axis: one
of x [T, K] along K is a token's, one of w [K, N] along K is a column's. Words behind a `-` change a part: `mxint8-asymmetric`
(clipping that uses -128), `mxfp4-ocp` (another rule for the power of two, see `E8M0`).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Literal

from jaxpar.pallas_kernels.formats import elements
from jaxpar.pallas_kernels.formats.elements import Float, Int
from jaxpar.pallas_kernels.formats.scales import E4M3, E8M0, Float32, Scale


@dataclass(frozen=True)
class Format:
    """A number format: an element, a scale, and which values share one.

    Attributes:
      name: what `get` knows it by.
      element: the numbers that scaled values are rounded to.
      scale: how a scale is found and stored.
      block: how many neighbours along the quantised axis share a scale: a number, all of them ("row"), or the whole
        tensor ("tensor").
    """

    name: str
    element: Int | Float
    scale: Scale
    block: int | Literal["row", "tensor"]

    def __post_init__(self):
        if isinstance(self.block, int) and (self.block < 1 or self.block % self.together):
            raise ValueError(
                f"{self.name}: block = {self.block}; it must be a positive multiple of {self.together}, the codes of "
                f"{self.element.bits} bits that fill whole bytes"
            )

    @property
    def together(self) -> int:
        """How many codes are packed together: 8-bit 1 (a byte), 6-bit 4 (three bytes), 4-bit 2 (a byte)."""
        return {4: 2, 6: 4}.get(self.element.bits, 1)

    @property
    def stored_bits(self) -> int:
        """Of a code, as it is packed."""
        return self.element.bits if self.element.bits in (4, 6) else 8

    def bits_per_value(self, row: int | None = None) -> float:
        """Codes and scales; what is one a tensor is not counted.

        Args:
          row: values along the quantised axis, for formats with a scale a row.
        """
        if self.block == "tensor":
            return float(self.stored_bits)
        count = row if self.block == "row" else self.block
        if count is None:
            raise ValueError(f"{self.name} has a scale a row: its bits a value depend on the row's length, give row=")
        return self.stored_bits + self.scale.bits / count

    def misfit(self, size: int) -> str | None:
        """Why an axis of this size cannot be quantised, with the sizes that can; None: it can."""
        unit = self.block if isinstance(self.block, int) else self.together
        if size > 0 and size % unit == 0:
            return None
        what = (
            f"blocks of {unit}" if isinstance(self.block, int) else f"{unit} codes of {self.element.bits} bits together"
        )
        below, above = size // unit * unit, -(-max(size, 1) // unit) * unit
        return (
            f"{self.name} takes {what}, and {size} is no positive multiple of {unit}; nearest: "
            f"{f'{below} or ' if below else ''}{above} (zeros up to {above} change no other value)"
        )


def _mx(name: str, element: Int | Float) -> Format:
    return Format(name, element, E8M0(), 32)


_ELEMENTS = {
    "int8": Int(8),
    "int6": Int(6),
    "int4": Int(4),
    "fp8_e4m3": elements.E4M3,
    "fp8_e5m2": elements.E5M2,
    "fp6_e2m3": elements.E2M3,
    "fp6_e3m2": elements.E3M2,
    "fp4": elements.E2M1,
}

_BLOCKS = {
    # The MX integers have one digit before the point: the specification's for INT8, and the same for the narrower ones.
    "mxint8": _mx("mxint8", Int(8, fraction=6)),
    "mxint6": _mx("mxint6", Int(6, fraction=4)),
    "mxint4": _mx("mxint4", Int(4, fraction=2)),
    "mxfp8_e4m3": _mx("mxfp8_e4m3", elements.E4M3),
    "mxfp8_e5m2": _mx("mxfp8_e5m2", elements.E5M2),
    "mxfp6_e2m3": _mx("mxfp6_e2m3", elements.E2M3),
    "mxfp6_e3m2": _mx("mxfp6_e3m2", elements.E3M2),
    "mxfp4": _mx("mxfp4", elements.E2M1),
    "nvint4": Format("nvint4", Int(4), E4M3(), 16),
    "nvfp4": Format("nvfp4", elements.E2M1, E4M3(), 16),
}

_SHORT = {"mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3", "mxfp4_e2m1": "mxfp4"}

_PLAIN = [
    *(f"{e}_{share}" for e in ("int8", "fp8_e4m3", "fp8_e5m2") for share in ("tensor", "row")),
    *("int8_g128", "fp8_e4m3_g128", "int4_row", "int4_g128", "int4_g64", "int4_g32"),
]

NAMES = (*_BLOCKS, *_PLAIN)
"""The formats that are listed; `get` makes those of any element and group besides."""


def get(name: str | Format) -> Format:
    """The format of this name; a `Format` is given back.

    Raises:
      ValueError: an unknown name, with the nearest that is known.
    """
    if isinstance(name, Format):
        return name
    base, *words = name.split("-")
    found = _BLOCKS.get(_SHORT.get(base, base)) or _plain(base)
    if found is None:
        known = [*NAMES, *_SHORT]
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"formats are {', '.join(NAMES)}"
        raise ValueError(f"unknown number format {name!r}; {hint}")
    for word in words:
        found = _changed(found, word, name)
    return replace(found, name="-".join([found.name, *words]))


def _plain(base: str) -> Format | None:
    match = re.fullmatch(r"(.+)_(?:(tensor|row)|g([1-9]\d*))", base)
    if match is None or match[1] not in _ELEMENTS:
        return None
    return Format(base, _ELEMENTS[match[1]], Float32(), match[2] or int(match[3]))


def _changed(found: Format, word: str, name: str) -> Format:
    element, scale = found.element, found.scale
    rules = ("ceil", "floor", "round", "ocp")
    if word == "asymmetric" and isinstance(element, Int):
        return replace(found, element=replace(element, symmetric=False))
    if word in rules and isinstance(scale, E8M0):
        return replace(found, scale=E8M0(word))
    can = [*(["asymmetric"] if isinstance(element, Int) else []), *(rules if isinstance(scale, E8M0) else [])]
    raise ValueError(
        f"number format {name!r}: {found.name} has nothing that {word!r} changes; "
        + (f"it takes {', '.join(can)}" if can else "it has no variants")
    )
