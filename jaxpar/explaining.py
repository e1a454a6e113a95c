"""`jaxpar explain`: the layout of a run, from its configuration alone."""

from __future__ import annotations

from dataclasses import replace

import jax

from jaxpar.config import RunConfig
from jaxpar.data.config import vocabulary_of
from jaxpar.models.spec import abstract
from jaxpar.optimisers import make
from jaxpar.parallel.explain import explain
from jaxpar.parallel.mesh import MeshConfig, mesh_sizes
from jaxpar.parallel.topology import tpu_devices
from jaxpar.program import checked
from jaxpar.programs.pipeline import microbatches
from jaxpar.programs.sequence import settled as settled_sequence
from jaxpar.state import state_specs


def explain_run(config: RunConfig, *, compiled: bool = False, topology: str | None = None):
    """The table of `jaxpar.parallel.explain` for this run, its optimiser included. Nothing is initialised.

    Args:
      compiled: compile the training step and count its collectives too.
      topology: the TPU slice to compile for (`jaxpar.parallel.topology`). None: this machine's devices.

    Raises:
      UserError, ValueError: a mesh that does not divide the model or the batch.
    """
    cfg = config.model.replace(vocabulary=vocabulary_of(config.data))
    rows = config.rows
    if topology is not None:
        config = config.replace(mesh=config.mesh.fit(len(tpu_devices(topology))), fake_devices=None)
    mesh = settled(config)
    config.check(mesh.sizes)
    config = config.settled(mesh.sizes)
    staged = config.staged(mesh.sizes)
    # Before anything else asks for a device: it may have to make fake ones.
    made = lower_step(config, cfg, topology).compile() if compiled or topology else None
    sequence, note = config.sequence, ""
    if sequence.attention == "auto":
        here = jax.devices()[0].device_kind, jax.local_device_count()
        sequence, note = settled_sequence(sequence, cfg, mesh.sizes, *here, rows=rows, length=config.data.length)
    specs, rules = checked(
        cfg,
        mesh,
        rows=rows,
        length=config.data.length,
        pipeline=config.pipeline if staged else None,
        sequence=sequence,
        tensor=config.tensor,
        quantise=config.quantise,
    )
    on_device = rows // (mesh.data * mesh.fsdp)
    cuts = microbatches(config.pipeline, config.tensor, mesh.sizes, on_device) if staged else 1
    tx = make(config.optimiser, specs, steps=config.steps)
    optimiser = state_specs(jax.eval_shape(tx.init, abstract(specs)), specs)
    found = explain(
        specs,
        mesh,
        rules,
        rows=rows,
        length=config.data.length,
        compute_dtype=cfg.dtype,
        optimiser=optimiser,
        wire=wire(cfg, config.data.length) if staged else None,
        microbatches=cuts,
        tensor=config.tensor,
        compiled=made,
    )
    return replace(found, text=f"{found.text}\n{note}") if note else found


def wire(cfg, length: int) -> int:
    """Bytes of a token that cross from stage to stage: the residual operator's state, and where FREE's distillation is on the
    exit's beside it. What routers counted is left out, two numbers a row."""
    states = 2 if cfg.exits.at and cfg.exits.loss.distillation else 1
    return states * cfg.residual.wire_bytes(cfg, 1, length) // length


def settled(config: RunConfig) -> MeshConfig:
    """The mesh with all its sizes. One that is given whole needs no devices; "rest" is what this machine has left."""
    if "rest" not in vars(config.mesh).values():
        return config.mesh
    return config.mesh.fit(config.fake_devices or jax.device_count())


def lower_step(config: RunConfig, cfg, topology: str | None = None):
    """The training step of a settled config, traced from shapes alone, to be compiled for this machine's devices or for those
    of a slice."""
    from jaxpar.ahead import lower
    from jaxpar.parallel.mesh import make_mesh
    from jaxpar.program import build
    from jaxpar.start import start
    from jaxpar.state import abstract_state
    from jaxpar.whole_step import whole_step

    # Programs for devices that are not there cannot be read back from disk.
    start(fake_devices=config.fake_devices, compile_cache=config.compile_cache and topology is None)
    mesh = make_mesh(config.mesh, None if topology is None else tpu_devices(topology))
    program = build(
        cfg,
        mesh,
        rows=config.rows,
        length=config.data.length,
        pipeline=config.pipeline,
        sequence=config.sequence,
        tensor=config.tensor,
        quantise=config.quantise,
        staged=config.staged(mesh_sizes(mesh)),
    )
    step = whole_step(config, program)
    state = abstract_state(step, program, jax.random.key(0))
    return lower(step, program, state, config.data.batch, config.data.length)
