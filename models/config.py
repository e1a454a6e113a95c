"""The decoder's configuration: frozen, hashable (static under `jit`), and free of JAX at import.

A choice that has hyper-parameters of its own is a strategy: a frozen dataclass with pure methods (`Rope`, `GatedMLP`,
`PreNorm`, ...). A new one is one more file and one more member of the union type below.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal

from jaxpar.models.exits.config import Exits
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.models.feedforward.duo import Duo
from jaxpar.models.norms import LayerNorm, RMSNorm
from jaxpar.models.positions import Learned, NoPositions, Rope
from jaxpar.models.residual.attention_residuals import AttentionResiduals
from jaxpar.models.residual.cross_attention import DeepCrossAttention
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.residual.dense_former import DenseFormer
from jaxpar.models.residual.depth_window import DepthWindow
from jaxpar.models.residual.elc_bert import ElcBert
from jaxpar.models.residual.hyper_connections import HyperConnections
from jaxpar.models.residual.manifold import ManifoldHyperConnections
from jaxpar.models.residual.mudd import MuddFormer
from jaxpar.models.residual.plain import Plain
from jaxpar.models.residual.short_window import ShortWindow
from jaxpar.models.residual.vertical import VerticalAttention
from jaxpar.models.routing.depth import EveryToken, MixtureOfDepths

Norm = RMSNorm | LayerNorm
Positions = Rope | Learned | NoPositions
FeedForward = GatedMLP | MLP | Duo
Residual = (
    Plain
    | AttentionResiduals
    | HyperConnections
    | ManifoldHyperConnections
    | DeepDelta
    | MuddFormer
    | DeepCrossAttention
    | DenseFormer
    | ElcBert
    | VerticalAttention
    | DepthWindow
    | ShortWindow
)

Depth = EveryToken | MixtureOfDepths

Remat = Literal["none", "full", "dots"]
Dtype = Literal["float32", "bfloat16"]
AttentionImplementation = Literal["xla", "mosaic_gpu", "cudnn", "mosaic_tpu"]


@dataclass(frozen=True)
class ModelConfig:
    """One decoder, wide enough for GPT-2, Llama 2/3, Mistral, Qwen2, Qwen3 and Gemma 3.

    Letters in shapes: B batch, T tokens (queries), S keys, D width, H query heads, G key/value heads, K head size,
    F feed-forward hidden size, V vocabulary, L layers.

    Attributes:
      vocabulary: number of token ids V.
      layers: number of layers L.
      width: size D of the residual stream.
      heads: query heads H.
      kv_heads: key/value heads G; must divide `heads`. None: as many as `heads`.
      head_size: K. None: `width // heads`.
      hidden: feed-forward hidden size F. None: 4 × width.
      context: the longest sequence, in tokens.
      norm: the normalisation and its epsilon.
      norm_placement: where a branch is normalised: before it ("pre": GPT-2, Llama), after it and before the residual
        add ("post": OLMo 2), or both ("pre_post": Gemma 3).
      qk_norm: normalise queries and keys over the head size before the rotary embedding (Qwen3, Gemma 3).
      positions: how positions enter.
      feedforward: the feed-forward layer.
      residual: the residual stream's operator.
      depth: which tokens run in which layer.
      exits: where tokens may leave the stack early, and how that is trained.
      qkv_bias, attention_out_bias: biases of the attention projections (the feed-forward's own stand in its strategy).
      window: attention span, in tokens, of sliding-window layers; a query sees itself and `window - 1` before it.
      window_pattern: which layers slide, repeated over the stack: `(True,)` all (Mistral), `(True,)*5 + (False,)` five
        of six (Gemma 3). Used where `window` is set.
      attention_scale: multiplies the logits. None: `head_size ** -0.5`.
      attention_cap, logit_cap: soft caps `c·tanh(x/c)` of attention and output logits. None: no cap.
      attention_implementation: what computes attention in training and evaluation, as `jaxpar.pallas_kernels.attention`
        names it; a run that it cannot do does not start. None: the best that fits. In generation "xla" is that, and any
        other name as None.
      tied_embeddings: the output projection is the embedding's transpose.
      embedding_scale: multiplies embeddings (Gemma: sqrt(width)). None: 1.
      init_std: standard deviation of initial weights; output projections are scaled by 1/sqrt(2·layers) (GPT-2).
      dropout: probability with which an element of a branch's output (and of the embedding) is zeroed in training.
      dtype: compute dtype. Parameters are stored in float32; softmax, norms and the loss run in float32.
      remat: what the backward pass recomputes: "none", "full" (keep only the stream between layers), "dots" (keep the
        outputs of projections and of attention). Attention weights, and what follows from the input of a norm or of an
        activation, are recomputed in any case.
      layer_loop: "scan" compiles one layer and loops; "unroll" compiles each (faster on CPU for few layers).
      loss_chunk: tokens of a sequence whose logits exist at a time in the cross-entropy.
    """

    vocabulary: int = 320
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    head_size: int | None = None
    hidden: int | None = None
    context: int = 256
    norm: Norm = RMSNorm()
    norm_placement: Literal["pre", "post", "pre_post"] = "pre"
    qk_norm: bool = False
    positions: Positions = Rope()
    feedforward: FeedForward = GatedMLP()
    residual: Residual = Plain()
    depth: Depth = EveryToken()
    exits: Exits = Exits()
    qkv_bias: bool = False
    attention_out_bias: bool = False
    window: int | None = None
    window_pattern: tuple[bool, ...] = (True,)
    attention_scale: float | None = None
    attention_cap: float | None = None
    attention_implementation: AttentionImplementation | None = None
    logit_cap: float | None = None
    tied_embeddings: bool = True
    embedding_scale: float | None = None
    init_std: float = 0.02
    dropout: float = 0.0
    dtype: Dtype = "float32"
    remat: Remat = "none"
    layer_loop: Literal["scan", "unroll"] = "scan"
    loss_chunk: int = 512

    def __post_init__(self):
        fill = lambda name, value: object.__setattr__(self, name, value)
        for name in ("vocabulary", "layers", "width", "heads", "context", "loss_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be at least 1, got {getattr(self, name)}")
        fill("_derived", tuple(n for n in ("kv_heads", "head_size", "hidden") if getattr(self, n) is None))
        if self.kv_heads is None:
            fill("kv_heads", self.heads)
        if self.head_size is None:
            if self.width % self.heads:
                raise ValueError(
                    f"model.width = {self.width} is not divisible by model.heads = {self.heads}; "
                    "choose a multiple, or set model.head_size"
                )
            fill("head_size", self.width // self.heads)
        if self.hidden is None:
            fill("hidden", 4 * self.width)
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads = {self.heads} is not divisible by model.kv_heads = {self.kv_heads}; each key/value head "
                "serves the same number of query heads"
            )
        if self.head_size < 1 or self.hidden < 1:
            raise ValueError(f"model.head_size = {self.head_size} and model.hidden = {self.hidden} must be at least 1")
        if self.window is not None and self.window < 1:
            raise ValueError(f"model.window must be at least 1 token, got {self.window}; leave it out for none")
        if not self.window_pattern:
            raise ValueError("model.window_pattern is empty; give one entry for each layer of the repeated pattern")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout = {self.dropout} is outside [0, 1)")
        if isinstance(self.positions, Rope) and self.positions.rotated(self.head_size) % 2:
            raise ValueError(
                f"rotary embeddings turn pairs, but {self.positions.rotated(self.head_size)} of model.head_size = "
                f"{self.head_size} dimensions are rotated; choose an even number"
            )
        self.residual.check(self)
        self.feedforward.check(self)
        self.depth.check(self)
        self.exits.check(self)

    def replace(self, **changes) -> ModelConfig:
        """A copy with other values; derived sizes (kv_heads, head_size, hidden) keep what they were."""
        return replace(self, **changes)

    def as_given(self) -> ModelConfig:
        """A copy whose derived sizes are None again: the start of a command line, on which `--width` changes them too."""
        copy = object.__new__(ModelConfig)
        for f in fields(self):
            object.__setattr__(copy, f.name, None if f.name in self._derived else getattr(self, f.name))
        return copy

    def slides(self, layer: int) -> bool:
        """Whether this layer's attention is limited to `window` tokens."""
        return self.window is not None and self.window_pattern[layer % len(self.window_pattern)]

    @property
    def scale(self) -> float:
        return self.head_size**-0.5 if self.attention_scale is None else self.attention_scale
