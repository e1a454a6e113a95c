"""What kernels over the tensor axis make devices send, for each choice of a run. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.parallel.tensor.config import TensorConfig


@dataclass(frozen=True)
class Send:
    """One collective of an activation [B, T, D].

    Attributes:
      which: the pass: forward or backward.
      op: its name in HLO; a collective-permute stands for t - 1 hops of 1/t of the activation.
      precise: in float32 whatever the compute dtype.
    """

    which: str
    op: str
    precise: bool = False


def sends(config: TensorConfig, *, spreads: bool, in_layers: bool) -> list[Send]:
    """What goes over the axis for a kernel with a dimension on it, in a step.

    Args:
      spreads: its outputs lie on the axis (columns); else its inputs do, and products are partial sums (rows).
      in_layers: it is a layer's; else the embedding (rows) or the output projection (columns).
    """
    if config.products == "whole":
        return [Send("backward" if spreads else "forward", "all-reduce")]
    if config.products == "ring" and in_layers:
        gather, scatter = "collective-permute", "collective-permute"
    else:
        gather, scatter = "all-gather", "reduce-scatter"
    precise = config.products == "ring" and in_layers
    if not spreads:
        return [Send("forward", scatter, precise), Send("backward", gather)]
    # By hand a layer keeps its own tokens, and gathers again for the weights' gradients. The partitioner may do either.
    again = [Send("backward", gather)] if in_layers and config.products != "sharded" else []
    return [Send("forward", gather), *again, Send("backward", scatter, precise)]
