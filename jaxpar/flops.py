"""FLOPs of a model, counted from its configuration, and what the devices could do: one definition, free of JAX.

Counted are multiplications and additions (2 a pair) of matrix products, as in PaLM (Chowdhery et al. 2022, appendix B)
with attention made exact: a query is multiplied only with the keys that it may see. Norms, activations, softmax, rotary
embeddings and the embedding look-up are left out (a few per cent at small widths, nothing at large ones).

For a sequence of T tokens, forward, a layer of width D, H query and G key/value heads of size K, hidden size F:

    projections   T · 2 · D·K·(H + 2·G) + T · 2 · H·K·D
    scores        pairs · 4 · H·K            pairs = Σ_i min(i + 1, window): T·(T + 1)/2 without a window
    feed-forward  T · 2 · 3·D·F  (gated) or T · 2 · 2·D·F
    and once      T · 2 · D·V                the output projection, tied or not

Training is 3 × forward: the backward pass multiplies twice for each product. *Model* FLOPs stop there: they are what
the mathematics needs and what MFU is made of. *Hardware* FLOPs add what the backward pass computes again (remat).

XLA's `cost_analysis()` is no substitute: it counts the body of a scan once, and masked attention as if all was seen.
Document masks in packed rows hide further pairs; they depend on the data and are not taken off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jaxpar.models.config import ModelConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs of a forward pass, a mean over the tokens of a sequence.

    Attributes:
      projections: queries, keys, values and the attention's output.
      scores: queries times keys, and weights times values.
      feedforward: the feed-forward layers.
      residual: the residual operator's own products.
      head: the output projection.
      exits: heads of early exits, which training runs beside it; decoding that never asks them does not.
    """

    projections: float
    scores: float
    feedforward: float
    residual: float
    head: float
    exits: float = 0.0

    @property
    def layers(self) -> float:
        return self.projections + self.scores + self.feedforward + self.residual

    @property
    def total(self) -> float:
        return self.layers + self.head + self.exits


def pairs(length: int, window: int | None = None, *, causal: bool = True) -> int:
    """Visible (query, key) pairs of a sequence of `length` tokens."""
    if not causal:
        return length * length
    w = length if window is None else min(window, length)
    return w * (w + 1) // 2 + (length - w) * w


def forward(cfg: ModelConfig, length: int | None = None, *, causal: bool = True) -> Flops:
    """Per token of a sequence of `length` tokens (default: the whole context).

    Args:
      causal: count visible pairs only. False counts every pair, as an implementation without skipping computes.
    """
    T = cfg.context if length is None else length
    D, H, G, K = cfg.width, cfg.heads, cfg.kv_heads, cfg.head_size
    # Of T tokens, how many run in each layer: all of them, but where a router picks.
    run = [cfg.depth.size(i, T) for i in range(cfg.layers)]
    share = sum(run) / T
    visible = sum(pairs(n, cfg.window if cfg.slides(i) else None, causal=causal) for i, n in enumerate(run))
    residual: Callable[[ModelConfig], int] = getattr(cfg.residual, "flops", lambda cfg: 0)
    return Flops(
        projections=share * (2 * D * K * (H + 2 * G) + 2 * H * K * D),
        scores=visible * 4 * H * K / T,
        feedforward=share * cfg.feedforward.flops(cfg),
        residual=cfg.layers * residual(cfg),
        head=2 * D * cfg.vocabulary,
        exits=cfg.exits.flops(cfg),
    )


def training(cfg: ModelConfig, length: int | None = None) -> float:
    """Model FLOPs of training on one token: 3 × forward, causal-aware, whatever is computed again."""
    return 3 * forward(cfg, length).total


def hardware(cfg: ModelConfig, length: int | None = None, *, causal: bool = True) -> float:
    """FLOPs that training on one token makes the device do, with what `cfg.remat` computes again.

    Attention keeps no weights, and runs its first product again (`scores / 2`) whatever the policy. "full" runs the
    layers' forward pass again, "dots" no product. The output projection is never run again (its gradient is taken
    together with the loss).
    """
    f = forward(cfg, length, causal=causal)
    again = f.scores / 2 + (f.layers if cfg.remat == "full" else 0.0)
    return 3 * f.total + again


def mfu(cfg: ModelConfig, tokens_per_second: float, peak: float, length: int | None = None) -> float:
    """Model FLOPs utilisation, in [0, 1]: model FLOPs a second over `peak` (FLOP/s of all devices together)."""
    return training(cfg, length) * tokens_per_second / peak


# Dense bfloat16 peak in FLOP/s of one JAX device, by a part of `device_kind`; the first that fits counts.
# TPU: Google Cloud's TPU pages "System architecture" (per chip; a JAX device of v2, v3 and 7x is half a chip).
# NVIDIA: the data sheets, without sparsity (where a sheet gives sparse figures only, half of them).
PEAKS: tuple[tuple[str, float, str], ...] = (
    ("TPU v2", 22.5e12, "Cloud TPU v2: 45 TFLOP/s a chip of two cores"),
    ("TPU v3", 61.5e12, "Cloud TPU v3: 123 TFLOP/s a chip of two cores"),
    ("TPU v4 lite", 138e12, "Jouppi et al. 2023, TPU v4i"),
    ("TPU v4", 275e12, "Cloud TPU v4"),
    ("TPU v5 lite", 197e12, "Cloud TPU v5e"),
    ("TPU v5e", 197e12, "Cloud TPU v5e"),
    ("TPU v5", 459e12, "Cloud TPU v5p"),
    ("TPU v6", 918e12, "Cloud TPU v6e (Trillium)"),
    ("TPU7x", 1153.5e12, "Cloud TPU7x (Ironwood): 2307 TFLOP/s a chip of two devices"),
    ("TPU v7", 1153.5e12, "Cloud TPU7x (Ironwood): 2307 TFLOP/s a chip of two devices"),
    ("GB300", 2500e12, "NVIDIA GB300 NVL72: 360 PFLOP/s sparse over 72"),
    ("B300", 2250e12, "NVIDIA HGX B300: 36 PFLOP/s sparse over 8"),
    ("GB200", 2500e12, "NVIDIA GB200 NVL72: 360 PFLOP/s sparse over 72"),
    ("B200", 2250e12, "NVIDIA HGX B200: 36 PFLOP/s sparse over 8"),
    ("H200 NVL", 835.5e12, "NVIDIA H200 NVL: 1671 sparse"),
    ("H200", 989.5e12, "NVIDIA H200 SXM: 1979 sparse"),
    ("GH200", 989.5e12, "NVIDIA GH200: 1979 sparse"),
    ("H100 NVL", 835.5e12, "NVIDIA H100 NVL: 1671 sparse"),
    ("H100 PCIe", 756.5e12, "NVIDIA H100 PCIe: 1513 sparse"),
    ("H100", 989.5e12, "NVIDIA H100 SXM: 1979 sparse"),
    ("H800", 989.5e12, "as NVIDIA H100 SXM"),
    ("A100", 312e12, "NVIDIA A100"),
    ("A800", 312e12, "as NVIDIA A100"),
    ("L40S", 362e12, "NVIDIA L40S: 733 sparse"),
    ("L4", 121e12, "NVIDIA L4: 242 sparse"),
    ("A10G", 70e12, "NVIDIA A10G"),
    ("RTX 4090", 165.2e12, "NVIDIA Ada architecture white paper, float32 accumulation"),
    ("RTX 3090", 71e12, "NVIDIA Ampere GA102 white paper, float32 accumulation"),
    ("V100", 125e12, "NVIDIA V100, float16 (it has no bfloat16)"),
    ("T4", 65e12, "NVIDIA T4, float16 (it has no bfloat16)"),
)


def peak(device_kind: str, devices: int = 1) -> float | None:
    """FLOP/s that `devices` of this kind can do in bfloat16, dense; None for a CPU and for kinds not in the table.

    Args:
      device_kind: `jax.Device.device_kind`.
    """
    words = f" {device_kind.lower().replace('-', ' ')} "
    for name, flops, _ in PEAKS:
        # At a word's start, and not before a digit: "L4" is not "L40", and "H200" is not in "GH200".
        at = words.find(f" {name.lower()}")
        if at >= 0 and not words[at + 1 + len(name)].isdigit():
            return flops * devices
    return None
