"""Presets and recipes: functions that return a configuration. Free of JAX.

A preset is where a command line starts: `jaxpar train NAME --steps 1000`. A new one is a function here and its name in
`PRESETS`; a variant of one is `preset().replace(...)` in the experiment that needs it.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxpar.config import RunConfig, SampleConfig
from jaxpar.data.config import DataConfig
from jaxpar.models.config import ModelConfig
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.models.norms import LayerNorm, RMSNorm
from jaxpar.models.positions import Learned, Rope
from jaxpar.optimisers_config import AdamW, WarmupCosine


def llama(layers: int, width: int, heads: int, *, hidden: int | None = None, **more) -> ModelConfig:
    """Llama's shape: RMSNorm, rotary positions, SwiGLU of 8/3 the width (rounded up to 32), no biases."""
    hidden = -(-8 * width // 3 // 32) * 32 if hidden is None else hidden
    return ModelConfig(
        layers=layers,
        width=width,
        heads=heads,
        hidden=hidden,
        norm=RMSNorm(),
        positions=Rope(),
        feedforward=GatedMLP("silu"),
        **more,
    )


def gpt2(layers: int, width: int, heads: int, **more) -> ModelConfig:
    """GPT-2's shape: LayerNorm, learned positions, GELU of 4 times the width, biases, tied embeddings."""
    return ModelConfig(
        layers=layers,
        width=width,
        heads=heads,
        norm=LayerNorm(),
        positions=Learned(),
        feedforward=MLP("gelu_tanh"),
        qkv_bias=True,
        attention_out_bias=True,
        **more,
    )


def first() -> RunConfig:
    """The first run: a small Llama on the standard library's sources, a few minutes on two CPU cores."""
    return RunConfig(
        folder="runs/first",
        steps=400,
        # Few layers: compiled one by one they take no longer to compile, and run a sixth faster on a CPU.
        model=llama(layers=4, width=128, heads=4, context=256, layer_loop="unroll").as_given(),
        data=DataConfig(length=128, batch=16),
        optimiser=AdamW(schedule=WarmupCosine(peak=3e-3)),
    )


def tiny() -> RunConfig:
    """A minute of nothing much, for trying things out: 2 layers of width 64, 40 steps."""
    return RunConfig(
        folder="runs/tiny",
        steps=40,
        model=llama(layers=2, width=64, heads=8, context=128).as_given(),
        data=DataConfig(length=64, batch=8),
        optimiser=AdamW(schedule=WarmupCosine(peak=3e-3)),
        evaluate_every=20,
        evaluate_batches=2,
        checkpoint_every=20,
        sample=SampleConfig(tokens=80),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {"first": first, "tiny": tiny}
DEFAULT = "first"
