"""A run's failures walked through on the host, before anything starts: what is refused, and how long it will take."""

from __future__ import annotations

from dataclasses import dataclass

from jaxpar.errors import UserError
from jaxpar.recovery.base import Recovery
from jaxpar.recovery.failures import FailureTrace

MOST = 50
"""A run that goes back so often that it takes this many times its steps is refused."""


@dataclass(frozen=True)
class Plan:
    """What will happen.

    Attributes:
      iterations: steps that will be done, those that are done again and those lost at their start included.
      losses: stages lost.
      failures: steps in which any was lost.
    """

    iterations: int
    losses: int
    failures: int


def walk(strategy: Recovery, trace: FailureTrace, steps: int, *, saved: int | None = None) -> Plan:
    """Go through a run without running it.

    Args:
      steps: updates in all.
      saved: steps between checkpoints on disk. None: none.

    Raises:
      UserError: too few stages; a loss that the strategy cannot recover; a run that would go back for ever.
    """
    strategy.check(trace.stages)
    step = replayed = losses = failures = 0
    while step < steps:
        now = step + replayed + 1
        failed_S = trace.lost(now)
        if failed_S.any():
            losses, failures = losses + int(failed_S.sum()), failures + 1
            if reason := strategy.refuses(failed_S):
                raise UserError(f"step {now} loses {named(failed_S)} of {trace.stages}, and {reason}")
            if strategy.rollback(failed_S) is not None:
                to = strategy.back_to(failed_S, step, saved)
                # The iteration in which a stage was lost is lost itself.
                step, replayed = to, replayed + step - to + 1
                if replayed > MOST * steps:
                    raise UserError(
                        f"with these failures {strategy.name} is only at step {step} of {steps} after {step + replayed} "
                        f"iterations; go back less far (save every few steps), lower the failure rate, or choose a "
                        "strategy that does not go back"
                    )
                continue
        step += 1
    return Plan(step + replayed, losses, failures)


def named(failed_S) -> str:
    """`stage 2`, `stages 1 and 2`."""
    found = [str(s) for s, gone in enumerate(failed_S) if gone]
    return f"stage {found[0]}" if len(found) == 1 else f"stages {', '.join(found[:-1])} and {found[-1]}"
