"""Routed models on meshes: the same loss, gradients and parameters as on one device, chance and routers included."""

import pytest

from jaxpar.experiments.parity.compare import MODELS, reference, run, too_large
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.tensor.config import TensorConfig
from jaxpar.program import checked


@pytest.mark.parametrize(
    ("model", "mesh", "products"),
    [
        ("two modules", "stage=2,tensor=2", "ring"),
        ("two modules, routers", "data=2,fsdp=2,tensor=2", "whole"),
        ("two modules, routers", "stage=3", "whole"),  # four layers: some stages have one more
        (
            "two modules, routers",
            "sequence=2,tensor=2",
            "weave",
        ),  # a row's tokens on four devices, its rows in two parts
        ("two modules, routers", "stage=2,tensor=2", "gathered"),
        (
            "mixture of depths",
            "stage=2,tensor=2",
            "weave",
        ),  # five picked of sixteen: on two devices one more runs along
    ],
)
def test_a_routed_model_on_a_mesh_is_the_single_device_run(model, mesh, products, devices):
    found = run(MODELS[model], MeshConfig.parse(mesh), tensor=TensorConfig(products))
    assert not too_large(found, reference(model))


@pytest.mark.quick
def test_gradients_of_waiting_stages_are_refused_before_tracing():
    """Differentiating a pipeline as a whole would add the predictors' losses of ticks in which a stage has nothing."""
    pipeline = PipelineConfig("gpipe", 4, executor="autodiff")
    with pytest.raises(ValueError, match="differentiates what waiting stages compute too, and mixture of depths puts"):
        checked(MODELS["mixture of depths"], MeshConfig.parse("stage=2").sizes, rows=8, length=16, pipeline=pipeline)
