"""Which model `jaxpar generate --quantise` makes of the one that was loaded. Free of JAX at import."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxpar.errors import UserError
from jaxpar.quantise.fmpq import Fmpq, share_of_four
from jaxpar.quantise.weights import QuantisedWeights

if TYPE_CHECKING:
    from jaxpar.loading import Loaded
    from jaxpar.models.config import ModelConfig
    from jaxpar.models.context import Ops

AnyQuantised = QuantisedWeights | Fmpq
GROUP = 128
"""Values of a group with a scale of its own in 4-bit integers, where none is given."""
CACHE_GROUP = 32
"""The same of keys and values."""
ROWS, LENGTH = 8, 256
"""Of the text that outliers are found on."""


def parse(text: str) -> AnyQuantised:
    """`w8a16`: bits of weights and activations; `w4g32a8`: groups of 32; `w4a4kv4`: and of keys and values. Or a number format
    for weights and activations: `mxfp8`.

        w16  as they are                a16  the compute dtype        kv16  the compute dtype
        w8   a scale a column           a8   a scale a token          kv8   a scale a token and head
        w4   a scale a group of 128     a4   groups as the weights'   kv4   groups of 32; kv4g16: of 16
                                        ax   4 bits, and 8 in blocks with outliers (FMPQ)

    Raises:
      ValueError: none of these; the sentence names the nearest formats, or the words that there are.
    """
    match = re.fullmatch(r"w(4|8|16)(?:g([1-9]\d*))?a(4|8|16|x)(?:kv(4|8|16)(?:g([1-9]\d*))?)?", text)
    if match is None:
        if re.match(r"w\d", text):
            raise ValueError(
                f"quantise = {text!r}: write w8a16, w4a16, w8a8, w4a8, w4a4 or w4ax, with groups as w4g32a16, with keys and "
                "values as w4a4kv4, or a number format"
            )
        return QuantisedWeights(text, text)
    bits, group, active, cached, cache_group = match.groups()
    cache = {None: None, "16": None, "8": "int8_row", "4": f"int4_g{cache_group or CACHE_GROUP}"}[cached]
    if active == "x":
        if bits != "4":
            raise ValueError(f"quantise = {text!r}: mixed activations are multiplied with 4-bit weights: w4ax")
        return Fmpq(block=int(group or GROUP), cache=cache)
    weights = {"16": None, "8": f"int8_g{group}" if group else "int8_row", "4": f"int4_g{group or GROUP}"}[bits]
    activations = {"16": None, "8": "int8_row", "4": f"int4_g{group or GROUP}"}[active]
    return QuantisedWeights(weights, activations, cache)


def quantised(how: AnyQuantised, cfg: ModelConfig, loaded: Loaded, ops: Ops) -> tuple[Any, Ops, str]:
    """The loaded model's parameters in number formats, what multiplies them, and a sentence on what became of them ("": none).

    Raises:
      UserError, ValueError: what the model has does not fit, see `QuantisedWeights.apply` and `Fmpq.apply`.
    """
    if isinstance(how, QuantisedWeights):
        return how.apply(cfg, loaded.params), how.ops(ops), ""
    params, eight = how.apply(cfg, loaded.params, batches(how.text, cfg, loaded))
    shares = share_of_four(cfg, eight)
    sites = ", ".join(f"{site} {100 * share:.1f} %" for site, share in shares.items() if site != "all")
    return params, how.ops(ops), f"FMPQ: {100 * shares['all']:.1f} % of multiplications in 4 bits ({sites})"


def batches(text: str | None, cfg: ModelConfig, loaded: Loaded) -> list:
    """Tokens to find outliers on: up to `ROWS` rows of `LENGTH`."""
    import argparse

    import numpy as np

    # By default a long file that every Python has.
    path = Path(argparse.__file__ if text is None else text).expanduser()
    if not path.is_file():
        raise UserError(f"quantise.text = {text!r}: there is no such file of text to find outliers on")
    ids = np.asarray(loaded.encode(path.read_text(errors="replace")), np.int32)
    length = min(LENGTH, cfg.context, len(ids))
    rows = min(ROWS, len(ids) // length)
    return [ids[: rows * length].reshape(rows, length)]
