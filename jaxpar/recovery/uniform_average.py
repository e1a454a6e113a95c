"""The plain mean of both neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxpar.models.lazy import jnp
from jaxpar.recovery.base import Stages
from jaxpar.recovery.checkfree import Neighbours


@dataclass(frozen=True)
class UniformAverage(Neighbours):
    """Make a lost stage the mean of its neighbours, whatever their gradients (CheckFree's ablation)."""

    def shares(self, rec: Any, stages: Stages):
        return jnp.full(stages.count, 0.5, jnp.float32)
