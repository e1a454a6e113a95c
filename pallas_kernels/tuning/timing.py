"""Seconds that a device takes for a function, without those of its dispatch.

    CUPTI     on NVIDIA GPUs: what the driver counts for each kernel (`jax.experimental.mosaic.gpu.profiler.measure`)
    a loop    elsewhere, and where CUPTI is refused (a sandbox without hardware counters): the function n times in a loop on the
              device, less the same loop with no turn, over n. n is data: it is one program. A barrier between turns keeps the
              compiler from taking the function out of the loop

Inputs are rotated: a turn runs the function once on each of several sets, which together are larger than caches are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

ROTATED_BYTES = 192 * 2**20
"""What the sets of inputs take together: three times an H200's second-level cache, and more than a TPU's VMEM."""
MOST_SETS = 8
MOST_TURNS = 4096


def sets_for(arrays, rotated: int = ROTATED_BYTES) -> int:
    """How many sets of inputs like these, arrays or shapes, are to be rotated."""
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    return min(max(-(-rotated // max(size, 1)), 1), MOST_SETS)


class Sampler:
    """Samples of a function's seconds on a device.

    Args:
      function: of arrays; traced as it is.
      sets: tuples of its arguments, on the device, of the same shapes.
      shortest: seconds that a sample shall take at least, by which its turns are doubled.
      cupti: try CUPTI first where the device is an NVIDIA GPU.

    Attributes:
      method: "CUPTI" or "loop".
      compile_s: seconds that its first run took, compiling included.
    """

    def __init__(self, function: Callable, sets: Sequence[tuple], *, shortest: float = 0.02, cupti: bool = True):
        self.sets, self.turns, self.method = tuple(sets), 1, "loop"
        start = time.perf_counter()
        self._profiled = self._by_cupti(function) if cupti and jax.default_backend() == "gpu" else None
        if self._profiled is None:
            # A program of its own, so that the loop with no turn gives arrays of these shapes as well.
            shapes = jax.eval_shape(lambda sets: [function(*one) for one in sets], self.sets)
            self._loop = jax.jit(lambda n, sets: _loop(function, shapes, n, sets))
        self._run(1)
        self.compile_s = time.perf_counter() - start
        if self._profiled is None:
            self.idle = sorted(self._run(0) for _ in range(5))[2]
            while self.turns < MOST_TURNS and self._run(self.turns) - self.idle < shortest:
                self.turns *= 2

    def sample(self) -> float:
        """Seconds of one call."""
        if self._profiled is not None:
            return self._profiled(self.sets)[1] * 1e-3 / len(self.sets)
        # Not nothing, where noise of a machine with other work on it has made it less than an empty loop.
        return max(self._run(self.turns) - self.idle, 1e-9) / (self.turns * len(self.sets))

    def output(self):
        """What the timed program has made of the first set."""
        return self._profiled(self.sets)[0][0] if self._profiled is not None else self._outs[0]

    def _run(self, turns: int) -> float:
        if self._profiled is not None:
            self._profiled(self.sets)
            return 0.0
        start = time.perf_counter()
        outs = jax.block_until_ready(self._loop(turns, self.sets))
        seconds = time.perf_counter() - start
        if turns:
            self._outs = outs
        return seconds

    def _by_cupti(self, function):
        from jax.experimental.mosaic.gpu import profiler

        run = jax.jit(lambda sets: [function(*one) for one in sets])
        jax.block_until_ready(run(self.sets))
        measured = profiler.measure(run)
        try:
            _, milliseconds = measured(self.sets)
        except RuntimeError:  # no permission to count
            return None
        if milliseconds is None:
            return None
        self.method = "CUPTI"
        return measured


def _loop(function, shapes, turns, sets):
    """The outputs of the last of `turns` turns, each over all sets; zeros after none."""

    def turn(_, carry):
        sets, _ = carry
        outs = [function(*one) for one in sets]
        # The next turn's inputs come after these outputs.
        return jax.lax.optimization_barrier((sets, outs))

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.fori_loop(0, turns, turn, (sets, nothing))[1]
