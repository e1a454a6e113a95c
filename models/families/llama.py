"""Llama 2 and 3 (`LlamaForCausalLM`), and the rows and options that Mistral, Qwen2, Qwen3 and Gemma 3 share with it."""

from __future__ import annotations

from typing import Any

from jaxpar.models.config import ModelConfig
from jaxpar.models.families import gguf_metadata, rope
from jaxpar.models.families.options import Options, activation, activation_name
from jaxpar.models.families.table import Family, Layout, Row, require
from jaxpar.models.feedforward.dense import GatedMLP
from jaxpar.models.norms import RMSNorm
from jaxpar.models.positions import Rope

BLOCK = "model.layers.{layer}"


def interleaved(pattern: str) -> Layout:
    """GGUF's "llama" files store queries and keys with the two halves of a head interleaved: ggml turns neighbours."""
    return Layout(pattern, sizes=(("two", 2),))


def attention_rows(interleave: bool = False) -> tuple[Row, ...]:
    """The projections, with the biases that some families have.

    Args:
      interleave: whether GGUF files of this family interleave the halves of queries and keys.
    """
    rows = []
    for ours, theirs, gguf, turns in (
        ("query", "q_proj", "attn_q", True),
        ("key", "k_proj", "attn_k", True),
        ("value", "v_proj", "attn_v", False),
    ):
        rows += [
            Row(
                f"layers/attention/{ours}/kernel",
                f"{BLOCK}.self_attn.{theirs}.weight",
                "(h k) d -> d h k",
                f"blk.{{layer}}.{gguf}.weight",
                interleaved("(h half two) d -> d h (two half)") if interleave and turns else None,
            ),
            Row(
                f"layers/attention/{ours}/bias",
                f"{BLOCK}.self_attn.{theirs}.bias",
                "(h k) -> h k",
                f"blk.{{layer}}.{gguf}.bias",
                interleaved("(h half two) -> h (two half)") if interleave and turns else None,
            ),
        ]
    return (
        *rows,
        Row(
            "layers/attention/out/kernel",
            f"{BLOCK}.self_attn.o_proj.weight",
            "d (h k) -> h k d",
            "blk.{layer}.attn_output.weight",
        ),
        Row("layers/attention/out/bias", f"{BLOCK}.self_attn.o_proj.bias", "", "blk.{layer}.attn_output.bias"),
    )


def norm_rows(names: dict[str, tuple[str, str]], gguf_layout: Layout | None = None) -> tuple[Row, ...]:
    """Scales of norms: `{our path: (Hugging Face's name, GGUF's name)}`, both without their `.weight`."""
    return tuple(
        Row(f"{path}/scale", f"{theirs}.weight", "", f"{gguf}.weight", gguf_layout)
        for path, (theirs, gguf) in names.items()
    )


PRE_NORMS = {
    "layers/attention/norm": (f"{BLOCK}.input_layernorm", "blk.{layer}.attn_norm"),
    "layers/feedforward/norm": (f"{BLOCK}.post_attention_layernorm", "blk.{layer}.ffn_norm"),
    "head/norm": ("model.norm", "output_norm"),
}
QK_NORMS = {
    "layers/attention/query_norm": (f"{BLOCK}.self_attn.q_norm", "blk.{layer}.attn_q_norm"),
    "layers/attention/key_norm": (f"{BLOCK}.self_attn.k_norm", "blk.{layer}.attn_k_norm"),
}
EMBEDDING_ROWS = (
    Row("embedding/tokens", "model.embed_tokens.weight", "", "token_embd.weight"),
    Row("head/unembed/kernel", "lm_head.weight", "v d -> d v", "output.weight"),
)
MLP_ROWS = tuple(
    row
    for name in ("gate", "up", "down")
    for row in (
        Row(
            f"layers/feedforward/{name}/kernel",
            f"{BLOCK}.mlp.{name}_proj.weight",
            "o i -> i o",
            f"blk.{{layer}}.ffn_{name}.weight",
        ),
        Row(f"layers/feedforward/{name}/bias", f"{BLOCK}.mlp.{name}_proj.bias", "", f"blk.{{layer}}.ffn_{name}.bias"),
    )
)


def read_sizes(options: Options) -> dict[str, Any]:
    """The sizes that all of these families have under the same names, as arguments of `ModelConfig`."""
    heads = options.whole("num_attention_heads")
    width = options.whole("hidden_size")
    head_size = options.whole("head_dim", None)
    if head_size is None:
        if width % heads:
            raise ValueError(
                f"config.json: hidden_size = {width} is not divisible by num_attention_heads = {heads}, and it has no "
                "head_dim"
            )
        head_size = width // heads
    return {
        "vocabulary": options.whole("vocab_size"),
        "layers": options.whole("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": options.whole("num_key_value_heads", heads),
        "head_size": head_size,
        "hidden": options.whole("intermediate_size"),
        "context": options.whole("max_position_embeddings"),
        "init_std": options.number("initializer_range", 0.02, zero=True),
    }


def write_sizes(cfg: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": cfg.vocabulary,
        "num_hidden_layers": cfg.layers,
        "hidden_size": cfg.width,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_size,
        "intermediate_size": cfg.hidden,
        "max_position_embeddings": cfg.context,
        "initializer_range": cfg.init_std,
        "rms_norm_eps": cfg.norm.epsilon,
        "tie_word_embeddings": cfg.tied_embeddings,
    }


def whole_heads(cfg: ModelConfig, family: str) -> None:
    """Transformers' own check of these families' configurations."""
    if cfg.width % cfg.heads:
        raise ValueError(f"{family} needs a width divisible by the heads, and {cfg.width} is not by {cfg.heads}")


def to_config(hf: dict) -> ModelConfig:
    options = Options(hf, "llama")
    sizes = read_sizes(options)
    bias = options.flag("attention_bias", False)
    cfg = ModelConfig(
        **sizes,
        norm=RMSNorm(options.number("rms_norm_eps", 1e-6, zero=True)),
        positions=rope.read(options, sizes["context"], sizes["head_size"]),
        feedforward=GatedMLP(activation(options, "hidden_act", "silu"), options.flag("mlp_bias", False)),
        qkv_bias=bias,
        attention_out_bias=bias,
        tied_embeddings=options.flag("tie_word_embeddings", False),
    )
    options.done()
    return cfg


def from_config(cfg: ModelConfig) -> dict:
    require(cfg, "llama", norm=RMSNorm, feedforward=GatedMLP, positions=Rope)
    whole_heads(cfg, "llama")
    return {
        **write_sizes(cfg),
        "hidden_act": activation_name(cfg.feedforward.activation),
        "rope_parameters": rope.write(cfg.positions, cfg.context),
        "attention_bias": cfg.qkv_bias,
        "mlp_bias": cfg.feedforward.bias,
    }


def gguf_config(keys: gguf_metadata.Keys) -> dict[str, Any]:
    return {
        **gguf_metadata.config(keys),
        "mlp_bias": gguf_metadata.has_bias(keys, "ffn_gate", "ffn_up", "ffn_down"),
    }


FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    rows=(*EMBEDDING_ROWS, *norm_rows(PRE_NORMS), *attention_rows(interleave=True), *MLP_ROWS),
    to_config=to_config,
    from_config=from_config,
    gguf="llama",
    gguf_config=gguf_config,
    spellings=(("", "model."),),
)
