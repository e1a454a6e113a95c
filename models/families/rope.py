"""RoPE options of `config.json`, in both formats, as `Rope`, and back.

Old: `rope_theta` and `rope_scaling` side by side (and `rope_local_base_freq` for Gemma 3). New (transformers 5):
`rope_parameters`, one dictionary, or for Gemma 3 one for each kind of layer. Formulas of transformers'
`modeling_rope_utils`.
"""

from __future__ import annotations

import math
from typing import Any

from jaxpar.models.families.options import Options
from jaxpar.models.positions import FactorScaling, LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling

SLIDING, FULL = "sliding_attention", "full_attention"


def read(options: Options, context: int, head_size: int, base: float = 10_000.0) -> Rope:
    """One RoPE for all layers.

    Args:
      context: `max_position_embeddings`, what scalings take for the original length where they name none.
      base: used where the file has none.
    """
    return Rope(*_base_and_scaling(_flat(options), options, context, head_size, base))


def read_by_kind(options: Options, context: int, head_size: int, base: float, local_base: float) -> Rope:
    """Gemma 3: full layers have a base and a scaling, sliding ones a base of their own."""
    local_base = options.number("rope_local_base_freq", local_base)
    new = options.table("rope_parameters")
    if SLIDING in new or FULL in new:
        kinds = Options(new, options.family, "config.json: rope_parameters")
        full, sliding = kinds.table(FULL) | options.table("rope_scaling"), kinds.table(SLIDING)
        if "rope_theta" in options.values:
            full.setdefault("rope_theta", options.take("rope_theta", None))
    else:
        options.values["rope_parameters"] = new
        full, sliding = _flat(options), {}
    local_base, scaled = _base_and_scaling(sliding, options, context, head_size, local_base)
    if scaled is not None:
        raise ValueError(f"config.json: rope_parameters of {SLIDING} layers are scaled, and only plain ones are known")
    return Rope(*_base_and_scaling(full, options, context, head_size, base), local_base=local_base)


def _flat(options: Options) -> dict[str, Any]:
    """The one dictionary of the new format, from either."""
    scaled, new = options.table("rope_scaling"), options.table("rope_parameters")
    found = dict(scaled or new)
    if any(isinstance(v, dict) for v in found.values()):
        raise ValueError(f"config.json: {options.family} has one RoPE for all layers, but rope_parameters has several")
    for name in ("rope_theta", "partial_rotary_factor"):
        if (value := options.take(name, None)) is not None:
            found.setdefault(name, value)
    return found


def _base_and_scaling(
    parameters: dict[str, Any], options: Options, context: int, head_size: int, base: float
) -> tuple[float, Scaling | None]:
    """One dictionary of the new format -> our base and scaling."""
    given = Options(parameters, options.family, "config.json: rope_parameters")
    base = given.number("rope_theta", base)
    old_name = given.text("type", "default")
    kind = given.text("rope_type", old_name)
    if base <= 1:
        raise ValueError(f"config.json: rope_theta must be above 1, got {base!r}")
    if (fraction := given.number("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(
            f"config.json: partial_rotary_factor = {fraction!r} is not supported for {options.family}, whose heads turn "
            "whole"
        )
    original = given.whole("original_max_position_embeddings", context)
    match kind:
        case "default":
            found = None
        case "linear":
            found = LinearScaling(factor=given.number("factor"))
        case "llama3":
            low, high = given.number("low_freq_factor"), given.number("high_freq_factor")
            if high <= low:
                raise ValueError(f"config.json: high_freq_factor = {high!r} must exceed low_freq_factor = {low!r}")
            found = Llama3Scaling(given.number("factor"), low, high, original)
        case "yarn":
            found = _yarn(given, original, context)
        case "longrope":
            found = _longrope(given, original, context, head_size)
        case "dynamic":
            raise ValueError(
                "config.json: rope_type 'dynamic' changes the frequencies with the length of each call, which a cache "
                "cannot follow; use 'yarn' or 'linear'"
            )
        case _:
            raise ValueError(
                f"config.json: rope_type {kind!r} is unknown; known are default, linear, llama3, yarn and longrope"
            )
    for name, value in given.values.items():
        if value is not None:
            raise ValueError(f"config.json: rope_type {kind!r} does not take {name!r}")
    return float(base), found


def _yarn(given: Options, original: int, context: int) -> YarnScaling:
    factor = given.number("factor", context / original)
    scale, scale_all = given.number("mscale", 0.0, zero=True), given.number("mscale_all_dim", 0.0, zero=True)
    attention = given.number("attention_factor", None)
    if attention is None and scale and scale_all:
        grown = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
        attention = grown(scale) / grown(scale_all)
    return YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=given.number("beta_fast", 32.0),
        beta_slow=given.number("beta_slow", 1.0),
        attention_factor=attention,
        truncate=given.flag("truncate", True),
    )


def _longrope(given: Options, original: int, context: int, head_size: int) -> FactorScaling:
    short, long = given.numbers("short_factor"), given.numbers("long_factor")
    if short != long:
        raise ValueError(
            "config.json: rope_type 'longrope' with a short_factor that differs from its long_factor changes the "
            "frequencies with the length of each call, which a cache cannot follow; set both to the one you want"
        )
    if len(short) != head_size // 2:
        raise ValueError(
            f"config.json: short_factor has {len(short)} entries, and half of head_dim is {head_size // 2}"
        )
    factor, attention = given.number("factor", context / original), given.number("attention_factor", None)
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return FactorScaling(factors=tuple(map(float, short)), attention_factor=attention)


def write(rope: Rope, context: int) -> dict[str, Any]:
    """`rope_parameters` of one RoPE for all layers."""
    return {"rope_theta": rope.base, **_written(rope.scaling, context)}


def write_by_kind(rope: Rope, context: int) -> dict[str, Any]:
    """`rope_parameters` of one RoPE for each kind of layer."""
    base, found = rope.of_layer(local=True)
    return {FULL: write(rope, context), SLIDING: {"rope_theta": base, **_written(found, context)}}


def _written(found: Scaling | None, context: int) -> dict[str, Any]:
    match found:
        case None:
            return {"rope_type": "default"}
        case LinearScaling():
            return {"rope_type": "linear", "factor": found.factor}
        case Llama3Scaling():
            return {
                "rope_type": "llama3",
                "factor": found.factor,
                "low_freq_factor": found.low_freq_factor,
                "high_freq_factor": found.high_freq_factor,
                "original_max_position_embeddings": found.original_context,
            }
        case YarnScaling():
            written = {
                "rope_type": "yarn",
                "factor": found.factor,
                "original_max_position_embeddings": found.original_context,
                "beta_fast": found.beta_fast,
                "beta_slow": found.beta_slow,
                "truncate": found.truncate,
            }
            return (
                written if found.attention_factor is None else {**written, "attention_factor": found.attention_factor}
            )
        case FactorScaling():
            return {
                "rope_type": "longrope",
                "short_factor": list(found.factors),
                "long_factor": list(found.factors),
                "factor": 1.0,
                "attention_factor": found.attention_factor,
                "original_max_position_embeddings": context,
            }
    raise ValueError(f"{type(found).__name__} has no name in Hugging Face's configurations")
