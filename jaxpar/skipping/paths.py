"""Fixed paths over stages, one for each microbatch: SkipPipe's, and CheckFree+'s swaps. Free of JAX at import.

The S stages are equal, contiguous groups of the stack's layers. A path is a row of stages in the order in which they run;
all paths are equally long, so that one compiled program runs any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import numpy as np

from jaxpar.errors import UserError
from jaxpar.models.lazy import jnp
from jaxpar.parallel.pipeline.orders import even_skips, swapped_paths
from jaxpar.skipping.base import Skipping


@dataclass(frozen=True)
class Fixed(Skipping):
    """Paths that are the same in every step.

    Attributes:
      stages: S.
    """

    reorders: ClassVar[bool] = True
    least: ClassVar[int] = 2
    """The fewest stages that make sense."""

    microbatches: int = 4
    stages: int = 4

    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The stages that each of M microbatches visits, in order."""
        raise NotImplementedError

    def check(self, layers: int, rows: int, devices: int = 1) -> None:
        super().check(layers, rows, devices)
        if layers % self.stages:
            fitting = [d for d in range(self.least, layers + 1) if layers % d == 0]
            near = min(fitting, key=lambda d: abs(d - self.stages), default=None)
            raise UserError(
                f"{self.name}'s stages = {self.stages} do not divide the model's {layers} layers, and stages that take "
                f"each other's place in a path must be equal; "
                + (f"nearest that works: {near}" if near else f"give the model a multiple of {self.stages} layers")
            )

    def route(self, step, key, layers: int) -> Any:
        from jaxpar.models.route import Route

        return Route(layers=jnp.asarray(layers_of(self.paths(), self.stages, layers)))


def layers_of(paths: tuple[tuple[int, ...], ...], stages: int, layers: int) -> np.ndarray:
    """int32 [M, n]: the layers behind paths over equal stages."""
    each = layers // stages
    return (np.array(paths, np.int32)[:, :, None] * each + np.arange(each, dtype=np.int32)).reshape(len(paths), -1)


@dataclass(frozen=True)
class SkipPaths(Fixed):
    """Each microbatch leaves stages out (Blagoev et al. 2025, "SkipPipe: Partial and Reordered Pipelining Framework").

    The same path in every iteration for the same microbatch, no scaling of what stays, and the whole model in evaluation,
    as in the authors' training code.

    Attributes:
      skipped: stages that each microbatch leaves out, never the first, all others equally often.
      paths_file: a .csv file of paths instead, as `jaxpar plan --csv` writes it, or with a line for each microbatch, its
        stages in order; each must keep the rules of a path (`jaxpar.parallel.planner.problem.Rules`). Stages and
        microbatches must be as many as there.
      gradients: sum: a stage that fewer microbatches visit learns from fewer, as in the authors' code; visits: its gradient
        is multiplied by M over its visits, which makes it a mean over those that visit it.
    """

    name: ClassVar[str] = "skip-paths"

    skipped: int = 1
    paths_file: str | None = None
    gradients: Literal["sum", "visits"] = "sum"

    def __post_init__(self):
        super().__post_init__()
        if self.paths_file is None and not 0 <= self.skipped < self.stages:
            raise UserError(
                f"{self.name}'s skipped = {self.skipped} of stages = {self.stages} leaves no stage besides the first, which "
                f"always stays, or is negative; choose 0 to {self.stages - 1}"
            )

    def paths(self) -> tuple[tuple[int, ...], ...]:
        if self.paths_file is None:
            return even_skips(self.stages, self.microbatches, self.skipped)
        return _from_file(self.paths_file)

    def check(self, layers: int, rows: int, devices: int = 1) -> None:
        if self.paths_file is not None:
            self._check_file(self.paths())
        super().check(layers, rows, devices)

    def _check_file(self, paths: tuple[tuple[int, ...], ...]) -> None:
        from jaxpar.parallel.planner.check import check_paths
        from jaxpar.parallel.planner.problem import Rules

        lengths = {len(path) for path in paths}
        if len(lengths) > 1:
            raise UserError(
                f"{self.paths_file} has paths of {', '.join(map(str, sorted(lengths)))} stages; training runs them in one "
                "program and needs them equally long"
            )
        used = 1 + max(max(path) for path in paths)
        if used > self.stages or len(paths) != self.microbatches:
            raise UserError(
                f"{self.paths_file} has {len(paths)} paths over {used} stages, but {self.name} has microbatches = "
                f"{self.microbatches} and stages = {self.stages}; set them to {len(paths)} and {max(used, self.stages)}"
            )
        try:
            check_paths(paths, Rules(self.stages, min(lengths)))
        except ValueError as error:
            raise UserError(f"{self.paths_file}: {error}") from error

    def gradient_scale(self, layers: int) -> Any:
        if self.gradients == "sum":
            return None
        visits_L = np.bincount(layers_of(self.paths(), self.stages, layers).ravel(), minlength=layers)
        return jnp.asarray(self.microbatches / np.maximum(visits_L, 1), jnp.float32)


@lru_cache(maxsize=8)
def _from_file(file: str) -> tuple[tuple[int, ...], ...]:
    from jaxpar.parallel.pipeline.csv_format import paths_from_csv

    try:
        return paths_from_csv(file)
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


@dataclass(frozen=True)
class SwapEnds(Fixed):
    """Every microbatch runs all stages, and every second one swaps the first two and the last two (CheckFree+, Blagoev et al.
    2025, "All is Not Lost: LLM Recovery without Checkpoints", section 4.3): each edge stage learns its neighbour's work, so
    that a copy of the neighbour can stand in for it. Nothing is skipped.
    """

    name: ClassVar[str] = "swap-ends"
    least: ClassVar[int] = 4

    microbatches: int = 2

    def __post_init__(self):
        super().__post_init__()
        if self.stages < self.least:
            raise UserError(
                f"{self.name}'s stages = {self.stages} are too few to swap the first two and the last two; give at least 4"
            )
        if self.microbatches < 2:
            raise UserError(f"{self.name} needs at least 2 microbatches, one of them swapped; got {self.microbatches}")

    def paths(self) -> tuple[tuple[int, ...], ...]:
        return swapped_paths(self.stages, self.microbatches)
