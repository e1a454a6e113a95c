"""Optimisers and their schedules as configuration. Free of JAX; `jaxpar.optimisers.make` builds them with optax."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from jaxpar.errors import UserError


def _between(config, name: str, low: float, high: float) -> None:
    value = getattr(config, name)
    if not low <= value < high:
        raise UserError(f"{type(config).__name__}.{name} = {value} is outside [{low}, {high})")


@dataclass(frozen=True)
class Constant:
    """The same learning rate at every step.

    Attributes:
      peak: the learning rate.
    """

    peak: float = 1e-3


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, then half a cosine down to a fraction of the peak at the last step.

    Attributes:
      peak: the highest learning rate.
      warmup: steps of warm-up. None: a tenth of the run, at most 100.
      final: the last learning rate, as a fraction of the peak.
    """

    peak: float = 1e-3
    warmup: int | None = None
    final: float = 0.1


@dataclass(frozen=True)
class WarmupLinear:
    """Linear warm-up, then a straight line down to a fraction of the peak at the last step.

    Attributes:
      peak: the highest learning rate.
      warmup: steps of warm-up. None: a tenth of the run, at most 100.
      final: the last learning rate, as a fraction of the peak.
    """

    peak: float = 1e-3
    warmup: int | None = None
    final: float = 0.0


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warm-up, a plateau, and a linear decay over the last steps (Hu et al. 2024, MiniCPM).

    Attributes:
      peak: the learning rate of the plateau.
      warmup: steps of warm-up. None: a tenth of the run, at most 100.
      decay: steps of the decay at the end. None: a tenth of the run.
      final: the last learning rate, as a fraction of the peak.
    """

    peak: float = 1e-3
    warmup: int | None = None
    decay: int | None = None
    final: float = 0.0


Schedule = WarmupCosine | WarmupLinear | WarmupStableDecay | Constant


@dataclass(frozen=True)
class _Optimiser:
    """What all of them share."""

    rates: ClassVar[tuple[str, ...]] = ("b1", "b2", "momentum")

    def __post_init__(self):
        names = {f.name for f in fields(self)}
        for name in names & set(self.rates):
            _between(self, name, 0.0, 1.0)
        for name in names & {"weight_decay", "epsilon"}:
            _between(self, name, 0.0, float("inf"))
        schedule = self.schedule
        if not 0 < schedule.peak < float("inf"):
            raise UserError(f"the learning rate {schedule.peak} must be a finite number above 0")
        for name in ("warmup", "decay"):
            if (getattr(schedule, name, None) or 0) < 0:
                raise UserError(f"the schedule's {name} = {getattr(schedule, name)} steps must be at least 0")
        if not 0 <= getattr(schedule, "final", 0.0) <= 1:
            raise UserError(f"the schedule's final = {schedule.final} is a fraction of the peak, between 0 and 1")


@dataclass(frozen=True)
class AdamW(_Optimiser):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019).

    Attributes:
      schedule: the learning rate.
      b1, b2: decay rates of the first and second moments.
      epsilon: added to the root of the second moment.
      weight_decay: times the learning rate, of matrices and embeddings; norms, biases and gates have none.
    """

    schedule: Schedule = WarmupCosine()
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1


@dataclass(frozen=True)
class Lion(_Optimiser):
    """The sign of an interpolated momentum (Chen et al. 2023). Learning rates are 3 to 10 times smaller than AdamW's.

    Attributes:
      schedule: the learning rate.
      b1: interpolation of the update.
      b2: decay rate of the momentum.
      weight_decay: times the learning rate; norms, biases and gates have none.
    """

    schedule: Schedule = WarmupCosine(peak=3e-4)
    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 1.0


@dataclass(frozen=True)
class Muon(_Optimiser):
    """Orthogonalised momentum for each layer's matrices, AdamW for the rest (Jordan et al. 2024).

    Kernels of several dimensions count as matrices: [D, H, K] as D x (H·K), [H, K, D] as (H·K) x D. Embeddings, the
    output projection, norms and biases take AdamW. Updates are scaled by 0.2·sqrt(max(rows, columns)), so that AdamW's
    learning rates and weight decay carry over (Liu et al. 2025, "Muon is scalable", eq. 4).

    Attributes:
      schedule: the learning rate of both.
      momentum: decay rate of the momentum.
      b1, b2, epsilon: of AdamW.
      weight_decay: times the learning rate; norms, biases and gates have none.
      steps: Newton-Schulz iterations.
    """

    schedule: Schedule = WarmupCosine()
    momentum: float = 0.95
    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    steps: int = 5


@dataclass(frozen=True)
class Adafactor(_Optimiser):
    """Factored second moments, no first moment (Shazeer & Stern 2018), with a schedule of its own learning rate.

    Attributes:
      schedule: the learning rate.
      weight_decay: times the learning rate; norms, biases and gates have none.
      clip: the largest root mean square of an update. None: no limit.
      smallest: matrices whose smaller dimension is below this are not factored.
    """

    schedule: Schedule = WarmupCosine()
    weight_decay: float = 0.0
    clip: float | None = 1.0
    smallest: int = 128


@dataclass(frozen=True)
class SGD(_Optimiser):
    """Stochastic gradient descent with momentum.

    Attributes:
      schedule: the learning rate.
      momentum: decay rate of the momentum; 0 keeps none.
      nesterov: look ahead along the momentum.
      weight_decay: times the learning rate; norms, biases and gates have none.
    """

    schedule: Schedule = WarmupCosine(peak=0.1)
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0


AnyOptimiser = AdamW | Lion | Muon | Adafactor | SGD
