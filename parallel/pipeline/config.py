"""What a run says about its pipeline. Free of JAX, and of NumPy at import: `--help` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from jaxpar.parallel.pipeline.table import Table

MICROBATCHES_PER_STAGE = 4
"""Without a number of its own a pipeline takes this many microbatches a stage, which leaves 1F1B a bubble below 1/4."""


@dataclass(frozen=True)
class PipelineConfig:
    """How microbatches pass through the stages of a mesh with a `stage` axis.

    Attributes:
      schedule: gpipe, 1f1b, interleaved, zb-h1, zb-v, dualpipe-v, checkfree+, skippipe, or a .csv file of tasks (`jaxpar
        schedule` shows them).
      microbatches: parts that the rows of a step are cut into. None: as many as there are rows on a device, at most 4 a
        stage.
      chunks: pieces of the model on each device. None: the schedule's own number.
      ticks: one kind of action in all devices at a time, any mixture, or what is cheaper and can run.
      keep: what a stage keeps for its backward pass: its inputs, to compute the rest again, or all that it needs.
      executor: how the table runs: static, switch, unroll (for looking at), or what suits it; autodiff is GPipe
        differentiated by JAX, to compare with.
    """

    schedule: str = "1f1b"
    microbatches: int | None = None
    chunks: int | None = None
    ticks: Literal["auto", "mixed", "one-kind"] = "auto"
    keep: Literal["inputs", "residuals"] = "inputs"
    executor: Literal["auto", "static", "switch", "unroll", "autodiff"] = "auto"

    def __post_init__(self):
        for name in ("microbatches", "chunks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"pipeline.{name} must be at least 1, got {value}; leave it out for the default")
        if self.executor == "autodiff" and (self.schedule != "gpipe" or self.chunks not in (None, 1)):
            raise ValueError(
                f"pipeline.executor = 'autodiff' runs GPipe with one chunk, not {self.schedule!r}"
                + ("" if self.chunks in (None, 1) else f" with {self.chunks} chunks")
                + "; set pipeline.schedule to gpipe"
            )
        if self.executor == "static" and self.ticks == "mixed":
            raise ValueError("pipeline.executor = 'static' needs ticks of one kind; set pipeline.ticks to one-kind")

    def count(self, rows: int, stages: int) -> int:
        """m, the number of microbatches of a device's `rows` rows.

        Raises:
          ValueError: microbatches that do not divide the rows.
        """
        if self.microbatches is None:
            return max(m for m in range(1, min(rows, MICROBATCHES_PER_STAGE * stages) + 1) if rows % m == 0)
        if rows % self.microbatches:
            near = min((d for d in range(1, rows + 1) if rows % d == 0), key=lambda d: (abs(d - self.microbatches), -d))
            raise ValueError(
                f"{rows} rows on each device do not divide into pipeline.microbatches = {self.microbatches}; nearest "
                f"that works: {near}"
            )
        return self.microbatches

    def table(self, stages: int, rows: int, *, mixed: bool = True) -> Table:
        """The compiled schedule.

        Args:
          stages: devices along the pipeline.
          rows: rows of a step on each device.
          mixed: ticks with several kinds of action can run here; False where a stage permutes over another mesh axis.

        Raises:
          ValueError: numbers that the schedule does not allow, or mixed ticks where they cannot run.
          FileNotFoundError: no such .csv file.
        """
        from jaxpar.parallel.pipeline.configured import table

        return table(self, stages, self.count(rows, stages), mixed)
