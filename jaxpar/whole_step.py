"""The step of a run: the program's gradients, the optimiser, and all that is wrapped around them."""

from __future__ import annotations

from jaxpar.config import RunConfig
from jaxpar.optimisers import make
from jaxpar.parallel.mesh import mesh_sizes
from jaxpar.program import Program
from jaxpar.recovery.base import Stages
from jaxpar.recovery.transform import placed
from jaxpar.step import Step, chain
from jaxpar.steps.base import make_step


def whole_step(config: RunConfig, program: Program) -> Step:
    """Args:
      config: checked, and settled for the program's mesh (`RunConfig.settled`).

    Raises:
      UserError: stages that do not divide the layers, or a place in the chain that a strategy refuses.
    """
    transforms = config.transforms()
    if config.recovers:
        count = config.trace(mesh_sizes(program.mesh)).stages
        decay = None if config.step.ema is None else config.step.ema.decay
        stages = Stages(count, program.specs, program.mesh, program.rules, decay)
        transforms = placed(transforms, config.recovery, stages)
    tx = make(config.optimiser, program.specs, steps=config.steps)
    return chain(make_step(program.grad_fn, tx), *transforms)
