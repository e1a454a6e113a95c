"""GPT-2 (`GPT2LMHeadModel`). Its linear layers are stored inputs first, with query, key and value in one."""

from __future__ import annotations

from typing import Any

from jaxpar.models.config import ModelConfig
from jaxpar.models.families import gguf_metadata
from jaxpar.models.families.options import Options, activation
from jaxpar.models.families.table import Family, Row, require
from jaxpar.models.feedforward.dense import MLP
from jaxpar.models.norms import LayerNorm
from jaxpar.models.positions import Learned

BLOCK = "transformer.h.{layer}"


def linear(ours: str, theirs: str, gguf: str) -> tuple[Row, Row]:
    """A feed-forward projection, transposed by GGUF."""
    return (
        Row(f"{ours}/kernel", f"{theirs}.weight", "", f"{gguf}.weight", "o i -> i o"),
        Row(f"{ours}/bias", f"{theirs}.bias", "", f"{gguf}.bias"),
    )


def norm(ours: str, theirs: str, gguf: str) -> tuple[Row, Row]:
    return (
        Row(f"{ours}/scale", f"{theirs}.weight", "", f"{gguf}.weight"),
        Row(f"{ours}/bias", f"{theirs}.bias", "", f"{gguf}.bias"),
    )


QKV = tuple(f"layers/attention/{name}" for name in ("query", "key", "value"))
ROWS = (
    Row("embedding/tokens", "transformer.wte.weight", "", "token_embd.weight"),
    Row("embedding/positions", "transformer.wpe.weight", "", "position_embd.weight"),
    *norm("layers/attention/norm", f"{BLOCK}.ln_1", "blk.{layer}.attn_norm"),
    Row(
        tuple(f"{path}/kernel" for path in QKV),
        f"{BLOCK}.attn.c_attn.weight",
        "d (three h k) -> three d h k",
        "blk.{layer}.attn_qkv.weight",
        "(three h k) d -> three d h k",
    ),
    Row(
        tuple(f"{path}/bias" for path in QKV),
        f"{BLOCK}.attn.c_attn.bias",
        "(three h k) -> three h k",
        "blk.{layer}.attn_qkv.bias",
    ),
    Row(
        "layers/attention/out/kernel",
        f"{BLOCK}.attn.c_proj.weight",
        "(h k) d -> h k d",
        "blk.{layer}.attn_output.weight",
        "d (h k) -> h k d",
    ),
    Row("layers/attention/out/bias", f"{BLOCK}.attn.c_proj.bias", "", "blk.{layer}.attn_output.bias"),
    *norm("layers/feedforward/norm", f"{BLOCK}.ln_2", "blk.{layer}.ffn_norm"),
    *linear("layers/feedforward/up", f"{BLOCK}.mlp.c_fc", "blk.{layer}.ffn_up"),
    *linear("layers/feedforward/down", f"{BLOCK}.mlp.c_proj", "blk.{layer}.ffn_down"),
    *norm("head/norm", "transformer.ln_f", "output_norm"),
    Row("head/unembed/kernel", "lm_head.weight", "v d -> d v", "output.weight"),
)


def to_config(hf: dict) -> ModelConfig:
    options = Options(hf, "gpt2")
    width, heads = options.whole("n_embd"), options.whole("n_head")
    options.expect(scale_attn_by_inverse_layer_idx=False)
    dropout = options.number("resid_pdrop", 0.1, zero=True)
    if options.number("embd_pdrop", 0.1, zero=True) != dropout:
        raise ValueError("config.json: resid_pdrop and embd_pdrop differ, and one dropout serves both; set them equal")
    cfg = ModelConfig(
        vocabulary=options.whole("vocab_size"),
        layers=options.whole("n_layer"),
        width=width,
        heads=heads,
        hidden=options.whole("n_inner", 4 * width),
        context=options.whole("n_positions"),
        norm=LayerNorm(options.number("layer_norm_epsilon", 1e-5, zero=True)),
        positions=Learned(),
        feedforward=MLP(activation(options, "activation_function", "gelu_new")),
        qkv_bias=True,
        attention_out_bias=True,
        attention_scale=None if options.flag("scale_attn_weights", True) else 1.0,
        tied_embeddings=options.flag("tie_word_embeddings", True),
        dropout=dropout,
        init_std=options.number("initializer_range", 0.02, zero=True),
    )
    options.done()
    return cfg


def from_config(cfg: ModelConfig) -> dict:
    require(cfg, "gpt2", norm=LayerNorm, feedforward=MLP, positions=Learned)
    hidden = "gelu_new" if cfg.feedforward.activation == "gelu_tanh" else cfg.feedforward.activation
    return {
        "vocab_size": cfg.vocabulary,
        "n_layer": cfg.layers,
        "n_embd": cfg.width,
        "n_head": cfg.heads,
        "n_inner": cfg.hidden,
        "n_positions": cfg.context,
        "layer_norm_epsilon": cfg.norm.epsilon,
        "activation_function": hidden,
        "scale_attn_weights": cfg.scale != 1.0 or cfg.head_size == 1,
        "tie_word_embeddings": cfg.tied_embeddings,
        "resid_pdrop": cfg.dropout,
        "embd_pdrop": cfg.dropout,
        "attn_pdrop": 0.0,
        "initializer_range": cfg.init_std,
    }


def gguf_config(keys: gguf_metadata.Keys) -> dict[str, Any]:
    return {
        "vocab_size": gguf_metadata.vocabulary(keys),
        "n_layer": keys.whole("block_count"),
        "n_embd": keys.whole("embedding_length"),
        "n_head": keys.whole("attention.head_count"),
        "n_inner": keys.whole("feed_forward_length"),
        "n_positions": keys.whole("context_length"),
        "layer_norm_epsilon": keys.take("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in keys.tensors,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        **keys.ids,
    }


FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    rows=ROWS,
    to_config=to_config,
    from_config=from_config,
    gguf="gpt2",
    gguf_config=gguf_config,
    spellings=(("", "transformer."),),
    # The causal mask, which old files hold as a buffer.
    left_out=(r"\.attn\.(bias|masked_bias)$",),
)
