"""One small configuration that each family, and no earlier one, holds; random parameters for it."""

import jax
import numpy as np

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.families import FAMILIES
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.models.norms import LayerNorm, RMSNorm
from jaxpar.models.positions import Learned, LinearScaling, Rope
from jaxpar.models.spec import abstract

BY_NAME = {family.name: family for family in FAMILIES}
SMALL = {"vocabulary": 31, "layers": 3, "width": 16, "heads": 4, "kv_heads": 2, "hidden": 24, "context": 32}
GEMMA = {
    "norm": RMSNorm(1e-6, unit_offset=True),
    "norm_placement": "pre_post",
    "qk_norm": True,
    "feedforward": GatedMLP("gelu_tanh"),
    "embedding_scale": 4.0,
    "window": 8,
    "window_pattern": (True, True, False),
    "positions": Rope(1e6, LinearScaling(8.0), local_base=1e4),
    "attention_scale": 256**-0.5,
}
GPT2 = {
    "kv_heads": 4,
    "norm": LayerNorm(),
    "positions": Learned(),
    "feedforward": MLP(),
    "qkv_bias": True,
    "attention_out_bias": True,
}
EXAMPLES = {
    "llama": ModelConfig(**SMALL, tied_embeddings=False),
    "mistral": ModelConfig(**SMALL, window=8),
    "qwen2": ModelConfig(**SMALL, qkv_bias=True, window=8, window_pattern=(False, True, True)),
    "qwen3": ModelConfig(**SMALL, qk_norm=True, head_size=8),
    "gemma3_text": ModelConfig(**{**SMALL, **GEMMA}),
    "gpt2": ModelConfig(**{**SMALL, **GPT2}),
}


def params_of(cfg: ModelConfig, seed: int = 0):
    """Random parameters in the shapes of the configuration."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), abstract(decoder.spec(cfg)))
