"""Gemma 3 (`Gemma3ForCausalLM`), and the language part of the files that also see (`gemma3`)."""

from __future__ import annotations

from typing import Any

from jaxpar.models.config import ModelConfig
from jaxpar.models.families import gguf_metadata, llama, qwen2, rope
from jaxpar.models.families.options import Options, activation
from jaxpar.models.families.table import Family, Layout, require, shortest_pattern
from jaxpar.models.feedforward.dense import GatedMLP
from jaxpar.models.norms import RMSNorm
from jaxpar.models.positions import Rope

BASE, LOCAL_BASE, PATTERN = 1_000_000.0, 10_000.0, 6
NORMS = {
    "layers/attention/norm": (f"{llama.BLOCK}.input_layernorm", "blk.{layer}.attn_norm"),
    "layers/attention/post_norm": (f"{llama.BLOCK}.post_attention_layernorm", "blk.{layer}.post_attention_norm"),
    "layers/feedforward/norm": (f"{llama.BLOCK}.pre_feedforward_layernorm", "blk.{layer}.ffn_norm"),
    "layers/feedforward/post_norm": (f"{llama.BLOCK}.post_feedforward_layernorm", "blk.{layer}.post_ffw_norm"),
    "head/norm": ("model.norm", "output_norm"),
}


def to_config(hf: dict) -> ModelConfig:
    if hf.get("text_config") is not None:
        # Files of the models that see hold only what differs from these.
        defaults = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 131_072}
        whole = {"vocab_size": 262_208, "quantization_config": hf.get("quantization_config")}
        hf = {**defaults, **whole, **Options(hf, "gemma3").table("text_config")}
    options = Options({"head_dim": 256, **hf}, "gemma3")
    sizes = llama.read_sizes(options)
    options.expect(use_bidirectional_attention=False)
    # Transformers reads this option and then computes without it, so no weights that need it can be checked.
    options.expect(attn_logit_softcapping=None)
    bias = options.flag("attention_bias", False)
    pattern = options.whole("sliding_window_pattern", PATTERN)
    default = [rope.SLIDING if (i + 1) % pattern else rope.FULL for i in range(sizes["layers"])]
    slides = qwen2.read_layer_types(options, sizes["layers"], default)
    options.values.setdefault("sliding_window", 4096)
    window = options.whole("sliding_window", None)
    if any(slides) and window is None:
        raise ValueError(f"config.json: layer_types has {rope.SLIDING!r}, but sliding_window is null")
    cfg = ModelConfig(
        **sizes,
        norm=RMSNorm(options.number("rms_norm_eps", 1e-6, zero=True), unit_offset=True),
        norm_placement="pre_post",
        qk_norm=True,
        positions=rope.read_by_kind(options, sizes["context"], sizes["head_size"], BASE, LOCAL_BASE),
        feedforward=GatedMLP(activation(options, "hidden_activation", "gelu_pytorch_tanh")),
        qkv_bias=bias,
        attention_out_bias=bias,
        window=window if any(slides) else None,
        window_pattern=shortest_pattern(slides),
        attention_scale=options.number("query_pre_attn_scalar", 256) ** -0.5,
        logit_cap=options.number("final_logit_softcapping", None),
        tied_embeddings=options.flag("tie_word_embeddings", True),
        embedding_scale=sizes["width"] ** 0.5,
    )
    options.take("hidden_act", None)  # an old name for hidden_activation, which files carry beside it
    options.done()
    return cfg


def from_config(cfg: ModelConfig) -> dict:
    require(cfg, "gemma3", norm=RMSNorm, feedforward=GatedMLP, positions=Rope)
    llama.whole_heads(cfg, "gemma3")
    scalar = round(cfg.scale**-2)
    if scalar < 1 or abs(scalar**-0.5 / cfg.scale - 1) > 1e-6:
        raise ValueError(f"gemma3 writes attention_scale as 1/sqrt(integer), and {cfg.scale} is {cfg.scale**-2}^-0.5")
    hidden = "gelu_pytorch_tanh" if cfg.feedforward.activation == "gelu_tanh" else cfg.feedforward.activation
    return {
        **llama.write_sizes(cfg),
        "hidden_activation": hidden,
        "rope_parameters": rope.write_by_kind(cfg.positions, cfg.context),
        "attention_bias": cfg.qkv_bias,
        "layer_types": qwen2.write_layer_types(cfg),
        "sliding_window": cfg.window or 4096,
        "query_pre_attn_scalar": scalar,
        "final_logit_softcapping": cfg.logit_cap,
        "attn_logit_softcapping": None,
        "use_bidirectional_attention": False,
    }


def gguf_config(keys: gguf_metadata.Keys) -> dict[str, Any]:
    found = gguf_metadata.sizes(keys)
    layers = found["num_hidden_layers"]
    if isinstance(keys.left.get("attention.sliding_window_pattern"), list):  # one entry for each layer
        slides = keys.take("attention.sliding_window_pattern")
    else:
        pattern = keys.whole("attention.sliding_window_pattern", PATTERN)
        slides = [bool((i + 1) % pattern) for i in range(layers)]
    # As llama.cpp, which tells the 27B model by its depth: it alone does not scale by the head size.
    whole = found["hidden_size"] // found["num_attention_heads"] if layers == 62 else found["head_dim"]
    return {
        **found,
        "rope_parameters": {
            rope.FULL: gguf_metadata.rope_parameters(keys, found["max_position_embeddings"], BASE),
            rope.SLIDING: {"rope_type": "default", "rope_theta": keys.take("rope.freq_base_swa", LOCAL_BASE)},
        },
        "layer_types": [rope.SLIDING if slide else rope.FULL for slide in slides],
        "sliding_window": keys.whole("attention.sliding_window"),
        "query_pre_attn_scalar": whole,
        "final_logit_softcapping": keys.take("final_logit_softcapping", None),
    }


FAMILY = Family(
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    rows=(
        *llama.EMBEDDING_ROWS,
        *llama.norm_rows(NORMS | llama.QK_NORMS, Layout(plus=1.0)),
        *llama.attention_rows(),
        *llama.MLP_ROWS,
    ),
    to_config=to_config,
    from_config=from_config,
    gguf="gemma3",
    gguf_config=gguf_config,
    aliases=("gemma3",),
    spellings=(*llama.FAMILY.spellings, ("language_model.", ""), ("model.language_model.", "model.")),
    left_out=(*llama.FAMILY.left_out, r"^(model\.)?(vision_tower|multi_modal_projector)\."),
)
