"""CheckFree+: edge stages by copy of what was trained to stand in for them; embedding and head from replicas."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpar.recovery import replicas
from jaxpar.recovery.base import Recovered, Stages, array_module
from jaxpar.recovery.checkfree import CheckFree

Tree = Any


@dataclass(frozen=True)
class CheckFreePlus(CheckFree):
    """CheckFree, and the first and the last stage by a copy of their neighbours (Blagoev et al. 2025, section 4.3).

    The copy is good where half of the microbatches run the first two and the last two stages in swapped order, so that each
    learns its neighbour's work: the pipeline schedule `checkfree+`, or `jaxpar.skipping.paths.SwapEnds`. Embedding,
    final norm and output projection are replicated, with their moments, on the second and the last but one stage after
    each step, and come back exactly (the paper speaks of weights alone, from which the trajectory would not go on).

    Attributes:
      swaps: the run swaps them: it takes the schedule `checkfree+` in place of 1F1B, or without a pipeline such routes.
      edge_pairs: edges-only: the first and the last stage are copied, and the second and the last but one are averaged as
        all others, as the paper has it; both-ways: the stages of a swapped pair copy each other, as in the code.
    """

    swaps: bool = True
    edge_pairs: Literal["edges-only", "both-ways"] = "edges-only"

    ends: ClassVar[bool] = True
    copies: ClassVar[str] = "parts"
    least: ClassVar[int] = 4

    @classmethod
    def reference_code(cls, **more) -> CheckFreePlus:
        """As gensyn-ai/CheckFree (8d7d547) computes it for its 124M and 1.5B models."""
        return super().reference_code(**{"edge_pairs": "both-ways", **more})

    def _why_least(self) -> str:
        return "the first two and the last two stages are swapped, and must not share one"

    def _why_not(self) -> str:
        return (
            f"{self.name} makes a stage from its neighbours, which were lost with it; choose --failures.adjacent thinned, "
            "or a composite"
        )

    def recoverable(self, failed_S):
        np = array_module(failed_S)
        before = np.concatenate([failed_S[:1] & False, failed_S[:-1]])
        after = np.concatenate([failed_S[1:], failed_S[:1] & False])
        if self.edge_pairs == "both-ways":  # the second one needs only the first, the last but one only the last
            after = np.concatenate([after[:1], after[1:2] & False, after[2:]])
            before = np.concatenate([before[:-2], before[-2:-1] & False, before[-1:]])
        return failed_S & ~before & ~after

    def shares(self, rec: Tree, stages: Stages):
        share_S = super().shares(rec, stages).at[0].set(0.0).at[-1].set(1.0)
        if self.edge_pairs == "both-ways":
            share_S = share_S.at[1].set(1.0).at[-2].set(0.0)
        return share_S

    # -- embedding and head -------------------------------------------------------------------------------------------

    def persistent(self, state, stages: Stages) -> Tree:
        return {**super().persistent(state, stages), "ends": replicas.ends(state, stages)}

    def observe(self, rec: Tree, state, norms_S, held, stages: Stages) -> Tree:
        rec = super().observe(rec, state, norms_S, held, stages)
        return {**rec, "ends": replicas.ends(state, stages)}

    def damage(self, rec: Tree, failed_S, stages: Stages) -> Tree:
        rec = super().damage(rec, failed_S, stages)
        return {**rec, "ends": replicas.damaged(rec["ends"], failed_S[1], failed_S[-2], stages)}

    def recover(self, rec: Tree, state, failed_S, stages: Stages) -> Recovered:
        found = super().recover(rec, state, failed_S, stages)
        back = found.recovered
        return found._replace(state=replicas.put_back(found.state, rec["ends"], back, stages))

    def settle(self, rec: Tree, state, failed_S, recovered_S, stages: Stages) -> Tree:
        rec = super().settle(rec, state, failed_S, recovered_S, stages)
        return {**rec, "ends": replicas.ends(state, stages)}

    def moved(self, stages: Stages, state) -> list[float]:
        moved = super().moved(stages, state)
        one = float(stages.stage_bytes())
        moved[0] = one + replicas.end_bytes(state, "first", stages)
        moved[-1] = one + replicas.end_bytes(state, "last", stages)
        if self.edge_pairs == "both-ways":
            moved[1] = moved[-2] = one
        return moved
