"""Small GGUF files, written with the `gguf` package from a `transformers` model: for tests."""

import gguf
import numpy as np

from jaxpar.models.families.table import LAYER

SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
}


def write(path, arch: str, keys: dict, tensors: dict, types: dict | None = None, tokenizer: dict | None = None):
    """A GGUF file.

    Args:
      keys: without the architecture's name before them, or whole where they begin with `general.` or `split.`.
      tensors: name -> float32 array.
      types: name -> `gguf.GGMLQuantizationType`, for what is not stored as F32.
      tokenizer: entries of `tokenizer.ggml`.
    """
    writer = gguf.GGUFWriter(path, arch)
    named = {k if k.startswith(("general.", "split.")) else f"{arch}.{k}": v for k, v in keys.items()}
    named |= {f"tokenizer.ggml.{k}": v for k, v in (tokenizer or {}).items()}
    for key, value in named.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case float():
                writer.add_float32(key, value)
            case str():
                writer.add_string(key, value)
            case list():
                writer.add_array(key, value)
    for name, value in tensors.items():
        value = np.ascontiguousarray(value, np.float32)
        kind = (types or {}).get(name, gguf.GGMLQuantizationType.F32)
        if kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def sizes_of(config) -> dict:
    return {ours: getattr(config, theirs) for ours, theirs in SIZES.items()}


def tensors_of(model, arch: str, plus: float = 0.0) -> dict:
    """A model's weights under the names, and in the layouts, that llama.cpp's converter gives them.

    Written out by hand, not by our tables, which are what is tested.
    """
    config = model.config
    table = gguf.get_tensor_name_map(
        next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == arch), config.num_hidden_layers
    )
    found = {}
    for name, p in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        base, suffix = name.rsplit(".", 1)
        value = p.detach().numpy().copy()
        if arch == "llama" and base.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
            rows = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
            value = rows.swapaxes(1, 2).reshape(value.shape)
        if arch == "gpt2" and base.endswith(("c_attn", "c_proj", "c_fc")) and value.ndim == 2:
            value = value.T
        if base.endswith("norm") and suffix == "weight":
            value = value + plus
        found[f"{table.get_name(base)}.{suffix}"] = value
    return found


def names_of_table(family, layers: int) -> dict[str, str]:
    """GGUF's name -> Hugging Face's, of every row of a family's table."""
    found = {}
    for row in family.rows:
        for layer in range(layers if row.stacked else 1):
            found[row.gguf.replace(LAYER, str(layer))] = row.name.replace(LAYER, str(layer))
    return found
