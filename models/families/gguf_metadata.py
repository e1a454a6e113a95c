"""GGUF metadata as the `config.json` of the same model: every key of the architecture is honoured or refused.

Keys are llama.cpp's (`gguf.constants.Keys`). Where a file holds what transformers' own GGUF import drops (frequency
factors of Llama 3.1, linear scaling of Gemma 3, biases), it is honoured here.
"""

from __future__ import annotations

from typing import Any

HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.key_length_swa")
PLAIN = {
    "expert_count": 0,
    "expert_used_count": 0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "logit_scale": 0.0,
}
"""Keys whose other values we do not have."""
FACTORS = "rope_freqs.weight"
"""The tensor of frequency factors, which belongs to no layer."""


class Keys:
    """The keys of a file's own architecture, each taken once.

    Args:
      metadata: all keys of the file.
      tensors: name -> shape, outermost dimension first.
      factors: what `rope_freqs.weight` holds; None where the file has none.
    """

    def __init__(self, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]], factors: list[float] | None):
        self.arch = metadata["general.architecture"]
        self.left = {k[len(self.arch) + 1 :]: v for k, v in metadata.items() if k.startswith(f"{self.arch}.")}
        self.ids = {
            f"{ours}_token_id": metadata.get(f"tokenizer.ggml.{theirs}_token_id")
            for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
        }
        self.tensors = tensors
        self.factors = factors

    def take(self, key: str, *default: Any) -> Any:
        if key not in self.left and not default:
            raise ValueError(f"the GGUF file has no {self.arch}.{key}")
        return self.left.pop(key, *default)

    def whole(self, key: str, *default: Any) -> Any:
        """A positive integer (or the default)."""
        value = self.take(key, *default)
        if value not in default and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"GGUF file: {self.arch}.{key} must be a positive integer, got {value!r}")
        return value

    def done(self) -> None:
        """Refuse what is left, unless it is known to change nothing."""
        for key, value in self.left.items():
            if key in PLAIN and value != PLAIN[key]:
                raise ValueError(f"GGUF file: {self.arch}.{key} = {value!r} is not supported, only {PLAIN[key]!r} is")
            if key not in HARMLESS and key not in PLAIN:
                raise ValueError(f"GGUF file: {self.arch}.{key} = {value!r} is not a key that our {self.arch} knows")


def vocabulary(keys: Keys) -> int:
    if "token_embd.weight" not in keys.tensors:
        raise ValueError("the GGUF file has no tensor 'token_embd.weight'")
    return keys.tensors["token_embd.weight"][0]


def rope_parameters(keys: Keys, context: int, base: float = 10_000.0) -> dict[str, Any]:
    """The RoPE of (full) layers in `config.json`'s new format."""
    found = {"rope_theta": keys.take("rope.freq_base", base), "rope_type": "default"}
    kind = keys.take("rope.scaling.type", None)
    factor = keys.take("rope.scaling.factor", keys.take("rope.scale_linear", 1.0))
    original = keys.take("rope.scaling.original_context_length", context)
    if kind == "yarn":
        found |= {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        for name in ("beta_fast", "beta_slow"):
            if (value := keys.take(f"rope.scaling.yarn_{name}", None)) is not None:
                found[name] = value
    elif kind == "linear" or (kind is None and factor not in (0.0, 1.0)):
        found |= {"rope_type": "linear", "factor": factor}
    elif kind not in (None, "none"):
        raise ValueError(f"GGUF file: {keys.arch}.rope.scaling.type = {kind!r} is not one of none, linear and yarn")
    if keys.factors is not None:
        if found["rope_type"] != "default":
            raise ValueError(
                f"the GGUF file has both {FACTORS} and rope.scaling.type = {kind!r}; one at a time is read"
            )
        found |= {
            "rope_type": "longrope",
            "short_factor": keys.factors,
            "long_factor": keys.factors,
            "factor": 1.0,
            "attention_factor": keys.take("rope.scaling.attn_factor", 1.0),
            "original_max_position_embeddings": original,
        }
    return found


def sizes(keys: Keys) -> dict[str, Any]:
    """What all families but GPT-2 have in common."""
    heads, width = keys.whole("attention.head_count"), keys.whole("embedding_length")
    turned = keys.whole("rope.dimension_count", None)
    head_size = keys.whole("attention.key_length", None) or turned or width // heads
    for name, value in (
        ("attention.value_length", keys.whole("attention.value_length", head_size)),
        ("rope.dimension_count", turned),
    ):
        if value not in (None, head_size):
            raise ValueError(
                f"GGUF file: {keys.arch}.{name} = {value}, but the head size is {head_size}; they must be equal"
            )
    return {
        "vocab_size": vocabulary(keys),
        "num_hidden_layers": keys.whole("block_count"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": head_size,
        "intermediate_size": keys.whole("feed_forward_length"),
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": keys.take("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in keys.tensors,
        **keys.ids,
    }


def has_bias(keys: Keys, *names: str) -> bool:
    """Whether the first layer has all of these biases; ValueError where it has some of them."""
    found = [f"blk.0.{name}.bias" in keys.tensors for name in names]
    if any(found) != all(found):
        raise ValueError(f"GGUF file: of the biases of {', '.join(names)} some exist and some do not")
    return all(found)


def config(keys: Keys) -> dict[str, Any]:
    """A Llama-style file."""
    found = sizes(keys)
    found["rope_parameters"] = rope_parameters(keys, found["max_position_embeddings"])
    found["attention_bias"] = has_bias(keys, "attn_q", "attn_k", "attn_v", "attn_output")
    return found
