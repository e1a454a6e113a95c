"""The one gradient of attention, whatever computes it: both passes are a plan's, what is kept between them is not."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
from jax.ad_checkpoint import checkpoint_name

from jaxpar.pallas_kernels.attention.block import dropped
from jaxpar.pallas_kernels.dispatch import Choice

ATTENTION_OUT, ATTENTION_LSE = "attention_out", "attention_lse"
"""What a rematerialisation policy may keep, so that the backward pass does not begin with the forward pass."""


class Plan(Protocol):
    """How an implementation computes one call, with all that must be known before tracing; hashable.

    `starts` are `(q_start, k_start)`; the mask's window is an array in here.
    """

    def forward(self, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask, starts):
        """out [B, T, H, K] in q's dtype, and lse [B, H, T] in float32 or better, -inf where a query sees nothing."""

    def backward(
        self, q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, mask, starts, lse_BxHxT, drop_BxHxT, d_out_BxTxHxK, precise=False
    ):
        """dq, dk, dv in the dtypes of q, k and v, or in float32 or better with `precise`; `drop` as `block.dropped` gives
        it.

        `lse` and `drop` are of the queries' whole softmax: where these are not all keys, dq is their part of it.
        """


@dataclass(frozen=True)
class ByPlatform:
    """The plan of each implementation in a choice, itself a plan.

    Attributes:
      plans: pairs of an implementation's name and its plan.
    """

    choice: Choice
    plans: tuple[tuple[str, Plan], ...]

    def forward(self, *arrays):
        return self.choice.call(lambda one: dict(self.plans)[one.name].forward, *arrays)

    def backward(self, *arrays, precise=False):
        return self.choice.call(lambda one: partial(dict(self.plans)[one.name].backward, precise=precise), *arrays)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(plan: Plan, q, k, v, mask, starts):
    """out [B, T, H, K] and lse [B, H, T] by a plan, both differentiable in reverse mode by q, k and v."""
    return _forward(plan, q, k, v, mask, starts)[0]


def _forward(plan, q, k, v, mask, starts):
    out, lse = plan.forward(q, k, v, mask, starts)
    out, lse = checkpoint_name(out, ATTENTION_OUT), checkpoint_name(lse, ATTENTION_LSE)
    return (out, lse), (q, k, v, mask, starts, out, lse)


def _backward(plan, kept, cotangents):
    q, k, v, mask, starts, out, lse = kept
    d_out, d_lse = cotangents
    drop = dropped(out, d_out, d_lse)
    return *plan.backward(q, k, v, mask, starts, lse, drop, d_out), None, None


attend.defvjp(_forward, _backward)
