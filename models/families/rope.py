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


def read(options: Options, context: int, base: float = 10_000.0) -> Rope:
    """One RoPE for all layers.

    Args:
      context: `max_position_embeddings`, what scalings take for the original length where they name none.
      base: used where the file has none.
    """
    flat = _flat(options, base)
    return Rope(base=float(flat["rope_theta"]), scaling=scaling(flat, context))


def read_by_kind(options: Options, context: int, base: float, local_base: float) -> Rope:
    """Gemma 3: full layers have a base and a scaling, sliding ones a base of their own."""
    local = options.take("rope_local_base_freq", local_base)
    found = options.take("rope_parameters", None)
    if found is not None and (SLIDING in found or FULL in found):
        full, sliding = ({"rope_type": "default", **(found.get(kind) or {})} for kind in (FULL, SLIDING))
        full.update(options.take("rope_scaling", None) or {})
        full.setdefault("rope_theta", options.take("rope_theta", base))
    else:
        if found is not None:
            options.values["rope_parameters"] = found
        full, sliding = _flat(options, base), {}
    if scaling(sliding, context) is not None:
        raise ValueError(
            f"config.json: rope_parameters of {SLIDING} layers are scaled, and only plain ones are supported"
        )
    local_base = float(sliding.get("rope_theta", local))
    return Rope(base=float(full["rope_theta"]), scaling=scaling(full, context), local_base=local_base)


def _flat(options: Options, base: float) -> dict[str, Any]:
    """The one dictionary of the new format, from either."""
    scaled = options.take("rope_scaling", None)
    found = dict(scaled or options.take("rope_parameters", None) or {})
    options.take("rope_parameters", None)
    if any(isinstance(v, dict) for v in found.values()):
        raise ValueError(f"config.json: {options.family} has one RoPE for all layers, but rope_parameters has several")
    theta, fraction = options.take("rope_theta", None), options.take("partial_rotary_factor", None)
    found.setdefault("rope_theta", base if theta is None else theta)
    if fraction is not None:
        found.setdefault("partial_rotary_factor", fraction)
    return found


def scaling(parameters: dict[str, Any], context: int) -> Scaling | None:
    """One dictionary of the new format -> our scaling."""
    given = {k: v for k, v in parameters.items() if v is not None and k not in ("rope_theta", "type", "rope_type")}
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if given.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"config.json: partial_rotary_factor = {parameters['partial_rotary_factor']} is not supported for this "
            "family, whose heads turn whole"
        )
    original = given.pop("original_max_position_embeddings", context)
    match kind:
        case "default":
            found = None
        case "linear":
            found = LinearScaling(factor=_need(given, "factor", kind))
        case "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            found = Llama3Scaling(*(_need(given, name, kind) for name in names), original_context=original)
        case "yarn":
            found = _yarn(given, original, context)
        case "longrope":
            found = _longrope(given, original, context)
        case "dynamic":
            raise ValueError(
                "config.json: rope_type 'dynamic' changes the frequencies with the length of each call, which a cache "
                "cannot follow; use 'yarn' or 'linear'"
            )
        case _:
            raise ValueError(
                f"config.json: rope_type {kind!r} is unknown; known are default, linear, llama3, yarn and longrope"
            )
    if given:
        raise ValueError(f"config.json: rope_type {kind!r} does not take {min(given)!r}")
    return found


def _need(given: dict[str, Any], name: str, kind: str) -> Any:
    if name not in given:
        raise ValueError(f"config.json: rope_type {kind!r} needs {name!r}")
    return given.pop(name)


def _yarn(given: dict[str, Any], original: int, context: int) -> YarnScaling:
    factor = given.pop("factor", context / original)
    scale, scale_all = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    attention = given.pop("attention_factor", None)
    if attention is None and scale and scale_all:
        grown = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0
        attention = grown(scale) / grown(scale_all)
    return YarnScaling(
        factor=factor,
        original_context=original,
        beta_fast=given.pop("beta_fast", None) or 32.0,
        beta_slow=given.pop("beta_slow", None) or 1.0,
        attention_factor=attention,
        truncate=given.pop("truncate", True),
    )


def _longrope(given: dict[str, Any], original: int, context: int) -> FactorScaling:
    short, long = _need(given, "short_factor", "longrope"), _need(given, "long_factor", "longrope")
    if short != long:
        raise ValueError(
            "config.json: rope_type 'longrope' with a short_factor that differs from its long_factor changes the "
            "frequencies with the length of each call, which a cache cannot follow; set both to the one you want"
        )
    factor, attention = given.pop("factor", context / original), given.pop("attention_factor", None)
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
