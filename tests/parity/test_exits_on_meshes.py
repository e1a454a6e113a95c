"""Exits trained on meshes: the same objective, gradients and parameters as on one device."""

import jax
import numpy as np
import pytest

from jaxpar.config import RunConfig
from jaxpar.errors import UserError
from jaxpar.experiments.parity.compare import MODELS, STEPS, reference, run, too_large
from jaxpar.models import decoder
from jaxpar.models.context import Context
from jaxpar.models.exits.config import Exits, Free
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.pipeline.split import Split
from jaxpar.program import checked
from jaxpar.programs.pipeline import straight
from jaxpar.programs.stages import parts_of
from jaxpar.skipping.config import LayerSkipDropout, SwapEnds
from jaxpar.step import Batch

EXITS = MODELS["exits"]


def test_exits_on_a_mesh_are_the_single_device_run(devices):
    """Adapters, and a distillation beside the losses."""
    found = run(EXITS, MeshConfig.parse("data=2,fsdp=2,tensor=2"))
    assert not too_large(found, reference("exits"))


def test_exits_inside_of_stages_are_the_single_device_run(devices):
    """The losses at each exit too, with adapters of their own, and weights that change from step to step. Five layers on four
    stages: two exits on one of them, one on another, none on two."""
    how = PipelineConfig("zb-v", 4, ticks="mixed", keep="residuals")
    found = run(MODELS["exits in stages"], MeshConfig.parse("stage=2,data=2"), pipeline=how)
    assert np.shape(found[1]) == (STEPS, 1 + 4)
    assert not too_large(found, reference("exits in stages"))


@pytest.mark.parametrize(
    ("mesh", "how"),
    [
        # Chunk after chunk: between the exit and the end lie three boundaries.
        ("stage=2,data=2", PipelineConfig("interleaved", 4)),
        ("stage=2", PipelineConfig("gpipe", 4, executor="autodiff")),
    ],
    ids=["interleaved", "autodiff"],
)
def test_an_exit_is_drawn_to_the_last_layer_of_another_stage(mesh, how, devices):
    found = run(EXITS, MeshConfig.parse(mesh), pipeline=how)
    assert not too_large(found, reference("exits"))


@pytest.mark.parametrize(
    ("model", "how"),
    [
        ("exits, routers", PipelineConfig("1f1b", 4)),  # drawn to the last layer too
        ("exits, mixture of depths", PipelineConfig("zb-v", 4, ticks="mixed", keep="residuals")),
    ],
)
def test_routers_beside_exits_inside_of_stages_are_the_single_device_run(model, how, devices):
    found = run(MODELS[model], MeshConfig.parse("stage=2"), pipeline=how)
    assert not too_large(found, reference(model))


@pytest.mark.quick
def test_an_exits_state_crosses_boundaries_only_where_it_is_drawn_to_the_last():
    """In bytes: one more of the operator's wire."""
    batch = Batch(*(jax.ShapeDtypeStruct((2, 16), np.int32) for _ in range(5)), jax.ShapeDtypeStruct((2,), np.int32))
    params = jax.eval_shape(lambda: decoder.init(EXITS, jax.random.key(0)))

    def sent(distill):
        cfg = EXITS.replace(dropout=0.0, exits=Exits((1,), EXITS.exits.head, Free(distill)))
        context = lambda micro: Context(micro.positions, micro.segments)
        parts = parts_of(cfg, Split(4, straight(2)), context, np.ones(2, np.float32))
        message = jax.tree.leaves(jax.eval_shape(parts.first, params, batch))
        return sum(x.size * x.dtype.itemsize for x in message)

    wire = EXITS.residual.wire_bytes(EXITS, 2, 16)
    assert (sent(0.0), sent(0.5)) == (wire, 2 * wire)


@pytest.mark.quick
def test_paths_of_their_own_are_refused_before_tracing():
    how = lambda schedule: dict(rows=8, length=16, pipeline=PipelineConfig(schedule, 4))
    sizes = MeshConfig.parse("stage=4").sizes
    with pytest.raises(
        ValueError, match=r"microbatch \d visits stages \(1, 0, 3, 2\) of 4; take one where all visit each"
    ):
        checked(EXITS, sizes, **how("checkfree+"))
    checked(EXITS, sizes, **how("gpipe"))


@pytest.mark.quick
def test_layers_in_another_order_are_refused_and_layers_left_out_are_not():
    sizes = MeshConfig().sizes
    config = RunConfig(model=EXITS, skipping=SwapEnds(stages=4))
    with pytest.raises(UserError, match="are places in the stack, and swap-ends runs other layers in other places"):
        config.check(sizes)
    config.replace(skipping=LayerSkipDropout()).check(sizes)
