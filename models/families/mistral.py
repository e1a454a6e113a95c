"""Mistral (`MistralForCausalLM`): Llama with a sliding window in every layer."""

from __future__ import annotations

from dataclasses import replace

from jaxpar.models.config import ModelConfig
from jaxpar.models.families import llama, rope
from jaxpar.models.families.options import Options, activation, activation_name
from jaxpar.models.families.table import require
from jaxpar.models.feedforward.dense import GatedMLP
from jaxpar.models.norms import RMSNorm
from jaxpar.models.positions import Rope


def to_config(hf: dict) -> ModelConfig:
    # In a Mistral file a window of null is a choice (no window); only a file without the entry has the default.
    options = Options({"num_key_value_heads": 8, "sliding_window": 4096, **hf}, "mistral")
    sizes = llama.read_sizes(options)
    cfg = ModelConfig(
        **sizes,
        norm=RMSNorm(options.number("rms_norm_eps", 1e-6, zero=True)),
        positions=rope.read(options, sizes["context"], sizes["head_size"]),
        feedforward=GatedMLP(activation(options, "hidden_act", "silu")),
        window=options.whole("sliding_window", None),
        tied_embeddings=options.flag("tie_word_embeddings", False),
    )
    options.done()
    return cfg


def from_config(cfg: ModelConfig) -> dict:
    require(cfg, "mistral", norm=RMSNorm, feedforward=GatedMLP, positions=Rope)
    return {
        **llama.write_sizes(cfg),
        "hidden_act": activation_name(cfg.feedforward.activation),
        "rope_parameters": rope.write(cfg.positions, cfg.context),
        "sliding_window": cfg.window,
    }


# GGUF files of Mistral say "llama" and hold no window.
FAMILY = replace(
    llama.FAMILY,
    name="mistral",
    architecture="MistralForCausalLM",
    to_config=to_config,
    from_config=from_config,
    gguf=None,
)
