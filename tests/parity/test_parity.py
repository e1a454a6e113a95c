"""Parallel equals single-device: loss, gradients, and parameters after three steps, for every mesh of eight devices.

The matrix grows with the project: a new axis is a row of meshes, a new model feature a new entry of MODELS. This is the
part that `make test` has time for; `python -m jaxpar.experiments.parity.matrix` runs all of it.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.experiments.parity.compare import (
    LLAMA,
    MODELS,
    OPTIMISER,
    ROWS,
    STEPS,
    batch_of,
    fresh_state,
    reference,
    run,
    too_large,
)
from jaxpar.optimisers import make
from jaxpar.parallel.mesh import AXES, MeshConfig, factorisations, make_mesh
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.parallel.tensor.config import TensorConfig
from jaxpar.program import build
from jaxpar.state import abstract_state
from jaxpar.steps.base import make_step

MESH = MeshConfig.parse
GSPMD = ("data", "fsdp", "tensor")
# Every factorisation of eight devices over the partitioner's axes; the others alone, and in a pair with each axis.
PARTITIONED = [MeshConfig(**dict(zip(GSPMD, sizes, strict=True))) for sizes in factorisations(8, len(GSPMD))]
BY_HAND = [
    MESH(text)
    for text in (
        "stage=8",
        "sequence=8",
        "data=2,stage=4",
        "data=2,stage=2,tensor=2",
        "data=2,fsdp=2,sequence=2",
        "stage=2,fsdp=2,sequence=2",
        "stage=2,sequence=2,tensor=2",
    )
]


def assert_equal(found, expected):
    assert not too_large(found, expected)


@pytest.mark.parametrize("mesh", PARTITIONED + BY_HAND, ids=str)
def test_a_mesh_is_the_single_device_run(mesh, devices):
    assert_equal(run(MODELS["llama"], mesh), reference("llama"))


def test_the_meshes_have_every_pair_of_axes():
    used = [{axis for axis, size in mesh.sizes.items() if size > 1} for mesh in PARTITIONED + BY_HAND]
    assert all(any({a, b} <= axes for axes in used) for a in AXES for b in AXES)


@pytest.mark.parametrize("mesh", [*PARTITIONED, MESH("data=2,stage=2,sequence=2")], ids=str)
def test_another_family_on_meshes(mesh, devices):
    assert_equal(run(MODELS["gpt2"], mesh), reference("gpt2"))


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "fsdp=2,sequence=2", "data=2,stage=2,sequence=2"])
def test_features_on_meshes(mesh, devices):
    """Windows, dropout keyed by sample and token, untied embeddings, QK norm, rematerialisation."""
    name = "windows, dropout, untied"
    assert_equal(run(MODELS[name], MESH(mesh)), reference(name))


@pytest.mark.parametrize(
    ("attention", "layout", "mesh"),
    [
        ("ring_bidirectional", "contiguous", "data=2,sequence=4"),
        ("tokenring", "striped", "sequence=4"),
        ("rsa", "zigzag", "stage=2,sequence=2"),
        ("ulysses", "zigzag", "sequence=4,tensor=2"),
        ("hybrid", "zigzag", "stage=2,sequence=4"),
        ("hybrid", "striped", "stage=2,sequence=2"),  # whose ring has one device
        ("hybrid", "contiguous", "data=2,sequence=4"),
    ],
)
def test_every_kind_of_sequence_attention(attention, layout, mesh, devices):
    """The ring in zigzag is the default."""
    assert_equal(run(LLAMA, MESH(mesh), sequence=SequenceConfig(attention, layout=layout)), reference("llama"))


@pytest.mark.parametrize(
    ("pipeline", "mesh"),
    [
        (PipelineConfig("gpipe", 4, executor="autodiff"), "stage=4"),
        (PipelineConfig("1f1b", 4, keep="residuals"), "stage=2,fsdp=2"),
        (PipelineConfig("interleaved", 4, chunks=2), "stage=2,data=2,sequence=2"),
        (PipelineConfig("zb-h1", 4, ticks="mixed"), "stage=2,data=2,tensor=2"),
        (PipelineConfig("zb-v", 4), "stage=4"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.schedule,
)
def test_every_schedule(pipeline, mesh, devices):
    assert_equal(run(LLAMA, MESH(mesh), pipeline=pipeline), reference("llama"))


@pytest.mark.parametrize(
    ("products", "model", "mesh"),
    [
        ("sharded", "llama", "data=2,fsdp=2,tensor=2"),
        ("gathered", "llama", "data=2,fsdp=2,tensor=2"),
        ("ring", "llama", "data=2,fsdp=2,tensor=2"),
        ("weave", "llama", "data=2,fsdp=2,tensor=2"),
        ("ring", "llama", "tensor=4"),
        ("gathered", "gpt2", "data=2,tensor=2"),
        ("ring", "windows, dropout, untied", "fsdp=2,tensor=2"),
        ("weave", "windows, dropout, untied", "fsdp=2,tensor=2"),
        ("ring", "gpt2", "stage=2,tensor=2"),
        ("weave", "llama", "stage=2,tensor=2"),
        ("ring", "llama", "sequence=2,tensor=2"),
    ],
)
def test_every_form_of_products_over_the_tensor_axis(products, model, mesh, devices):
    """Tokens whole on every device (one all-reduce a branch) is the default."""
    assert_equal(run(MODELS[model], MESH(mesh), tensor=TensorConfig(products)), reference(model))


@pytest.mark.parametrize("stages", [2, 3])
def test_uneven_stages(stages, devices):
    """Seven layers divide over neither: some stages have one more."""
    assert_equal(run(MODELS["seven layers"], MESH(f"stage={stages}")), reference("seven layers"))


def test_accumulation_on_a_mesh_is_the_whole_batch(devices):
    assert_equal(run(LLAMA, MeshConfig(data=2, tensor=2), microbatches=4), reference("llama"))


def test_accumulation_around_a_pipeline(devices):
    assert_equal(run(LLAMA, MESH("data=2,stage=2"), microbatches=2), reference("llama"))


def test_the_comparison_can_fail(devices):
    """A model that differs by one epsilon is told apart."""
    other = dataclasses.replace(LLAMA, norm=dataclasses.replace(LLAMA.norm, epsilon=1e-2))
    with pytest.raises(AssertionError):
        assert_equal(run(other, MeshConfig(data=2)), reference("llama"))


@pytest.mark.quick
def test_sample_weights_and_layer_scales_are_data(devices):
    """`Control` changes from step to step without another compile, and is the same on a mesh."""
    from jaxpar.step import Control

    def losses(mesh_config):
        mesh = make_mesh(mesh_config, jax.devices()[: np.prod(list(mesh_config.sizes.values()))])
        program = build(LLAMA, mesh, rows=ROWS)
        tx = make(OPTIMISER, program.specs, steps=STEPS)
        step = make_step(program.grad_fn, tx)
        places = jax.tree.map(lambda x: x.sharding, abstract_state(step, program, jax.random.key(1)))
        first = jax.device_put(fresh_state(LLAMA, step), places)
        traced = []

        @partial(jax.jit, out_shardings=(places, None))
        def update(*args):
            traced.append(args)
            return step.update(*args)

        state = first
        found = []
        for i in range(STEPS):
            control = Control(jnp.linspace(0.0, 1.0 + i, ROWS), jnp.asarray([1.0] + [0.0] * 7))
            batch = jax.tree.map(lambda x: jax.device_put(x, program.batch_sharding), batch_of(i))
            state, metrics = update(state, batch, control)
            found.append(float(metrics["loss"]))
        assert len(traced) == 1
        frozen = jax.tree.map(
            lambda a, b: np.array_equal(a[1], b[1]),
            *[jax.device_get(p["layers"]) for p in (state.params, first.params)],
        )
        assert all(jax.tree.leaves(frozen)), "a layer whose learning rate was scaled by zero has moved"
        return found

    np.testing.assert_allclose(losses(MeshConfig(data=4)), losses(MeshConfig()), rtol=2e-6)
