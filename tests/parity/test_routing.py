"""Routed models on meshes: the same loss, gradients and parameters as on one device, chance and routers included."""

import pytest

from jaxpar.experiments.parity.compare import MODELS, reference, run, too_large
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.tensor.config import TensorConfig


@pytest.mark.parametrize(
    ("model", "mesh", "products"),
    [
        ("two modules", "stage=2,tensor=2", "ring"),
        ("two modules, routers", "data=2,fsdp=2,tensor=2", "whole"),
    ],
)
def test_a_routed_model_on_a_mesh_is_the_single_device_run(model, mesh, products, devices):
    found = run(MODELS[model], MeshConfig.parse(mesh), tensor=TensorConfig(products))
    assert not too_large(found, reference(model))
