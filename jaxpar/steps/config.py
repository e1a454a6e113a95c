"""What is wrapped around a step, as configuration, in the one order in which the parts belong. Free of JAX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxpar.errors import UserError


@dataclass(frozen=True)
class StopOnNonfinite:
    """Stop at the first step that is not finite, with the state from before it."""

    def transform(self) -> Any:
        from jaxpar.steps.nonfinite import stop_on_nonfinite

        return stop_on_nonfinite()


@dataclass(frozen=True)
class SkipNonfinite:
    """Skip steps that are not finite.

    Attributes:
      max_consecutive: stop after more than this many in a row.
    """

    max_consecutive: int = 10

    def transform(self) -> Any:
        from jaxpar.steps.nonfinite import skip_nonfinite

        return skip_nonfinite(self.max_consecutive)


@dataclass(frozen=True)
class SkipSpikes:
    """Skip steps whose loss or gradient norm stands out of the last ones.

    Attributes:
      sigma: standard deviations above the mean from which on a step is skipped.
      window: how many of the last steps make mean and deviation.
      max_consecutive: take a step all the same after this many skips in a row.
    """

    sigma: float = 6.0
    window: int = 128
    max_consecutive: int = 10

    def transform(self) -> Any:
        from jaxpar.steps.spikes import skip_spikes

        return skip_spikes(self.sigma, self.window, self.max_consecutive)


@dataclass(frozen=True)
class Ema:
    """Keep an exponential moving average of the parameters, and evaluate with it.

    Attributes:
      decay: how much of the average stays in each step.
    """

    decay: float = 0.999

    def transform(self) -> Any:
        from jaxpar.steps.ema import ema

        return ema(self.decay)


@dataclass(frozen=True)
class ClipGlobal:
    """Clip the gradient of the whole model by its norm.

    Attributes:
      norm: the largest norm of the mean gradient.
    """

    norm: float = 1.0

    def transform(self) -> Any:
        from jaxpar.steps.clip import clip_global

        return clip_global(self.norm)


@dataclass(frozen=True)
class ClipPerStage:
    """Clip each stage's gradient by its own norm.

    Attributes:
      norm: the largest norm of a stage's mean gradient.
      stages: contiguous groups of layers; what is outside the stack is a group of its own.
    """

    norm: float = 1.0
    stages: int = 4

    def transform(self) -> Any:
        from jaxpar.steps.clip import clip_per_stage

        return clip_per_stage(self.norm, self.stages)


@dataclass(frozen=True)
class StepConfig:
    """What is wrapped around a step.

    Attributes:
      accumulate: microbatches that a batch is split into.
      clip: how the gradient is clipped. None: not.
      spikes: whether steps that stand out are skipped. None: they are taken.
      nonfinite: what happens to a step that is not finite.
      ema: an average of the parameters. None: none.
    """

    accumulate: int = 1
    clip: ClipGlobal | ClipPerStage | None = ClipGlobal()
    spikes: SkipSpikes | None = None
    nonfinite: StopOnNonfinite | SkipNonfinite = StopOnNonfinite()
    ema: Ema | None = None

    def __post_init__(self):
        if self.accumulate < 1:
            raise UserError(f"step.accumulate = {self.accumulate} must be at least 1")

    def transforms(self) -> tuple:
        """Innermost first: clipping sees what the optimiser sees; guards see the gradient before it was clipped; the
        average is outside them, and so sees which steps were taken."""
        from jaxpar.steps.accumulate import accumulate

        parts = [accumulate(self.accumulate)]
        parts += [part.transform() for part in (self.clip, self.spikes, self.nonfinite, self.ema) if part is not None]
        return tuple(parts)
