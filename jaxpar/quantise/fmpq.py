"""COMET's fine-grained mixed-precision quantisation (FMPQ, arXiv 2410.12168): 4-bit weights, and activations in 4 bits but
for the blocks of channels that hold outliers, which are in 8. Free of JAX at import.

    calibrated   largest magnitude of each channel that a product reads, on some batches of text
    orders       an order of channels that puts outliers first
    permuted     that order folded into the parameters beside: the float model is unchanged
    Fmpq.apply   all of it, and which blocks are in 8 bits: a model with `Mixed` kernels

Channels of the residual stream have one order for all layers (embeddings, norms and kernels are permuted alike); those of
the hidden layer one for each layer (columns of up and gate, rows of down); those of the attention's output one for each
key/value head (columns of value, rows of out), so that outliers come first within a head.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxpar.errors import UserError
from jaxpar.models.config import ModelConfig
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.models.lazy import jax, jnp
from jaxpar.models.residual.plain import Plain
from jaxpar.pallas_kernels import formats

if TYPE_CHECKING:
    from jaxpar.models.context import Ops

Tree = Any
KERNELS = {
    "attention in": ("attention", ("query", "key", "value")),
    "attention out": ("attention", ("out",)),
    "feedforward in": ("feedforward", ("gate", "up")),
    "feedforward out": ("feedforward", ("down",)),
}
"""The kernels that read the same channels: a site."""


@dataclass(frozen=True)
class Orders:
    """New channel i is old channel order[i].

    Attributes:
      stream: int [D].
      heads: int [L, G, K], of a head's values.
      hidden: int [L, F].
    """

    stream: np.ndarray
    heads: np.ndarray
    hidden: np.ndarray


@dataclass(frozen=True)
class Fmpq:
    """4-bit weights; activations in 4 bits but for blocks with outlier channels, which are in 8 (COMET).

    Attributes:
      block: channels of a block, which share a scale; weights have groups of as many.
      outlier: a channel is one where its largest magnitude is more than so many times that of the median channel.
      text: a file of text to find outliers on. None: a source file of Python's standard library.
      cache: the format that keys and values are kept in. None: the compute dtype.
    """

    block: int = 128
    outlier: float = 4.0
    text: str | None = None
    cache: str | None = None

    def __post_init__(self):
        if self.block < 2 or self.block % 2:
            raise ValueError(f"block = {self.block}; 4-bit codes lie two in a byte, so a block is an even number")
        if not self.outlier > 1:
            raise ValueError(f"outlier = {self.outlier} times the median channel; give a number above 1")
        if self.cache is not None:
            formats.get(self.cache)

    def check(self, cfg: ModelConfig) -> None:
        """Raises UserError where the model's channels cannot be ordered, or blocks do not divide them."""
        if not isinstance(cfg.residual, Plain) or not isinstance(cfg.feedforward, GatedMLP | MLP):
            raise UserError(
                "FMPQ orders the channels of a Plain residual stream and of GatedMLP or MLP, and this model has "
                f"{type(cfg.residual).__name__} and {type(cfg.feedforward).__name__}"
            )
        for what, size in (
            ("width", cfg.width),
            ("heads × head_size", cfg.heads * cfg.head_size),
            ("hidden", cfg.hidden),
        ):
            if size % self.block:
                raise UserError(
                    f"FMPQ: blocks of {self.block} channels do not divide {what} = {size}; give a smaller --quantise.block"
                )

    def apply(self, cfg: ModelConfig, params: Tree, batches: Iterable) -> tuple[Tree, dict[str, np.ndarray]]:
        """The model in 4 and 8 bits.

        Args:
          batches: int32 [B, T] tokens to find outliers on.

        Returns:
          Parameters, for `ops`; and of each site which blocks are in 8 bits, bool [L, blocks].

        Raises:
          UserError: see `check`; ValueError: NaN or infinity in a kernel.
        """
        from jaxpar.pallas_kernels.matmul.mixed import Mixed

        self.check(cfg)
        found = orders(cfg, calibrated(cfg, params, batches))
        params = permuted(params, found)
        largest = calibrated(cfg, params, batches)
        eight = {site: self.outliers(x) for site, x in largest.items()}
        layers = {branch: dict(tree) for branch, tree in params["layers"].items()}
        for site, (branch, names) in KERNELS.items():
            for name in (name for name in names if name in layers[branch]):
                entry = layers[branch][name]
                kernel = entry["kernel"]
                # Out sums over heads and their channels.
                flat = kernel.reshape(kernel.shape[0], -1, *kernel.shape[3 if name == "out" else 2 :])
                q = formats.quantise(flat, f"int4_g{self.block}", axis=1)
                layers[branch][name] = {**entry, "kernel": Mixed(q, jnp.asarray(eight[site]))}
        return {**params, "layers": layers}, eight

    def outliers(self, largest_LxK: np.ndarray) -> np.ndarray:
        """bool [L, blocks]: which blocks hold an outlier."""
        hit = largest_LxK > self.outlier * np.median(largest_LxK, axis=1, keepdims=True)
        return hit.reshape(hit.shape[0], -1, self.block).any(axis=2)

    def ops(self, ops: Ops) -> Ops:
        """With the product of `Mixed` kernels, and the cache's format."""
        from jaxpar.quantise.product import MixedProduct

        return replace(ops, matmul=MixedProduct(), cache=self.cache)


def share_of_four(cfg: ModelConfig, eight: dict[str, np.ndarray]) -> dict[str, float]:
    """The share of blocks in 4 bits at each site, and of all multiplications ("all")."""
    D, heads, values = cfg.width, cfg.heads * cfg.head_size, cfg.kv_heads * cfg.head_size
    wide = 2 if isinstance(cfg.feedforward, GatedMLP) else 1
    macs = {
        "attention in": D * (heads + 2 * values),
        "attention out": heads * D,
        "feedforward in": wide * D * cfg.hidden,
        "feedforward out": cfg.hidden * D,
    }
    shares = {site: float(1 - x.mean()) for site, x in eight.items()}
    return {**shares, "all": sum(shares[site] * macs[site] for site in macs) / sum(macs.values())}


def calibrated(cfg: ModelConfig, params: Tree, batches: Iterable) -> dict[str, np.ndarray]:
    """The largest magnitude of each channel at each site, over the batches: float32 [L, K]."""
    from jaxpar.models import context, decoder

    # Each layer traced by itself, so that what its products read can be told apart.
    cfg = cfg.replace(layer_loop="unroll", remat="none")
    reads = [site for site, (branch, names) in KERNELS.items() for n in names if n in params["layers"][branch]]

    @jax.jit
    def run(params, tokens):
        seen = []

        def matmul(x, w, contract: int = 1):
            flat = x.reshape(-1, int(np.prod(x.shape[x.ndim - contract :])))
            seen.append(jnp.max(jnp.abs(flat), axis=0).astype(jnp.float32))
            return context.matmul(x, w, contract)

        ctx = context.Context(ops=replace(context.Ops(), matmul=matmul))
        decoder.through(cfg, params, decoder.embed(cfg, params, tokens, ctx), ctx)
        layers = [dict(zip(reads, seen[i : i + len(reads)], strict=True)) for i in range(0, len(seen), len(reads))]
        return {site: jnp.stack([layer[site] for layer in layers]) for site in KERNELS}

    found = [jax.device_get(run(params, tokens)) for tokens in batches]
    if not found:
        raise UserError("FMPQ needs text to find outliers on, and got none")
    return {site: np.max([one[site] for one in found], axis=0) for site in KERNELS}


def orders(cfg: ModelConfig, largest: dict[str, np.ndarray]) -> Orders:
    """Channels by their largest magnitude, the largest first; where layers share an order, by the largest ratio to the median
    channel of the layer."""
    relative = [x / np.median(x, axis=1, keepdims=True) for x in (largest["attention in"], largest["feedforward in"])]
    # Query heads of a group read the same values.
    of_values = largest["attention out"].reshape(cfg.layers, cfg.kv_heads, -1, cfg.head_size).max(axis=2)
    down = lambda x: np.argsort(-x, axis=-1, kind="stable")
    return Orders(down(np.max(relative, axis=(0, 1))), down(of_values), down(largest["feedforward out"]))


def permuted(params: Tree, found: Orders) -> Tree:
    """The same float model with its channels in another order. Only sums over channels change their order."""
    stream = lambda x, axis: jnp.take(x, found.stream, axis=axis)
    last = lambda tree: jax.tree.map(lambda x: stream(x, -1), tree)
    layers = {branch: dict(tree) for branch, tree in params["layers"].items()}
    for tree in layers.values():
        for name in ("norm", "post_norm"):
            if name in tree:
                tree[name] = last(tree[name])
    attention, feedforward = layers["attention"], layers["feedforward"]
    for tree, names in ((attention, ("query", "key", "value")), (feedforward, ("gate", "up"))):
        for name in (name for name in names if name in tree):
            tree[name] = {**tree[name], "kernel": stream(tree[name]["kernel"], 1)}
    for tree, name in ((attention, "out"), (feedforward, "down")):
        tree[name] = last(tree[name])

    along = lambda x, order, axis: jnp.take_along_axis(x, order, axis=axis)
    # Columns that make a channel, and the rows that read it.
    heads = found.heads
    attention["value"] = {
        n: along(x, heads if n == "bias" else heads[:, None], -1) for n, x in attention["value"].items()
    }
    kernel = attention["out"]["kernel"]
    of_queries = np.repeat(heads, kernel.shape[1] // heads.shape[1], axis=1)[..., None]
    attention["out"] = {**attention["out"], "kernel": along(kernel, of_queries, 2)}
    for name in (name for name in ("gate", "up") if name in feedforward):
        feedforward[name] = {
            n: along(x, found.hidden if n == "bias" else found.hidden[:, None], -1)
            for n, x in feedforward[name].items()
        }
    down = feedforward["down"]
    feedforward["down"] = {**down, "kernel": along(down["kernel"], found.hidden[..., None], 1)}

    head = {**params["head"], "norm": last(params["head"]["norm"])}
    if "unembed" in head:
        head["unembed"] = {"kernel": stream(head["unembed"]["kernel"], 0)}
    return {**params, "embedding": last(params["embedding"]), "layers": {**params["layers"], **layers}, "head": head}
