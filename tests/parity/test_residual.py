"""Residual operators on meshes: the same loss, gradients and parameters as on one device. A part of what `matrix` can run."""

import pytest

from jaxpar.experiments.parity.compare import MODELS, reference, run, too_large
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.tensor.config import TensorConfig


@pytest.mark.parametrize(
    ("model", "mesh", "products"),
    [
        ("attention residuals", "data=2,fsdp=2,tensor=2", "whole"),
        ("hyper-connections", "data=2,fsdp=2,tensor=2", "whole"),
        ("deep delta", "fsdp=2,tensor=2", "sharded"),
        ("mudd", "fsdp=2,tensor=2", "whole"),
        ("mudd", "fsdp=2,tensor=2", "weave"),
        ("attention residuals", "sequence=2,tensor=2", "ring"),
        ("attention residuals", "data=2,stage=2", "whole"),
        ("deep delta", "stage=2,fsdp=2", "whole"),
        ("mudd", "stage=3", "whole"),
    ],
)
def test_a_residual_operator_on_a_mesh_is_the_single_device_run(model, mesh, products, devices):
    """Over stages the payload is the operator's state: static shapes, every slot of its sources."""
    found = run(MODELS[model], MeshConfig.parse(mesh), tensor=TensorConfig(products))
    assert not too_large(found, reference(model))
