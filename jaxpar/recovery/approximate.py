"""What the strategies share that make a lost stage anew instead of bringing it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from jaxpar.errors import UserError
from jaxpar.models.lazy import jax, jnp
from jaxpar.models.spec import LAYERS
from jaxpar.recovery import lost
from jaxpar.recovery.base import Recovered, Recovery, Stages

Tree = Any


@dataclass(frozen=True)
class Approximate(Recovery):
    """A stage is made anew, with a fresh optimiser, and trained on from the current batch at a larger learning rate.

    All of this is CheckFree's (Blagoev et al. 2025, "All is Not Lost: LLM Recovery without Checkpoints", Algorithm 1) and
    holds for what it is compared with, so that they differ in the new weights alone. What the paper leaves open:

    Attributes:
      bump: the factor on the learning rate of a stage that was made anew. 1.1 in the paper and for most sizes in its
        code, 1.2 there for 500M; 1 for none.
      bump_mode: compounding: each loss of the stage multiplies its rate once more, as Algorithm 1 is printed (a stage
        lost ten times learns 2.6 times as fast); permanent: the factor stays and does not grow, as in its code;
        until-steps: it ends after `bump_steps`.
      bump_steps: for until-steps, how many updates have it.
      optimiser: fresh: moments and Adam's count start at 0, as in its code (the paper says nothing), so that the first
        updates are bias-corrected; moments: they are 0, but counts go on as those of the other stages.
      schedule: follow: the learning rate's schedule goes on where the other stages are, as in the paper ("then follows
        its scheduler"); restart: from its beginning, warm-up included.
    """

    bump: float = 1.1
    bump_mode: Literal["compounding", "permanent", "until-steps"] = "compounding"
    bump_steps: int = 100
    optimiser: Literal["fresh", "moments"] = "fresh"
    schedule: Literal["follow", "restart"] = "follow"

    def __post_init__(self):
        if not 0 < self.bump < float("inf"):
            raise UserError(f"{self.name}'s bump = {self.bump} must be a finite factor above 0; 1 changes nothing")
        if self.bump_steps < 1:
            raise UserError(f"{self.name}'s bump_steps = {self.bump_steps} must be at least 1")

    def recoverable(self, failed_S):
        return failed_S

    # -- the learning rate --------------------------------------------------------------------------------------------

    def persistent(self, state, stages: Stages) -> Tree:
        if self.bump == 1:
            return {}
        rec = {"scale": jnp.ones(stages.count, jnp.float32)}
        if self.bump_mode == "until-steps":
            rec["left"] = jnp.zeros(stages.count, jnp.int32)
        return rec

    def rate_scale(self, rec: Tree):
        return rec.get("scale")

    def observe(self, rec: Tree, state, norms_S, held, stages: Stages) -> Tree:
        if "left" not in rec:
            return rec
        left = jnp.maximum(rec["left"] - ~held, 0)
        return {**rec, "left": left, "scale": jnp.where(left > 0, rec["scale"], 1.0)}

    def settle(self, rec: Tree, state, failed_S, recovered_S, stages: Stages) -> Tree:
        # The factors are S numbers that every stage may know, like the schedule: they are not lost.
        if "scale" not in rec:
            return rec
        new = rec["scale"] * self.bump if self.bump_mode == "compounding" else jnp.full(stages.count, self.bump)
        rec = {**rec, "scale": jnp.where(recovered_S, new, rec["scale"]).astype(jnp.float32)}
        if "left" in rec:
            rec["left"] = jnp.where(recovered_S, self.bump_steps, rec["left"]).astype(jnp.int32)
        return rec

    # -- the stage ----------------------------------------------------------------------------------------------------

    def guess(self, rec: Tree, state, stages: Stages) -> Tree:
        """New parameters for every layer of the stack, of which those of the recovered stages are taken."""
        raise NotImplementedError

    def recover(self, rec: Tree, state, failed_S, stages: Stages) -> Recovered:
        recovered_S = self.recoverable(failed_S)
        old = state.params[LAYERS]
        layers = stages.where(recovered_S, self.guess(rec, state, stages), old)
        params = {**state.params, LAYERS: layers}
        fresh = stages.init(params)
        state = state.replace(
            params=params,
            opt_state=self._reset(state.opt_state, fresh.opt_state, failed_S, recovered_S, stages),
            slots={name: _restart(name, slot, layers, recovered_S, stages) for name, slot in state.slots.items()},
        )
        return self.found(state, recovered_S, stages)

    def _reset(self, old: Tree, fresh: Tree, failed_S, recovered_S, stages: Stages) -> Tree:
        import optax

        where = lost.labels({"opt_state": old}, stages.specs)["opt_state"]
        new_L, lost_L = stages.spread(recovered_S), stages.spread(failed_S)
        is_schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
        scheduled = jax.tree.map(
            lambda x: jax.tree.map(lambda _: is_schedule(x), x), old, is_leaf=lambda x: is_schedule(x)
        )

        def one(x, new, label, of_schedule):
            if label != LAYERS:
                return x
            goes_on = (of_schedule and self.schedule == "follow") or (
                not of_schedule and self.optimiser == "moments" and x.ndim == 1
            )
            if goes_on and jnp.issubdtype(x.dtype, jnp.integer):
                # All stages have counted the same updates; one that was made anew before may have counted fewer.
                new = jnp.broadcast_to(jnp.max(jnp.where(lost_L, jnp.iinfo(x.dtype).min, x)), x.shape)
            return jnp.where(lost.by_layer(new_L, x), new, x)

        return jax.tree.map(one, old, fresh, where, scheduled)


def _restart(name: str, slot: Tree, layers: Tree, recovered_S, stages: Stages) -> Tree:
    """A slot of another transform: an average of the parameters starts again at the new ones, anything else at 0."""
    from jaxpar.steps.ema import EMA

    where = lost.labels({"slots": {name: slot}}, stages.specs)["slots"][name]
    if LAYERS not in jax.tree.leaves(where):
        return slot
    if name == EMA:
        if stages.ema_decay is None:
            raise UserError(
                "a recovered stage's average starts again, for which recovering needs ema_decay, ema's decay"
            )
        # So that the corrected average (see `jaxpar.steps.ema.corrected`) is the new parameters.
        weight = 1.0 - jnp.power(jnp.float32(stages.ema_decay), slot["count"].astype(jnp.float32))
        new = jax.tree.map(lambda p: p.astype(jnp.float32) * weight, layers)
        average = {**slot["average"], LAYERS: stages.where(recovered_S, new, slot["average"][LAYERS])}
        return {**slot, "average": average}
    mask_L = stages.spread(recovered_S)
    zero = lambda x, label: x if label != LAYERS else jnp.where(lost.by_layer(mask_L, x), jnp.zeros_like(x), x)
    return jax.tree.map(zero, slot, where)
