"""Exits trained on meshes: the same objective, gradients and parameters as on one device."""

import pytest

from jaxpar.config import RunConfig
from jaxpar.errors import UserError
from jaxpar.experiments.parity.compare import MODELS, reference, run, too_large
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.program import checked
from jaxpar.skipping.config import LayerSkipDropout, SwapEnds

EXITS = MODELS["exits"]


def test_exits_on_a_mesh_are_the_single_device_run(devices):
    """Adapters, and a distillation beside the losses."""
    found = run(EXITS, MeshConfig.parse("data=2,fsdp=2,tensor=2"))
    assert not too_large(found, reference("exits"))


@pytest.mark.quick
def test_a_pipeline_is_refused_before_tracing():
    how = dict(rows=8, length=16, pipeline=PipelineConfig("gpipe", 4))
    with pytest.raises(
        ValueError, match=r"model.exits.at = \(1,\) has heads between the layers, and a pipeline of 2 stages"
    ):
        checked(EXITS, MeshConfig.parse("stage=2").sizes, **how)
    checked(EXITS, MeshConfig.parse("data=2").sizes, rows=8, length=16)


@pytest.mark.quick
def test_layers_in_another_order_are_refused_and_layers_left_out_are_not():
    sizes = MeshConfig().sizes
    config = RunConfig(model=EXITS.replace(layers=4), skipping=SwapEnds(stages=4))
    with pytest.raises(UserError, match="are places in the stack, and swap-ends runs other layers in other places"):
        config.check(sizes)
    config.replace(skipping=LayerSkipDropout()).check(sizes)
