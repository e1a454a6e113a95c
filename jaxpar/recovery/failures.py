"""A trace of failures: which stages are lost in which step, the same for every strategy and on every machine."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxpar.errors import UserError


@dataclass(frozen=True)
class FailureTrace:
    """Losses by step and stage: a pure function of its fields, made on demand, without end.

    A stage s is lost in step t where the s-th word of Philox4x64-10 (Salmon et al. 2011) with key `seed` and counter t,
    read as a fraction of 2^64, is below `rates[s]`; or where (t, s) is listed. NumPy keeps this stream fixed, so that
    experiments on different machines, and strategies in different runs, see the same failures. Adjacent and simultaneous
    losses are part of it.

    Attributes:
      stages: S, how many there are.
      rates: [S], the probability of each stage in a step.
      seed: of the draws.
      listed: given losses, (step, stage), steps from 1.
      thin: of stages drawn in one step, leave out the one above each that stays (listed ones always stay).
    """

    stages: int
    rates: tuple[float, ...]
    seed: int = 0
    listed: frozenset[tuple[int, int]] = frozenset()
    thin: bool = False

    def __post_init__(self):
        if self.stages < 1 or len(self.rates) != self.stages:
            raise UserError(f"a trace of {self.stages} stages needs as many rates, got {len(self.rates)}")
        if wrong := [rate for rate in self.rates if not 0 <= rate <= 1]:
            raise UserError(f"a failure rate of {wrong[0]} is outside [0, 1]")
        if wrong := sorted(e for e in self.listed if not (e[0] >= 1 and 0 <= e[1] < self.stages)):
            raise UserError(
                f"stage {wrong[0][1]} in step {wrong[0][0]} cannot be lost: there are the stages 0 to "
                f"{self.stages - 1}, and steps count from 1"
            )

    @classmethod
    def bernoulli(cls, rate: float, stages: int, seed: int = 0) -> FailureTrace:
        """The same rate for each stage."""
        return cls(stages, (rate,) * stages, seed)

    def lost(self, step: int) -> np.ndarray:
        """bool [S]: the stages lost in this step (from 1), before its gradients."""
        failed = np.zeros(self.stages, bool)
        if any(self.rates):
            words = np.random.Philox(key=self.seed, counter=[0, step, 0, 0]).random_raw(self.stages)
            failed = (words >> np.uint64(11)) * 2.0**-53 < np.array(self.rates)
            if self.thin:
                for s in range(1, self.stages):
                    failed[s] &= not failed[s - 1]
        for s in range(self.stages):
            failed[s] |= (step, s) in self.listed
        return failed

    def array(self, steps: int) -> np.ndarray:
        """bool [steps, S]; row i is step i + 1."""
        return np.stack([self.lost(t) for t in range(1, steps + 1)]) if steps else np.zeros((0, self.stages), bool)

    def events(self, steps: int) -> list[tuple[int, int]]:
        """The losses up to a step, as (step, stage)."""
        return [(int(t) + 1, int(s)) for t, s in np.argwhere(self.array(steps))]

    def write_csv(self, path: str | Path, steps: int) -> None:
        """The losses up to a step as a file that `read_csv` reads."""
        lines = ["step,stage", *(f"{t},{s}" for t, s in self.events(steps))]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_csv(path: Path) -> list[tuple[int, int]]:
    """(step, stage) from a CSV file, one a line; a first line "step,stage" is passed over.

    Raises:
      UserError: no such file, or a line that is not two whole numbers.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the failures in {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    events = []
    for number, row in enumerate(csv.reader(text.splitlines()), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 1 and cells == ["step", "stage"]):
            continue
        if len(cells) != 2 or not all(cell.isdecimal() for cell in cells):
            raise UserError(f"line {number} of {path} is {','.join(row)!r}, not step,stage (two whole numbers)")
        events.append((int(cells[0]), int(cells[1])))
    return events
