"""A new random initialisation."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

from jaxpar.models.lazy import jax
from jaxpar.models.spec import LAYERS, init
from jaxpar.recovery.approximate import Approximate
from jaxpar.recovery.base import Stages


@dataclass(frozen=True)
class RandomInit(Approximate):
    """Initialise a lost stage anew. Its numbers follow from the run's key, the step and the layer."""

    def guess(self, rec: Any, state, stages: Stages) -> Any:
        # A stream of its own: a step folds its number into the run's key too.
        key = jax.random.fold_in(jax.random.fold_in(state.key, zlib.crc32(b"recovery")), state.step)
        return init({LAYERS: stages.specs[LAYERS]}, key)[LAYERS]
