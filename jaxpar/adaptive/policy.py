"""How generation uses exits: strategies. Free of JAX at import."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.adaptive.confidence import Confidence, Learned, TopTwo
from jaxpar.adaptive.threshold import Threshold
from jaxpar.errors import UserError


@dataclass(frozen=True)
class Propagate:
    """The exit's state goes through the upper layers' key and value projections."""

    @property
    def window(self) -> int:
        """Tokens that may wait."""
        return 0


@dataclass(frozen=True)
class Recompute:
    """Tokens that left wait until one goes on.

    Attributes:
      window: how many may wait; then one goes on in any case.
    """

    window: int = 8

    def __post_init__(self):
        if self.window < 1:
            raise UserError(f"remedy.window = {self.window} tokens must be at least 1")


@dataclass(frozen=True)
class ExitEarly:
    """Each token leaves by the first exit that is sure of it.

    Attributes:
      threshold: how sure an exit must be.
      confidence: how that is measured.
      remedy: where later tokens find the keys and values of one that left.
      at: exits to use. None given: all of the model's. Where a model has none, layers named here are read by the last layer's
        head.
    """

    threshold: Threshold = Threshold()
    confidence: Confidence = TopTwo()
    remedy: Propagate | Recompute = Recompute()
    at: tuple[int, ...] = ()

    @property
    def learns(self) -> bool:
        return isinstance(self.confidence, Learned)

    def exits(self, cfg) -> tuple[int, ...]:
        """Behind which layers tokens may leave.

        Raises:
          UserError: there are none, or they are not layers of the model.
        """
        at = self.at or cfg.exits.at
        if not at:
            raise UserError(
                f"the model has no exits; name some of its {cfg.layers} layers to leave behind (--decoding.at {cfg.layers // 2}), or "
                "train one with --exits.at"
            )
        if list(at) != sorted(set(at)) or not 1 <= at[0] <= at[-1] < cfg.layers:
            raise UserError(
                f"exits behind the layers {at} must rise within 1 to {cfg.layers - 1}, of {cfg.layers} layers"
            )
        return at


@dataclass(frozen=True)
class Speculate:
    """An exit drafts, or with --skip the model with parts left out, and the whole model verifies: the tokens of plain greedy
    decoding.

    Attributes:
      layer: behind which drafts are made. None: the model's first exit, or by what --skip leaves.
      draft: drafts in a round.
    """

    layer: int | None = None
    draft: int = 4

    def behind(self, cfg) -> int:
        """The layer.

        Raises:
          UserError: none is named, and the model has no exit.
        """
        if self.layer is None and not cfg.exits.at:
            raise UserError(
                f"the model has no exits to draft with; name one of its {cfg.layers} layers: --decoding.layer {cfg.layers // 2}"
            )
        return cfg.exits.at[0] if self.layer is None else self.layer


Decoding = ExitEarly | Speculate
