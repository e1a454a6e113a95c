"""How the losses at exits are joined in training: weights, and their course over the steps. Free of JAX at import.

    objective = Σ_i weights_i · loss_i  (+ distillation),    i over the exits and, last, the last layer

Exits are numbered by the layers before them: one behind ℓ of L layers is the papers' layer ℓ (CALM) or ℓ - 1 (LayerSkip,
who count from 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpar.models.lazy import jnp


@dataclass(frozen=True)
class Weighted:
    """A scheme.

    Attributes:
      distillation: what the squared distance of an exit's state from the last layer's weighs. 0: it is not computed.
    """

    distillation: ClassVar[float] = 0.0

    def check(self, at: tuple[int, ...], layers: int) -> None:
        """Raises ValueError where the scheme does not suit these exits."""

    @property
    def changes(self) -> bool:
        """Whether weights depend on the step."""
        return False

    def weights(self, at: tuple[int, ...], layers: int, step: Any = None):
        """float32 [n + 1]: of the n exits and of the last layer.

        Args:
          step: int32, updates done so far. None: as they are at the end of the course.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Calm(Weighted):
    """ω_ℓ = ℓ^power / Σ: CALM has power 1 (Schuster et al. 2022, eq. 6); Elbayad et al. 2020 (§3.1) compare 1, 0 and -1,
    which prefer late exits, none, and early ones. They sum to 1.

    Attributes:
      power: of the layer.
    """

    power: float = 1.0

    def weights(self, at, layers, step=None):
        each = jnp.asarray([float(layer) ** self.power for layer in (*at, layers)], jnp.float32)
        return each / jnp.sum(each)


@dataclass(frozen=True)
class Deed(Weighted):
    """The mean over all exits and the last layer, plus the last layer's once more: the mean alone makes that one worse
    (DEED, Tang et al. 2023, §3.1). They sum to 2."""

    def weights(self, at, layers, step=None):
        n = len(at) + 1
        return jnp.full(n, 1.0 / n, jnp.float32).at[-1].add(1.0)


@dataclass(frozen=True)
class EeLlm(Weighted):
    """Weights that are given, beside 1 for the last layer (EE-LLM, Chen et al. 2023, §3.1; 0.25 and 0.5 for exits behind 6
    and 12 of 24 layers), and may rise from 0 or fall to 0 over the steps (their §4.1.3).

    Attributes:
      weight: of each exit; one for all, or as many as there are exits.
      course: the same in every step, or rising linearly from 0 (warm_up), or falling to 0 (cool_down).
      over: steps that this takes.
    """

    weight: tuple[float, ...] = (0.25,)
    course: Literal["constant", "warm_up", "cool_down"] = "constant"
    over: int = 1000

    def __post_init__(self):
        if not self.weight or min(self.weight) < 0:
            raise ValueError(
                f"model.exits.loss.weight = {self.weight} must be numbers of at least 0, one or one an exit"
            )
        if self.over < 1:
            raise ValueError(f"model.exits.loss.over = {self.over} steps must be at least 1")

    def check(self, at, layers):
        if len(self.weight) not in (1, len(at)):
            raise ValueError(
                f"model.exits.loss.weight has {len(self.weight)} numbers for the {len(at)} exits at {at}; give one for each, "
                "or one for all"
            )

    @property
    def changes(self) -> bool:
        return self.course != "constant"

    def weights(self, at, layers, step=None):
        each = jnp.broadcast_to(jnp.asarray(self.weight, jnp.float32), len(at))
        if self.changes:
            share = jnp.float32(1.0) if step is None else jnp.clip(step / self.over, 0.0, 1.0).astype(jnp.float32)
            each = each * (share if self.course == "warm_up" else 1.0 - share)
        return jnp.append(each, 1.0)


@dataclass(frozen=True)
class LayerSkip(Weighted):
    """LayerSkip (Elhoushi et al. 2024, §4.1.2): with layers l = 0 ... L-1

        e(l) = scale · Σ_{i≤l} i  below the last,    e(L-1) = L - 1 + scale · Σ_{i≤L-2} i
        weights = C(t, l)·e(l) / Σ,                  C(t, L-1) = 1

    and C a curriculum: all exits in every step; every `period`-th in turn (rotational), which they use from scratch; or one
    more from the last to the first as training goes on (gradual): layer l from step (L-1-l)/(2L) of the training on, here
    (L-1-l)/L · over. Exits that a step leaves out weigh nothing; their loss is still computed and reported. The rotation
    goes over the exits that there are, the paper's over all layers.

    The layer dropout that belongs to it is a skipping strategy of the run: `jaxpar.skipping.layer_skip`.

    Attributes:
      scale: e_scale. 0.1 to 1.0 in the paper, 0.2 from scratch.
      curriculum: see above.
      period: R of the rotation.
      over: steps after which the gradual curriculum has opened a layer before the first (half of the training).
    """

    scale: float = 0.2
    curriculum: Literal["constant", "rotational", "gradual"] = "constant"
    period: int = 2
    over: int = 200

    def __post_init__(self):
        if not 0 < self.scale <= 1:
            raise ValueError(f"model.exits.loss.scale = {self.scale} is outside (0, 1]")
        if self.period < 1 or self.over < 1:
            raise ValueError(
                f"model.exits.loss.period = {self.period} and model.exits.loss.over = {self.over} must be at least 1"
            )

    def check(self, at, layers):
        if at[0] == 1:
            raise ValueError(
                f"model.exits.at = {at}: LayerSkip's weights are 0 for an exit behind the first layer, which would not be "
                "trained; begin at 2, or take another --exits.loss (calm, deed, ee-llm, free)"
            )
        if self.curriculum == "rotational" and self.period > len(at):
            raise ValueError(
                f"model.exits.loss.period = {self.period} is longer than the {len(at)} exits at {at}: some steps would train "
                f"none; choose at most {len(at)}"
            )

    @property
    def changes(self) -> bool:
        return self.curriculum != "constant"

    def weights(self, at, layers, step=None):
        number = jnp.asarray(at) - 1
        each = self.scale * number * (number + 1) / 2
        last = layers - 1 + self.scale * (layers - 2) * (layers - 1) / 2
        if self.curriculum == "rotational" and step is not None:
            each = jnp.where(jnp.arange(len(at)) % self.period == step % self.period, each, 0.0)
        if self.curriculum == "gradual" and step is not None:
            each = jnp.where(step >= (layers - 1 - number) / layers * self.over, each, 0.0)
        each = jnp.append(each, last).astype(jnp.float32)
        return each / jnp.sum(each)


@dataclass(frozen=True)
class Free(Weighted):
    """FREE (Bae et al. 2023, §4.1): one shallow exit beside the last layer, weighted as CALM does, and the exit's states drawn
    to the last layer's, whose gradient is stopped: mean over D of the squared distance of what the output projection sees.
    The paper pairs every shallow layer with a deep one (KD-dyna); here the exit is paired with the last (its KD-last).

    In a pipeline the exit's state travels to the last stage: with `distill` above 0 every boundary carries one more of the
    residual operator's wire, [B, T, D] for a plain stream; with 0 nothing more.

    Attributes:
      distill: weight of the distance.
    """

    distill: float = 1.0

    def __post_init__(self):
        if self.distill < 0:
            raise ValueError(f"model.exits.loss.distill = {self.distill} must be at least 0")

    def check(self, at, layers):
        if len(at) > 1:
            raise ValueError(f"FREE has one exit beside the last layer, and model.exits.at = {at} names {len(at)}")

    @property
    def distillation(self) -> float:
        return self.distill

    def weights(self, at, layers, step=None):
        return Calm().weights(at, layers)
