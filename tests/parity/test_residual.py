"""Residual operators on meshes: the same loss, gradients and parameters as on one device. A part of what `matrix` can run."""

import pytest

from jaxpar.config import RunConfig
from jaxpar.errors import UserError
from jaxpar.experiments.parity.compare import MODELS, reference, run, too_large
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.parallel.tensor.config import TensorConfig
from jaxpar.program import checked
from jaxpar.skipping.config import LayerDrop


@pytest.mark.parametrize(
    ("model", "mesh", "products"),
    [
        ("attention residuals", "data=2,fsdp=2,tensor=2", "whole"),
        ("hyper-connections", "fsdp=2,tensor=2", "sharded"),
        ("mudd", "fsdp=2,tensor=2", "weave"),
        ("attention residuals, blocks", "sequence=2,tensor=2", "ring"),
        ("attention residuals, blocks", "fsdp=2,tensor=2", "weave"),
        ("attention residuals", "data=2,stage=2", "whole"),
        ("attention residuals, blocks", "stage=2,tensor=2", "gathered"),
        ("deep delta over tokens", "stage=2,tensor=2", "gathered"),
        ("mudd", "stage=3", "whole"),
    ],
)
def test_a_residual_operator_on_a_mesh_is_the_single_device_run(model, mesh, products, devices):
    """Over stages the payload is the operator's state: static shapes, every slot of its sources. Earlier
    tokens that an operator looks at come from the device that has them."""
    found = run(MODELS[model], MeshConfig.parse(mesh), tensor=TensorConfig(products))
    assert not too_large(found, reference(model))


@pytest.mark.parametrize(
    ("model", "mesh", "sequence", "products"),
    [
        ("deep delta over tokens", "sequence=4", SequenceConfig(layout="contiguous"), "whole"),
        ("short window", "data=2,sequence=4", SequenceConfig(), "whole"),
        ("short window", "sequence=4", SequenceConfig(layout="striped"), "whole"),
        ("short window", "sequence=4", SequenceConfig("hybrid", layout="striped"), "whole"),
        ("deep delta over tokens", "stage=2,sequence=2", SequenceConfig(), "whole"),
        ("deep delta over tokens", "sequence=2,tensor=2", SequenceConfig(), "gathered"),
    ],
    ids=lambda x: f"{x.attention}, {x.layout}" if isinstance(x, SequenceConfig) else x,
)
def test_earlier_tokens_on_other_devices_are_those_of_the_single_device_run(model, mesh, sequence, products, devices):
    """Packed documents, in every layout. On four devices a zigzag piece has 2 tokens, fewer than an operator's 3 before."""
    found = run(MODELS[model], MeshConfig.parse(mesh), sequence=sequence, tensor=TensorConfig(products))
    assert not too_large(found, reference(model))


@pytest.mark.quick
@pytest.mark.parametrize("schedule", ["skippipe", "checkfree+"])
def test_stages_that_are_skipped_or_swapped_are_refused_where_every_layer_is_a_source(schedule):
    how = dict(rows=8, length=16, pipeline=PipelineConfig(schedule, 4))
    sizes = MeshConfig.parse("stage=4").sizes
    with pytest.raises(ValueError, match=r"MuddFormer reads a source of every layer before it.*swaps.*DeepDelta"):
        checked(MODELS["mudd"], sizes, **how)
    checked(MODELS["deep delta"], sizes, **how)


@pytest.mark.quick
def test_skipped_layers_are_refused_where_every_layer_is_a_source():
    sizes = MeshConfig().sizes
    run = RunConfig(model=MODELS["mudd"], skipping=LayerDrop())
    with pytest.raises(UserError, match="MuddFormer reads a source of every layer before it"):
        run.check(sizes)
    run.replace(model=MODELS["deep delta"]).check(sizes)
