"""Looking into a model: what each layer reads, gives and knows, on some text. One compiled program for the whole of it.

depth weights    how much of each source a branch reads (`jaxpar.models.residual.watched.shares`), where it reads sources
output norms     root mean square of what branches read and gave
cosines          cos(x, x + y) of a branch: near 1, it changed little (FFN-SkipLLM's measure)
lens             loss, confidence and agreement with the last layer, if the model ended behind a layer: what the next
                 layer's attention reads goes through the final norm and the output projection (logit lens,
                 nostalgebraist 2020); behind a layer that has an exit, its stream goes through what the exit has of its
                 own, as in training and decoding. Layer 0 is the embedding.
exits            behind which layer a token would leave, were a confidence of the lens enough; the depth and the FLOPs
                 that a token would then take on average. Nothing is left out here, so nothing is saved: it says what
                 there would be to save, and not what leaving does to the keys and values that later tokens see.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar import flops
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.models.residual.attention_residuals import AttentionResiduals
from jaxpar.models.residual.watched import Seen, Watched
from jaxpar.step import Batch

CONFIDENCES = (0.5, 0.8, 0.9, 0.95)


class Lens(NamedTuple):
    """What the model would say behind the embedding and each of L layers; float32.

    Attributes:
      loss: [L + 1], nats per token.
      agrees: [L + 1], part of the tokens whose most likely next one is the last layer's.
      left: [L + 1, n], part of the tokens whose confidence first reaches each of n thresholds here (the last row: the
        rest). Confidence is the most likely next token's probability less the second one's (CALM's "softmax response",
        Schuster et al. 2022, section 3.3). Layer 0 is left out: no token leaves before a layer has run.
      kept: [n], part of the tokens for which leaving so gives the last layer's most likely next token.
    """

    loss: jax.Array
    agrees: jax.Array
    left: jax.Array
    kept: jax.Array


def _lens(
    cfg: ModelConfig, params: Any, x_LxBxTxD, exits: dict, last_BxTxD, batch: Batch, thresholds: tuple[float, ...]
) -> Lens:
    """Args:
    exits: what the output projection sees behind layers that have an exit.
    last_BxTxD: and behind the last.
    """
    weights_BxT = batch.weights
    total = jnp.maximum(weights_BxT.sum(), 1e-30)
    mean = lambda x_BxT: (x_BxT * weights_BxT).sum() / total

    def said(x_BxTxD):
        logits = decoder.logits_of(cfg, params, x_BxTxD, Ops())
        logp = jax.nn.log_softmax(logits)
        loss_BxT = -jnp.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
        top, best = jax.lax.top_k(logp, 2)
        return mean(loss_BxT), jnp.exp(top[..., 0]) - jnp.exp(top[..., 1]), best[..., 0]

    seen_LxBxTxD = jax.lax.map(partial(cfg.norm, params["head"]["norm"]), x_LxBxTxD)
    for layer, x_BxTxD in exits.items():
        seen_LxBxTxD = seen_LxBxTxD.at[layer].set(x_BxTxD)
    loss, sure_LxBxT, best_LxBxT = jax.lax.map(said, seen_LxBxTxD)
    end_loss, end_sure, end_best = said(last_BxTxD)
    sure = jnp.concatenate([sure_LxBxT, end_sure[None]])
    best = jnp.concatenate([best_LxBxT, end_best[None]])
    agrees = jax.vmap(lambda b: mean((b == end_best).astype(jnp.float32)))(best)

    def leaving(threshold):
        enough = (sure >= threshold).at[0].set(False).at[-1].set(True)
        layer_BxT = jnp.argmax(enough, axis=0)
        says = jnp.take_along_axis(best, layer_BxT[None], axis=0)[0]
        left = jax.vmap(lambda n: mean((layer_BxT == n).astype(jnp.float32)))(jnp.arange(sure.shape[0]))
        return left, mean((says == end_best).astype(jnp.float32))

    left, kept = jax.vmap(leaving, out_axes=(1, 0))(jnp.asarray(thresholds, jnp.float32))
    return Lens(jnp.append(loss, end_loss), agrees, left, kept)


@partial(jax.jit, static_argnames=("cfg", "thresholds"))
def look(cfg: ModelConfig, params: Any, batch: Batch, thresholds: tuple[float, ...] = CONFIDENCES) -> tuple[Seen, Lens]:
    """What there is to see in one batch. The parameters may lie on any mesh.

    Args:
      thresholds: confidences of exits, each in (0, 1].
    """
    mixer = cfg.residual
    if isinstance(mixer, AttentionResiduals):
        mixer = AttentionResiduals(mixer.block, "direct", mixer.epsilon)
    watched = cfg.replace(residual=Watched(mixer), dropout=0.0, remat="none", layer_loop="scan")
    ctx = Context(batch.positions, batch.segments)
    at = cfg.exits.at
    states, _ = decoder.segments(watched, params, decoder.embed(watched, params, batch.tokens, ctx), ctx, at)
    *states, state = states
    exits = {n: decoder.final_norm(watched, params, x, n) for n, x in zip(at, states, strict=True)}
    seen, last = state[1], decoder.final_norm(watched, params, state)
    return seen._replace(reads=()), _lens(cfg, params, seen.reads, exits, last, batch, thresholds)


def findings(cfg: ModelConfig, params: Any, batch: Batch, thresholds: tuple[float, ...] = CONFIDENCES) -> dict:
    """`look` as what JSON holds, with depth and FLOPs per token of each threshold.

    Raises:
      ValueError: a threshold outside (0, 1].
    """
    for value in thresholds:
        if not 0 < value <= 1:
            raise ValueError(
                f"confidence = {value:g} is outside (0, 1]: the most likely token's probability less the second one's; 1 is "
                "never reached, and at 0 every token leaves behind the first layer"
            )
    seen, lens = jax.device_get(look(cfg, params, batch, tuple(thresholds)))
    count = flops.forward(cfg, batch.tokens.shape[1])
    exits = []
    for i, threshold in enumerate(thresholds):
        left = np.asarray(lens.left[:, i], np.float64)
        depth = float(left @ np.arange(cfg.layers + 1))
        exits.append(
            {
                "confidence": threshold,
                "left": left.tolist(),
                "depth": depth,
                "flops_per_token": count.layers * depth / cfg.layers + count.head,
                "agrees": float(lens.kept[i]),
            }
        )
    weights = np.asarray(seen.weights)
    return {
        "layers": cfg.layers,
        "residual": type(cfg.residual).__name__,
        "exits_at": list(cfg.exits.at),
        "tokens": int(np.asarray(jax.device_get(batch.weights) > 0).sum()),
        "flops_per_token": count.total,
        "depth_weights": [[_rows(branch) for branch in layer] for layer in weights] if weights.shape[-1] else None,
        "read_rms": np.asarray(seen.stream).tolist(),
        "given_rms": np.asarray(seen.given).tolist(),
        "cosine": np.asarray(seen.cosine).tolist(),
        "lens_loss": np.asarray(lens.loss).tolist(),
        "lens_agrees": np.asarray(lens.agrees).tolist(),
        "exits": exits,
    }


def _rows(branch_3xn: np.ndarray) -> list | None:
    """A branch's weights: one row, or three where query, key and value read apart. None: it reads no source."""
    if np.isnan(branch_3xn).any():
        return None
    same = bool((branch_3xn == branch_3xn[:1]).all())
    return (branch_3xn[:1] if same else branch_3xn).tolist()


def scalars(found: dict) -> dict[str, float]:
    """Findings as metrics of a training run."""
    values = {}
    for i, (read, given, near) in enumerate(zip(found["read_rms"], found["given_rms"], found["cosine"], strict=True)):
        for name, row in (("read_rms", read), ("given_rms", given), ("cosine", near)):
            for branch, value in zip(("attention", "feedforward"), row, strict=True):
                values[f"inspect/{name}/{branch}/{i:02d}"] = value
    for i, loss in enumerate(found["lens_loss"]):
        values[f"inspect/lens_loss/{i:02d}"] = loss
    for row in found["exits"]:
        values[f"inspect/depth/{row['confidence']:g}"] = row["depth"]
        values[f"inspect/flops_per_token/{row['confidence']:g}"] = row["flops_per_token"]
    return values
