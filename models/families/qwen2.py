"""Qwen2 and Qwen2.5 (`Qwen2ForCausalLM`): Llama with biases of queries, keys and values, and optional windows."""

from __future__ import annotations

from typing import Any

from jaxpar.models.config import ModelConfig
from jaxpar.models.families import gguf_metadata, llama, rope
from jaxpar.models.families.options import Options, activation, activation_name
from jaxpar.models.families.table import Family, require, shortest_pattern
from jaxpar.models.feedforward.dense import GatedMLP
from jaxpar.models.norms import RMSNorm
from jaxpar.models.positions import Rope


def read_layer_types(options: Options, layers: int, default: list[str]) -> list[bool]:
    """Which layers slide."""
    kinds = options.take("layer_types", default)
    if not isinstance(kinds, list):
        raise ValueError(f"config.json: layer_types must be a list, got {kinds!r}")
    if len(kinds) != layers:
        raise ValueError(f"config.json: layer_types has {len(kinds)} entries for num_hidden_layers = {layers}")
    for kind in kinds:
        if kind not in (rope.SLIDING, rope.FULL):
            raise ValueError(
                f"config.json: layer_types has {kind!r}, and only {rope.SLIDING!r} and {rope.FULL!r} are known"
            )
    return [kind == rope.SLIDING for kind in kinds]


def write_layer_types(cfg: ModelConfig) -> list[str]:
    return [rope.SLIDING if cfg.slides(layer) else rope.FULL for layer in range(cfg.layers)]


def read_windows(options: Options, layers: int) -> dict[str, Any]:
    """Qwen's options of sliding windows, as arguments of `ModelConfig`."""
    options.values.setdefault("sliding_window", 4096)  # null is a choice: no window
    window = options.whole("sliding_window", None)
    if not options.flag("use_sliding_window", False):
        window = None
    first = options.whole("max_window_layers", 28, least=0)
    default = [rope.SLIDING if window is not None and i >= first else rope.FULL for i in range(layers)]
    slides = read_layer_types(options, layers, default)
    if any(slides) and window is None:
        raise ValueError(
            f"config.json: layer_types has {rope.SLIDING!r}, but use_sliding_window is false or sliding_window is null"
        )
    return {"window": window, "window_pattern": shortest_pattern(slides)} if any(slides) else {}


def write_windows(cfg: ModelConfig) -> dict[str, Any]:
    kinds = write_layer_types(cfg)
    used = rope.SLIDING in kinds
    return {
        "use_sliding_window": used,
        "sliding_window": cfg.window if used else None,
        "max_window_layers": kinds.index(rope.SLIDING) if used else cfg.layers,
        "layer_types": kinds,
    }


def to_config(hf: dict) -> ModelConfig:
    options = Options(hf, "qwen2")
    sizes = llama.read_sizes(options)
    cfg = ModelConfig(
        **sizes,
        norm=RMSNorm(options.number("rms_norm_eps", 1e-6, zero=True)),
        positions=rope.read(options, sizes["context"], sizes["head_size"]),
        feedforward=GatedMLP(activation(options, "hidden_act", "silu")),
        qkv_bias=True,
        **read_windows(options, sizes["layers"]),
        tied_embeddings=options.flag("tie_word_embeddings", False),
    )
    options.done()
    return cfg


def from_config(cfg: ModelConfig) -> dict:
    require(cfg, "qwen2", norm=RMSNorm, feedforward=GatedMLP, positions=Rope)
    return {
        **llama.write_sizes(cfg),
        "hidden_act": activation_name(cfg.feedforward.activation),
        "rope_parameters": rope.write(cfg.positions, cfg.context),
        **write_windows(cfg),
    }


def gguf_config(keys: gguf_metadata.Keys) -> dict[str, Any]:
    found = gguf_metadata.sizes(keys)
    return {**found, "rope_parameters": gguf_metadata.rope_parameters(keys, found["max_position_embeddings"])}


FAMILY = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    rows=(*llama.EMBEDDING_ROWS, *llama.norm_rows(llama.PRE_NORMS), *llama.attention_rows(), *llama.MLP_ROWS),
    to_config=to_config,
    from_config=from_config,
    gguf="qwen2",
    gguf_config=gguf_config,
    spellings=llama.FAMILY.spellings,
)
