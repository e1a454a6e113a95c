"""What exits say of given texts: every exit asked at every token of one full pass, from which thresholds are calibrated.

Tokens behind one that left early see its keys and values as if it had not: what decoding does with the remedies `recompute`
and `verify`. Under `propagate` it is an approximation.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxpar.adaptive.confidence import Confidence
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context


@struct.dataclass
class Seen:
    """n exits, B rows of T tokens.

    Attributes:
      x: [n + 1, B, T, D], what the output projection sees at each exit and at the last layer.
      tokens: int32 [n + 1, B, T], the most probable next token there.
      confidence: float32 [n, B, T], of each exit.
    """

    x: jax.Array
    tokens: jax.Array
    confidence: jax.Array


def seen(
    cfg: ModelConfig, params: Any, tokens_BxT, confidence: Confidence, own=None, *, at: tuple[int, ...] = ()
) -> Seen:
    """Ask every exit.

    Args:
      own: the exits' learned parameters, leaves [n, ...], for `Learned`.
      at: the exits. None given: the model's.
    """
    at, ctx = at or cfg.exits.at, Context()
    start = decoder.embed(cfg, params, tokens_BxT, ctx)
    states, _ = decoder.segments(cfg, params, start, ctx, at)
    xs = [decoder.final_norm(cfg, params, state, layer) for state, layer in zip(states, (*at, None), strict=True)]
    logits = [decoder.logits_of(cfg, params, x, ctx.ops) for x in xs]
    # The embedding behind the first exit's norm, as in decoding.
    before = [decoder.final_norm(cfg, params, start, at[0]), *xs]
    flat = lambda x: x.reshape(-1, x.shape[-1])
    sure = [
        confidence(flat(logits[i]), flat(xs[i]), flat(before[i]), jax.tree.map(lambda x, i=i: x[i], own))
        for i in range(len(at))
    ]
    said = jnp.stack([jnp.argmax(one, axis=-1).astype(jnp.int32) for one in logits])
    return Seen(jnp.stack(xs), said, jnp.stack(sure).reshape(-1, *tokens_BxT.shape))


def judged(seen: Seen, thresholds_K) -> tuple[np.ndarray, np.ndarray]:
    """What each threshold would do: float64 [B, K] each.

    Returns:
      The share of a row's tokens that the exit they leave by says otherwise than the last layer, and the mean number of the
      exit (n for the last layer).
    """
    sure, tokens = np.asarray(seen.confidence), np.asarray(seen.tokens)
    wrong, depth = [], []
    for threshold in np.asarray(thresholds_K):
        fires = np.concatenate([sure > threshold, np.ones_like(sure[:1], bool)])
        number = fires.argmax(axis=0)
        said = np.take_along_axis(tokens, number[None], axis=0)[0]
        wrong.append((said != tokens[-1]).mean(axis=-1))
        depth.append(number.mean(axis=-1))
    return np.stack(wrong, axis=1), np.stack(depth, axis=1)
