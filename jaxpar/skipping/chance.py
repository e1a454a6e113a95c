"""Layers left out by chance: LayerDrop, stochastic depth, progressive layer dropping. Free of JAX at import.

Whether a microbatch runs a layer is drawn from a key that folds in the step, the microbatch and the layer: it depends on
nothing else, and a run that goes on draws what it would have drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpar.errors import UserError
from jaxpar.models.lazy import jax, jnp
from jaxpar.skipping.base import Skipping

SITE = 0x5B17
"""Folded into the run's key, so that no draw is one of dropout's."""


@dataclass(frozen=True)
class Chance(Skipping):
    """Each layer of each microbatch is run with a probability of its own, independently."""

    def probabilities(self, step, layers: int):
        """float32 [L]: with what probability each layer is run in this step."""
        raise NotImplementedError

    @property
    def inverse(self) -> bool:
        """Whether what a layer adds is divided by its probability."""
        return False

    def route(self, step, key, layers: int) -> Any:
        from jaxpar.models.route import Route

        keep_L = self.probabilities(step, layers)
        key = jax.random.fold_in(jax.random.fold_in(key, SITE), step)
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        keys_MxL = jax.vmap(lambda k: fold(k, jnp.arange(layers)))(fold(key, jnp.arange(self.microbatches)))
        uniform_MxL = jax.vmap(jax.vmap(jax.random.uniform))(keys_MxL)
        scale = jnp.broadcast_to(1.0 / keep_L, uniform_MxL.shape) if self.inverse else None
        return Route(keep=uniform_MxL < keep_L[None, :], scale=scale)


def _rate(name: str, option: str, value: float) -> None:
    if not 0 <= value < 1:
        why = "that leaves no layer" if value >= 1 else "a probability is not below 0"
        raise UserError(f"{name}'s {option} = {value} must be at least 0 and below 1 ({why})")


@dataclass(frozen=True)
class LayerDrop(Chance):
    """Every layer is left out with the same probability; nothing is scaled (Fan et al. 2019, "Reducing Transformer Depth
    on Demand with Structured Dropout", section 3).

    Attributes:
      rate: with what probability a layer is left out. 0.2 in the paper, 0.5 for models that are to lose half.
      ramp: steps over which the rate rises from 0, linearly. 0: it is there from the first step, as in the paper.
    """

    name: ClassVar[str] = "layer-drop"

    rate: float = 0.2
    ramp: int = 0

    def __post_init__(self):
        super().__post_init__()
        _rate(self.name, "rate", self.rate)
        if self.ramp < 0:
            raise UserError(f"{self.name}'s ramp = {self.ramp} steps must be at least 0")

    def probabilities(self, step, layers: int):
        reached = 1.0 if self.ramp == 0 else jnp.minimum(step / self.ramp, 1.0)
        return jnp.full(layers, 1.0, jnp.float32) - self.rate * reached


@dataclass(frozen=True)
class StochasticDepth(Chance):
    """Later layers are left out more often (Huang et al. 2016, "Deep Networks with Stochastic Depth", eq. 4): layer l of
    1..L with probability l/L · rate.

    The paper multiplies what a layer adds by its probability of being run when it evaluates; here it is divided by it in
    training, as dropout is, so that evaluation is the plain model. The expectation is the same.

    Attributes:
      rate: of the last layer. 0.5 in the paper.
      profile: linear as above, or every layer with the same rate ("uniform", their section 4).
      scaled: whether what a layer adds is divided by its probability.
    """

    name: ClassVar[str] = "stochastic-depth"

    rate: float = 0.5
    profile: Literal["linear", "uniform"] = "linear"
    scaled: bool = True

    def __post_init__(self):
        super().__post_init__()
        _rate(self.name, "rate", self.rate)

    @property
    def inverse(self) -> bool:
        return self.scaled

    def probabilities(self, step, layers: int):
        depth_L = (
            jnp.arange(1, layers + 1, dtype=jnp.float32) / layers if self.profile == "linear" else jnp.ones(layers)
        )
        return 1.0 - self.rate * depth_L


@dataclass(frozen=True)
class ProgressiveLayerDrop(Chance):
    """Layers are left out more and more often as training goes on, later ones first (Zhang & He 2020, "Accelerating Training
    of Transformer-Based Language Models with Progressive Layer Dropping", Algorithm 1).

        theta(t) = (1 - limit)·exp(-speed·t) + limit;    layer l of 1..L is run with 1 - l/L · (1 - theta(t))

    Attributes:
      limit: what theta falls to. 0.5 in the paper.
      speed: gamma, for one step. 0.001 is the default of DeepSpeed's implementation.
      scaled: whether what a layer adds is divided by its probability, as in the paper.
    """

    name: ClassVar[str] = "progressive-layer-drop"

    limit: float = 0.5
    speed: float = 0.001
    scaled: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.limit <= 1:
            raise UserError(
                f"{self.name}'s limit = {self.limit} must be above 0 and at most 1 (at 0 the last layer is never run)"
            )
        if not 0 < self.speed < float("inf"):
            raise UserError(f"{self.name}'s speed = {self.speed} must be a finite number above 0")

    @property
    def inverse(self) -> bool:
        return self.scaled

    def probabilities(self, step, layers: int):
        theta = (1.0 - self.limit) * jnp.exp(-self.speed * step) + self.limit
        depth_L = jnp.arange(1, layers + 1, dtype=jnp.float32) / layers
        return 1.0 - depth_L * (1.0 - theta)
