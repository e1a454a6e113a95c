"""Which layers each virtual stage has, and where they lie once the stack is dealt out to the devices. Free of JAX."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxpar.parallel.pipeline.tasks import Placement


@dataclass(frozen=True)
class Split:
    """`layers` layers over the virtual stages of a placement: as evenly as can be, earlier stages have one more.

    P devices, C chunks, n layers in the largest stage. Smaller stages are filled up with a copy of a layer that they
    have, so that all devices run one program; what the copies do is thrown away.

    Raises:
      ValueError: more stages than layers.
    """

    layers: int
    placement: Placement

    def __post_init__(self):
        stages, devices, chunks = self.placement.stages, self.placement.devices, self.placement.chunks
        if stages > self.layers:
            times = "" if chunks == 1 else f" × {chunks} chunks = {stages}"
            fits = max(d for d in range(1, devices + 1) if d * chunks <= max(self.layers, chunks))
            raise ValueError(
                f"{devices} pipeline stages{times} are more than the model's {self.layers} layers; use at most "
                f"{fits if fits * chunks <= self.layers else self.layers} stages"
                + ("" if chunks == 1 else f" with {chunks} chunks, or fewer chunks")
            )

    @cached_property
    def of_stage(self) -> tuple[range, ...]:
        """The layers of each virtual stage."""
        stages = self.placement.stages
        each, more = divmod(self.layers, stages)
        starts = np.cumsum([0, *(each + (s < more) for s in range(stages))]).tolist()
        return tuple(range(a, b) for a, b in itertools.pairwise(starts))

    @property
    def largest(self) -> int:
        """n."""
        return max(map(len, self.of_stage))

    @property
    def even(self) -> bool:
        """All stages have equally many layers."""
        return self.largest == min(map(len, self.of_stage))

    @property
    def in_order(self) -> bool:
        """The stack lies on the devices as it is: nothing moves when it is dealt out."""
        return self.even and np.array_equal(self.dealt.ravel(), np.arange(self.layers))

    @cached_property
    def dealt(self) -> np.ndarray:
        """int32 [P, C, n]: the layer at each place."""
        row = lambda stage: [
            *self.of_stage[stage],
            *[self.of_stage[stage][-1]] * (self.largest - len(self.of_stage[stage])),
        ]
        return np.array([[row(stage) for stage in device] for device in self.placement.grid], np.int32)

    @cached_property
    def first(self) -> np.ndarray:
        """int32 [P, C]: the first layer of each chunk."""
        return self.dealt[:, :, 0]

    @cached_property
    def count(self) -> np.ndarray:
        """int32 [P, C]: how many of its layers are its own."""
        return np.array([[len(self.of_stage[stage]) for stage in device] for device in self.placement.grid], np.int32)

    @cached_property
    def place(self) -> np.ndarray:
        """int32 [layers]: where each layer lies in `dealt`, flattened."""
        own = np.arange(self.largest)[None, None, :] < self.count[:, :, None]
        flat = np.flatnonzero(own.ravel())
        found = np.empty(self.layers, np.int32)
        found[self.dealt.ravel()[flat]] = flat
        return found
