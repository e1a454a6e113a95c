"""The plain residual stream: each branch's output is added to what came before."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Plain:
    """`x ← x + branch(x)`.

    The interface of every residual operator. `state` is what is carried from layer to layer (a pytree whose shapes do
    not depend on the layer); `params` are this layer's own entries, sliced from the stack.
    """

    def spec(self, cfg) -> dict:
        """Parameters for one layer (stacked by the caller)."""
        return {}

    def init(self, cfg, x_BxTxD):
        """The state at the first layer, from the embedding."""
        return x_BxTxD

    def read(self, cfg, params, state, layer):
        """What a branch of `layer` sees: [B, T, D]."""
        return state

    def write(self, cfg, params, state, y_BxTxD, layer):
        """The state after a branch of `layer` gave `y`."""
        return state + y_BxTxD

    def final(self, cfg, state):
        """What the head sees: [B, T, D]."""
        return state

    def to_wire(self, cfg, state):
        """The payload that crosses a pipeline boundary: a pytree of static shapes."""
        return state

    def from_wire(self, cfg, wire):
        """The state behind a pipeline boundary."""
        return wire
