"""How sure an exit is of its token: strategies. Free of JAX at import.

Each gives float32 [B], at most 1. An exit is taken where it is above the threshold, so that a threshold of 1 never fires.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpar.models.lazy import jax, jnp


@dataclass(frozen=True)
class TopTwo:
    """The most probable token's probability less the second's (CALM's "softmax response", Schuster et al. 2022, §3.5).

    Attributes:
      asks_logits: whether the output projection must run at each exit that is asked, also where it is not taken.
    """

    asks_logits: ClassVar[bool] = True

    def __call__(self, logits_BxV, x_BxD, before_BxD, own: Any):
        """Args:
        logits_BxV: float32, of the exit (None where they are not asked for).
        x_BxD: what the output projection sees at the exit.
        before_BxD: the same behind the exit before, or of the embedding.
        own: this exit's learned parameters, where there are any.
        """
        top_Bx2 = jax.lax.top_k(jax.nn.softmax(logits_BxV, axis=-1), 2)[0]
        return top_Bx2[:, 0] - top_Bx2[:, 1]


@dataclass(frozen=True)
class Maximum(TopTwo):
    """The most probable token's probability (EE-LLM, Chen et al. 2023, §5.1)."""

    def __call__(self, logits_BxV, x_BxD, before_BxD, own: Any):
        return jnp.max(jax.nn.softmax(logits_BxV, axis=-1), axis=-1)


@dataclass(frozen=True)
class Similarity(TopTwo):
    """The cosine of what the head sees here with what it saw at the exit before: saturated states move no more. CALM compares
    neighbouring layers; here it is neighbouring exits, and the first is compared with the embedding."""

    asks_logits: ClassVar[bool] = False

    def __call__(self, logits_BxV, x_BxD, before_BxD, own: Any):
        x, before = x_BxD.astype(jnp.float32), before_BxD.astype(jnp.float32)
        norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(before, axis=-1)
        return jnp.sum(x * before, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


@dataclass(frozen=True)
class Learned(TopTwo):
    """A linear classifier of what the head sees, trained behind the frozen model to tell whether the exit says the last layer's
    token (CALM's early-exit classifier); see `fit`."""

    asks_logits: ClassVar[bool] = False

    def __call__(self, logits_BxV, x_BxD, before_BxD, own: Any):
        x = x_BxD.astype(jnp.float32)
        return jax.nn.sigmoid(x @ own["weight"] + own["bias"])


Confidence = TopTwo | Maximum | Similarity | Learned


def fit(x_NxD, right_N, *, ridge: float = 1e-3, steps: int = 20) -> dict:
    """The classifier of one exit: logistic regression by Newton's method.

    Args:
      x_NxD: what the output projection saw at the exit, for N tokens.
      right_N: bool, whether the exit's token was the last layer's.
      ridge: weight of ½|weight|² beside the mean loss.

    Returns:
      {"weight": float32 [D], "bias": float32 []}, as `Learned` takes it.
    """
    x = jnp.concatenate([x_NxD.astype(jnp.float32), jnp.ones((x_NxD.shape[0], 1), jnp.float32)], axis=1)
    y = right_N.astype(jnp.float32)
    penalty = jnp.full(x.shape[1], ridge).at[-1].set(0.0)

    def newton(_, w):
        p = jax.nn.sigmoid(x @ w)
        gradient = x.T @ (p - y) / len(y) + penalty * w
        # A little on the diagonal: where all tokens are right the bias has no finite best.
        curvature = (x * (p * (1 - p))[:, None]).T @ x / len(y) + jnp.diag(penalty + 1e-4)
        return w - jnp.linalg.solve(curvature, gradient)

    w = jax.lax.fori_loop(0, steps, newton, jnp.zeros(x.shape[1], jnp.float32))
    return {"weight": w[:-1], "bias": w[-1]}
