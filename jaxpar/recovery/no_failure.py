"""No recovery: the run is not expected to lose anything."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.recovery.base import Recovery


@dataclass(frozen=True)
class NoFailure(Recovery):
    """Recover nothing. A run whose trace loses a stage is refused before it starts; in a script a lost stage stays NaN, and
    the guard against what is not finite stops the run."""

    def _why_not(self) -> str:
        return "it recovers nothing; choose a strategy with --recovery, for instance checkfree"
