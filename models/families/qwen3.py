"""Qwen3 (`Qwen3ForCausalLM`): Llama with normalised queries and keys, and optional windows."""

from __future__ import annotations

from jaxpar.models.config import ModelConfig
from jaxpar.models.families import gguf_metadata, llama, qwen2, rope
from jaxpar.models.families.options import Options, activation, activation_name
from jaxpar.models.families.table import Family, require
from jaxpar.models.feedforward.dense import GatedMLP
from jaxpar.models.norms import RMSNorm
from jaxpar.models.positions import Rope


def to_config(hf: dict) -> ModelConfig:
    # Transformers' default head size is 128, not width / heads.
    options = Options({"head_dim": 128, **hf}, "qwen3")
    sizes = llama.read_sizes(options)
    bias = options.flag("attention_bias", False)
    cfg = ModelConfig(
        **sizes,
        norm=RMSNorm(options.number("rms_norm_eps", 1e-6, zero=True)),
        qk_norm=True,
        positions=rope.read(options, sizes["context"], sizes["head_size"]),
        feedforward=GatedMLP(activation(options, "hidden_act", "silu")),
        qkv_bias=bias,
        attention_out_bias=bias,
        **qwen2.read_windows(options, sizes["layers"]),
        tied_embeddings=options.flag("tie_word_embeddings", False),
    )
    options.done()
    return cfg


def from_config(cfg: ModelConfig) -> dict:
    require(cfg, "qwen3", norm=RMSNorm, feedforward=GatedMLP, positions=Rope)
    return {
        **llama.write_sizes(cfg),
        "hidden_act": activation_name(cfg.feedforward.activation),
        "rope_parameters": rope.write(cfg.positions, cfg.context),
        "attention_bias": cfg.qkv_bias,
        **qwen2.write_windows(cfg),
    }


FAMILY = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=(
        *llama.EMBEDDING_ROWS,
        *llama.norm_rows(llama.PRE_NORMS | llama.QK_NORMS),
        *llama.attention_rows(),
        *llama.MLP_ROWS,
    ),
    to_config=to_config,
    from_config=from_config,
    gguf="qwen3",
    gguf_config=gguf_metadata.config,
    spellings=llama.FAMILY.spellings,
)
