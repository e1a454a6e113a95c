"""The plain residual stream: each branch's output is added to what came before."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.models.residual.base import DepthMixer


@dataclass(frozen=True)
class Plain(DepthMixer):
    """`x ← x + branch(x)`."""

    def init(self, cfg, x_BxTxD):
        return x_BxTxD

    def tokens(self, state):
        return state.shape[:2]

    def read(self, cfg, params, state, layer, site):
        return state, None

    def write(self, cfg, params, state, told, y_BxTxD, layer, site):
        return state + y_BxTxD

    def final(self, cfg, params, state):
        return state
