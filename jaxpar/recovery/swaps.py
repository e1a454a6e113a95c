"""CheckFree+'s swapped order of stages, as data for a model that runs its stages one after the other."""

from __future__ import annotations

import numpy as np

from jaxpar.parallel.pipeline.orders import swapped_paths


def swap_orders(stages: int, microbatches: int) -> np.ndarray:
    """int32 [M, S]: row m holds the stages in the order in which microbatch m runs them.

    Even microbatches go straight; odd ones swap the first two and the last two (Blagoev et al. 2025, section 4.3; odd in
    the authors' code). The pipeline's schedule `checkfree+` has the same paths. Evaluation goes straight always.

    Raises:
      ValueError: fewer than 4 stages.
    """
    return np.array(swapped_paths(stages, microbatches), np.int32).reshape(microbatches, stages)
