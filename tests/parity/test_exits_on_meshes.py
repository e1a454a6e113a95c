"""Exits trained on meshes: the same objective, gradients and parameters as on one device."""

import numpy as np
import pytest

from jaxpar.config import RunConfig
from jaxpar.errors import UserError
from jaxpar.experiments.parity.compare import MODELS, STEPS, reference, run, too_large
from jaxpar.models.exits.config import Exits
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.program import checked
from jaxpar.skipping.config import LayerSkipDropout, SwapEnds

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


@pytest.mark.quick
def test_what_a_pipeline_has_not_at_an_exit_is_refused_before_tracing():
    sizes = MeshConfig.parse("stage=2").sizes
    how = lambda schedule: dict(rows=8, length=16, pipeline=PipelineConfig(schedule, 4))
    with pytest.raises(
        ValueError, match=r"distill = 0.5 draws the exit behind layer 1 to .* in a pipeline of 2 stages"
    ):
        checked(EXITS, sizes, **how("gpipe"))
    checked(EXITS, MeshConfig.parse("data=2").sizes, rows=8, length=16)
    plain = EXITS.replace(exits=Exits((1,)))
    with pytest.raises(
        ValueError, match=r"microbatch \d visits stages \(1, 0, 3, 2\) of 4; take one where all visit each"
    ):
        checked(plain.replace(layers=4), MeshConfig.parse("stage=4").sizes, **how("checkfree+"))
    checked(plain, sizes, **how("gpipe"))


@pytest.mark.quick
def test_layers_in_another_order_are_refused_and_layers_left_out_are_not():
    sizes = MeshConfig().sizes
    config = RunConfig(model=EXITS.replace(layers=4), skipping=SwapEnds(stages=4))
    with pytest.raises(UserError, match="are places in the stack, and swap-ends runs other layers in other places"):
        config.check(sizes)
    config.replace(skipping=LayerSkipDropout()).check(sizes)
