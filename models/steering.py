"""Steering: a vector added to the residual stream behind a layer, found from pairs of texts.

Activation-steered compression (ASC, Azizi et al. 2025) adds the difference between the stream of concise and of verbose answers. Here

    v = mean over pairs of (h(wanted) - h(other)),   h the stream behind `layer` at each text's last token
    h ← h + strength · v                             behind the same layer

so that a positive strength leads to what is wanted. The authors' code extracts the difference the other way around, at the input of
the layer behind whose output it is then *subtracted*: vectors stored by it may have the other sign, and belong one layer earlier.

As there, a prompt is steered at its last token only, and every new token is; keys and values of what follows see that.

The sign is tested by pairs that the vector was not made of: of each pair's own difference it is asked whether it points along the mean
of the other pairs' (`agreeing`). Where half of them do not, the mean is chance.

The strength for a given divergence: along v, to second order, KL(p ‖ p_γ) = γ²/2 · Var_p[J v], J v the derivative of the logits
along v (the variance is vᵀFv with the Fisher information F), so γ = √(2δ / Var_p[J v]). Where logits
are linear in γ, KL ≤ γ²/8 · (max J v - min J v)² for any γ (Hoeffding's lemma), so γ = √(8δ) / (max - min) is a bound and not an
estimate; it is the smaller one.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Tree = Any


@struct.dataclass
class Steering:
    """What a pass adds to the stream.

    Attributes:
      vectors: float32 [L, D], behind each layer; zeros where nothing is added.
      tokens: bool [B, T], which tokens are steered. None: all.
    """

    vectors: jax.Array
    tokens: jax.Array | None = None

    def add(self, x_BxTxD, layer):
        """The stream behind `layer`, steered."""
        added = jnp.broadcast_to(self.vectors[layer], x_BxTxD.shape)
        if self.tokens is not None:
            added = jnp.where(self.tokens[..., None], added, 0)
        return (x_BxTxD + added).astype(x_BxTxD.dtype)


@dataclass(frozen=True)
class Vector:
    """A steering vector, and the model that it belongs to.

    Attributes:
      values: float32 [D].
      layer: the layer behind which it was read, and is added.
      layers: the model's.
      mark: of the model's weights, see `mark`.
      strength: with which it is added where nothing else is said.
    """

    values: np.ndarray
    layer: int
    layers: int
    mark: int
    strength: float = 1.0

    def save(self, file: str | Path) -> None:
        """As an .npz file."""
        with open(file, "wb") as f:
            np.savez(f, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, file: str | Path) -> Vector:
        """Raises ValueError where there is no such file, or it is no whole steering vector of finite numbers."""
        made = "make one with jaxpar steer"
        try:
            with open(file, "rb") as f, np.load(f) as found:
                numbers = (int(found[name]) for name in ("layer", "layers", "mark"))
                vector = cls(found["values"], *numbers, float(found["strength"]))
        except FileNotFoundError:
            raise ValueError(f"there is no steering vector {file}; {made}") from None
        # A torn archive ends in any of these, by where it was cut.
        except (KeyError, OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"{file} holds no whole steering vector ({type(error).__name__}); {made}") from None
        if bad := int(np.sum(~np.isfinite(vector.values))):
            raise ValueError(
                f"{file}: {bad} of the steering vector's {len(vector.values)} numbers are not finite; {made}"
            )
        return vector

    def check(self, cfg, params: Tree) -> None:
        """Raises ValueError where the vector is another model's, or the model has no one stream to add it to."""
        plain(cfg)
        if (len(self.values), self.layers) != (cfg.width, cfg.layers):
            raise ValueError(
                f"the steering vector has {len(self.values)} numbers for layer {self.layer} of {self.layers}, but this model "
                f"has width {cfg.width} and {cfg.layers} layers: it is another model's; extract one from this model"
            )
        if self.mark != (own := mark(params)):
            raise ValueError(
                f"the steering vector was extracted from weights with the mark {self.mark}, but this model's have {own}: it has "
                "the same shape and other weights; extract one from this model"
            )

    def steering(self, cfg, params: Tree, strength: float, tokens=None) -> Steering:
        """`strength` times the vector, for a pass.

        Raises:
          ValueError: a vector of another model, or a strength that is not finite.
        """
        self.check(cfg, params)
        if not np.isfinite(strength):
            raise ValueError(f"a steering strength of {strength} is not finite")
        vectors = np.zeros((cfg.layers, cfg.width), np.float32)
        vectors[self.layer] = strength * self.values
        return Steering(jnp.asarray(vectors), tokens)


def plain(cfg) -> None:
    from jaxpar.models.residual.plain import Plain

    if not isinstance(cfg.residual, Plain):
        raise ValueError(
            f"steering adds to the one residual stream, but model.residual = {type(cfg.residual).__name__} keeps several; "
            "only Plain can be steered"
        )


def mark(params: Tree) -> int:
    """A number by which weights are told from others: CRC-32 of up to 4096 numbers of each tensor, evenly spaced."""
    found = 0
    for leaf in jax.tree.leaves(params):
        flat = np.asarray(jax.device_get(leaf)).reshape(-1)
        found = zlib.crc32(np.ascontiguousarray(flat[:: max(1, flat.size // 4096)]).tobytes(), found)
    return found


def behind(cfg, params: Tree, texts: Sequence[Sequence[int]], layer: int) -> jax.Array:
    """The stream behind `layer` at the last token of each text: float32 [N, D].

    Raises:
      ValueError: no such layer, an empty text, or a model without one stream.
    """
    from jaxpar.models import decoder
    from jaxpar.models.context import Context

    plain(cfg)
    if not 0 <= layer < cfg.layers:
        raise ValueError(f"there is no layer {layer} to steer behind: the model has layers 0 to {cfg.layers - 1}")
    if empty := [i for i, text in enumerate(texts) if not len(text)]:
        raise ValueError(f"text {empty[0]} is empty; a steering vector is read at the last token of each")
    tokens, counts = padded(texts)

    @jax.jit
    def run(params, tokens, last):
        ctx = Context()
        first = jax.tree.map(lambda x: x[: layer + 1], params["layers"])
        # What stands behind a text's last token is not seen by it.
        state, _ = decoder.blocks(cfg, first, decoder.embed(cfg, params, tokens, ctx), ctx)
        return jnp.take_along_axis(state, last[:, None, None], axis=1)[:, 0].astype(jnp.float32)

    return run(params, tokens, counts - 1)


def padded(texts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Texts as rows int32 [N, T], and how many of each are real [N]."""
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, np.array([len(text) for text in texts], np.int32)


def extract(cfg, params: Tree, wanted: Sequence[Sequence[int]], other: Sequence[Sequence[int]], layer: int) -> Vector:
    """The mean of `differences`."""
    found = differences(cfg, params, wanted, other, layer)
    return Vector(np.asarray(jnp.mean(found, axis=0)), layer, cfg.layers, mark(params))


def differences(cfg, params: Tree, wanted: Sequence[Sequence[int]], other: Sequence[Sequence[int]], layer: int):
    """h(wanted) - h(other) of each pair, float32 [N, D]: text i of `wanted` and text i of `other` answer the same.

    Args:
      wanted, other: token ids. About a hundred pairs (Azizi et al.).

    Raises:
      ValueError: unequal numbers of texts, none, or as `behind`.
    """
    if len(wanted) != len(other) or not wanted:
        raise ValueError(
            f"{len(wanted)} texts that are wanted and {len(other)} others are no pairs; give as many of both"
        )
    return behind(cfg, params, wanted, layer) - behind(cfg, params, other, layer)


def agreeing(differences_NxD) -> int:
    """How many of N pairs point along the mean of the others. About half of them where there is nothing in common."""
    d = np.asarray(differences_NxD, np.float64)
    return int((np.sum(d * (d.sum(0) - d), axis=-1) > 0).sum())


def strength(
    cfg,
    params: Tree,
    vector: Vector,
    tokens_BxT,
    divergence: float,
    rule: Literal["second-order", "bound"] = "second-order",
    counts_B=None,
) -> float:
    """The strength at which the next token's distribution diverges by so many nats, on average over the last tokens of these rows.

    Args:
      tokens_BxT: rows, of which the last token is steered.
      counts_B: how many of a row's tokens are real; the rest is padding at the end. None: all.
      divergence: KL(p ‖ p_steered).
      rule: see the module's text.

    Raises:
      ValueError: a divergence that is not positive, a vector of another model, or one that changes nothing.
    """
    if not divergence > 0:
        raise ValueError(f"a divergence of {divergence} nats must be above 0")
    vector.check(cfg, params)
    slopes_BxV, logits_BxV = slopes(cfg, params, vector, tokens_BxT, counts_B)
    p_BxV = jax.nn.softmax(logits_BxV)
    mean_B = jnp.sum(p_BxV * slopes_BxV, -1)
    if rule == "second-order":
        per_square = jnp.mean(jnp.sum(p_BxV * jnp.square(slopes_BxV - mean_B[:, None]), -1)) / 2
    else:
        per_square = jnp.mean(jnp.square(slopes_BxV.max(-1) - slopes_BxV.min(-1))) / 8
    if not per_square > 0:
        raise ValueError("the steering vector does not change the next token's distribution: is it zero?")
    return float(jnp.sqrt(divergence / per_square))


def said(cfg, params: Tree, tokens_BxT, counts_B, steering: Steering):
    """The logits at each row's last real token, which alone is steered: float32 [B, V]."""
    from jaxpar.models import decoder
    from jaxpar.models.context import Context, Ops

    last_BxT = jnp.arange(tokens_BxT.shape[1])[None] == counts_B[:, None] - 1
    ctx = Context(steering=steering.replace(tokens=last_BxT))
    state, _ = decoder.blocks(cfg, params["layers"], decoder.embed(cfg, params, tokens_BxT, ctx), ctx)
    x_BxTxD = decoder.final_norm(cfg, params, state)
    x_Bx1xD = jnp.take_along_axis(x_BxTxD, (counts_B - 1)[:, None, None], axis=1)
    return decoder.logits_of(cfg, params, x_Bx1xD, Ops())[:, 0]


def slopes(cfg, params: Tree, vector: Vector, tokens_BxT, counts_B=None):
    """The logits' derivative along the vector at strength 0, and the logits, at each row's last token: [B, V] each."""

    @jax.jit
    def run(params, tokens, counts, unit):
        at = lambda by: said(cfg, params, tokens, counts, unit.replace(vectors=by * unit.vectors))
        # Forward mode by two backward ones, as operations with gradients of their own have no other: the pullback u -> uᵀJ is
        # linear, and its gradient is J.
        found, pull = jax.vjp(at, jnp.zeros(()))
        return jax.grad(lambda u: pull(u)[0])(jnp.zeros_like(found)), found

    return run(params, tokens_BxT, counts_of(tokens_BxT, counts_B), vector.steering(cfg, params, 1.0))


def divergence(cfg, params: Tree, vector: Vector, by: float, tokens_BxT, counts_B=None) -> float:
    """KL(p ‖ p_steered) in nats with strength `by`, measured: of the next token, on average over the last tokens of these rows.
    In float32, so that a divergence below about 1e-6 is not seen.

    Raises:
      ValueError: as `Vector.steering`.
    """

    @jax.jit
    def run(params, tokens, counts, none, some):
        p, q = (jax.nn.log_softmax(said(cfg, params, tokens, counts, s)) for s in (none, some))
        return jnp.mean(jnp.sum(jnp.exp(p) * (p - q), -1))

    steered = (vector.steering(cfg, params, strength) for strength in (0.0, by))
    return float(run(params, tokens_BxT, counts_of(tokens_BxT, counts_B), *steered))


def counts_of(tokens_BxT, counts_B):
    B, T = tokens_BxT.shape
    return jnp.full(B, T, jnp.int32) if counts_B is None else jnp.asarray(counts_B, jnp.int32)
