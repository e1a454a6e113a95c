"""A lost stage as the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxpar.models.lazy import jax, jnp
from jaxpar.models.spec import LAYERS, is_spec
from jaxpar.recovery.base import Stages
from jaxpar.recovery.random_init import RandomInit


@dataclass(frozen=True)
class SkipStage(RandomInit):
    """Make a lost stage the identity, and let it learn from there.

    Its layers are initialised anew with all output projections (kernels that end in the model's width) zero: each residual
    branch then adds exactly 0, so that the model is the one without the stage, and its gradient is that of the output
    projections alone at first. Leaving the stage out of the program for good would give the same losses in the first
    step, and no stage back. Biases and the norms behind a branch start at what adds nothing, as in any initialisation.
    """

    def guess(self, rec: Any, state, stages: Stages) -> Any:
        zero = lambda spec, x: jnp.zeros_like(x) if _gives_width(spec) else x
        fresh = super().guess(rec, state, stages)
        return jax.tree.map(zero, stages.specs[LAYERS], fresh, is_leaf=is_spec)


def _gives_width(spec: Any) -> bool:
    """Whether a stacked kernel maps to the model's width, as the output projections of attention and feed-forward do."""
    return len(spec.axes) > 2 and spec.axes[-1] == "embed" and spec.axes[1] != "embed"
