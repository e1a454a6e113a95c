"""`jaxpar explain`: the layout of a run, from its configuration alone."""

from __future__ import annotations

import jax

from jaxpar.config import RunConfig
from jaxpar.data.config import vocabulary_of
from jaxpar.models.spec import abstract
from jaxpar.optimisers import make
from jaxpar.parallel.explain import explain
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.program import checked
from jaxpar.state import state_specs


def explain_run(config: RunConfig, *, compiled: bool = False):
    """The table of `jaxpar.parallel.explain` for this run, its optimiser included. Nothing is initialised.

    Args:
      compiled: compile the training step on this machine's devices and count its collectives too.

    Raises:
      UserError, ValueError: a mesh that does not divide the model or the batch.
    """
    cfg = config.model.replace(vocabulary=vocabulary_of(config.data))
    rows = config.data.batch // config.step.accumulate
    mesh = settled(config)
    staged = mesh.stage > 1
    specs, rules = checked(
        cfg,
        mesh,
        rows=rows,
        length=config.data.length,
        pipeline=config.pipeline if staged else None,
        sequence=config.sequence,
    )
    microbatches = config.pipeline.count(rows // (mesh.data * mesh.fsdp), mesh.stage) if staged else 1
    tx = make(config.optimiser, specs, steps=config.steps)
    optimiser = state_specs(jax.eval_shape(tx.init, abstract(specs)), specs)
    return explain(
        specs,
        mesh,
        rules,
        rows=rows,
        length=config.data.length,
        compute_dtype=cfg.dtype,
        optimiser=optimiser,
        microbatches=microbatches,
        compiled=compile_step(config, cfg) if compiled else None,
    )


def settled(config: RunConfig) -> MeshConfig:
    """The mesh with all its sizes. One that is given whole needs no devices; "rest" is what this machine has left."""
    if "rest" not in vars(config.mesh).values():
        return config.mesh
    return config.mesh.fit(config.fake_devices or jax.device_count())


def compile_step(config: RunConfig, cfg):
    """The compiled training step, from shapes alone."""
    from jaxpar.ahead import lower
    from jaxpar.parallel.mesh import make_mesh
    from jaxpar.program import build
    from jaxpar.start import start
    from jaxpar.state import abstract_state
    from jaxpar.step import chain
    from jaxpar.steps.base import make_step

    start(fake_devices=config.fake_devices, compile_cache=config.compile_cache)
    mesh = make_mesh(config.mesh)
    rows = config.data.batch // config.step.accumulate
    program = build(cfg, mesh, rows=rows, length=config.data.length, pipeline=config.pipeline, sequence=config.sequence)
    tx = make(config.optimiser, program.specs, steps=config.steps)
    step = chain(make_step(program.grad_fn, tx), *config.step.transforms())
    state = abstract_state(step, program, jax.random.key(0))
    return lower(step, program, state, config.data.batch, config.data.length).compile()
