"""CheckFree: a lost stage becomes the average of its neighbours, weighted by their gradients' norms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpar.errors import UserError
from jaxpar.models.lazy import jax, jnp
from jaxpar.models.spec import LAYERS
from jaxpar.recovery import lost
from jaxpar.recovery.approximate import Approximate
from jaxpar.recovery.base import Stages, array_module

Tree = Any


@dataclass(frozen=True)
class Neighbours(Approximate):
    """A mixture of the stages before and after, leaf by leaf. Only stages in the middle have both; embedding and head
    never fail. Two neighbours that are lost together cannot be recovered."""

    least: ClassVar[int] = 3

    def _why_least(self) -> str:
        return "only a stage between two others can be made from its neighbours"

    def recoverable(self, failed_S):
        np = array_module(failed_S)
        inside = np.concatenate(
            [failed_S[:1] & False, failed_S[1:-1] & ~failed_S[:-2] & ~failed_S[2:], failed_S[-1:] & False]
        )
        return inside

    def _why_not(self) -> str:
        return (
            f"{self.name} makes a stage from both neighbours: neither the first nor the last stage, nor two adjacent ones, "
            "can be recovered; choose --failures.fallible middle and --failures.adjacent thinned, or a composite"
        )

    def shares(self, rec: Tree, stages: Stages):
        """float32 [S]: how much of each stage, were it lost, comes from the one before; the rest from the one after."""
        raise NotImplementedError

    def guess(self, rec: Tree, state, stages: Stages) -> Tree:
        layers = state.params[LAYERS]
        share_L = stages.spread(self.shares(rec, stages))

        def mix(x, before, after):
            share = lost.by_layer(share_L, x)
            both = share * before.astype(jnp.float32) + (1 - share) * after.astype(jnp.float32)
            # Not 0 times what is not wanted: it may have been lost too, and 0 * NaN is NaN.
            return jnp.where(share == 1, before, jnp.where(share == 0, after, both.astype(x.dtype)))

        return jax.tree.map(mix, layers, stages.shifted(layers, 1), stages.shifted(layers, -1))

    def moved(self, stages: Stages, state) -> list[float]:
        return [2.0 * (stages.stage_bytes() + 4)] * stages.count  # with the norms, a float32 each


@dataclass(frozen=True)
class CheckFree(Neighbours):
    """Average the neighbours, weighted by the norms of their last gradients (Blagoev et al. 2025, "All is Not Lost: LLM
    Recovery without Checkpoints", arXiv 2506.15461, Algorithm 1):

        W_i <- (w_before W_before + w_after W_after) / (w_before + w_after),    w = |gradient|^power + epsilon

    (the printed formula has w_before twice). Until the first gradients all weights are equal. Paper and code differ; the
    defaults are the paper's, `CheckFree.reference_code()` the code's.

    Attributes:
      power: 1: norms weigh, as the text and the code have it; 2: their squares, as the symbol can be read.
      norm_point: pre-clip: of the gradient as it was; post-clip: of what clipping left, as in the code. Where each stage
        is clipped and all norms are above the limit, post-clip is the plain average.
      epsilon: added to each weight. 0 in the paper, 1e-4 in the code.
    """

    power: Literal[1, 2] = 1
    norm_point: Literal["pre-clip", "post-clip"] = "pre-clip"
    epsilon: float = 0.0

    needs_norms: ClassVar[bool] = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.epsilon < float("inf"):
            raise UserError(f"{self.name}'s epsilon = {self.epsilon} must be a finite number of at least 0")

    @classmethod
    def reference_code(cls, **more) -> CheckFree:
        """As gensyn-ai/CheckFree (8d7d547) computes it for its 124M and 1.5B models; bump=1.2 for those of 500M."""
        code = dict(power=1, norm_point="post-clip", epsilon=1e-4, bump=1.1, bump_mode="permanent")
        return cls(**{**code, **more})

    def persistent(self, state, stages: Stages) -> Tree:
        return {**super().persistent(state, stages), "norms": jnp.ones(stages.count, jnp.float32)}

    def observe(self, rec: Tree, state, norms_S, held, stages: Stages) -> Tree:
        rec = super().observe(rec, state, norms_S, held, stages)
        # A gradient that did not become an update is none, and one that is not finite says nothing.
        known = jnp.isfinite(norms_S) & ~held
        return {**rec, "norms": jnp.where(known, norms_S, rec["norms"])}

    def damage(self, rec: Tree, failed_S, stages: Stages) -> Tree:
        return {**rec, "norms": jnp.where(failed_S, jnp.nan, rec["norms"])}

    def settle(self, rec: Tree, state, failed_S, recovered_S, stages: Stages) -> Tree:
        rec = super().settle(rec, state, failed_S, recovered_S, stages)
        # Until its next gradient a new stage counts like the mean of those that were not lost.
        norms_S, alive_S = rec["norms"], ~failed_S
        mean = jnp.sum(jnp.where(alive_S, norms_S, 0.0)) / jnp.maximum(jnp.sum(alive_S), 1)
        return {**rec, "norms": jnp.where(failed_S, mean, norms_S)}

    def shares(self, rec: Tree, stages: Stages):
        weight_S = rec["norms"] ** self.power + self.epsilon
        before, after = jnp.roll(weight_S, 1), jnp.roll(weight_S, -1)
        total = before + after
        return jnp.where(total > 0, before / jnp.where(total > 0, total, 1.0), 0.5)
