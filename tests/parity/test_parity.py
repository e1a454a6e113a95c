"""Parallel equals single-device: loss, gradients, and parameters after three steps, for every mesh of eight devices.

The matrix grows with the project: a new axis is a new row of MESHES, a new model feature a new entry of MODELS.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.feedforward.dense import MLP
from jaxpar.models.norms import LayerNorm
from jaxpar.models.positions import Learned
from jaxpar.models.spec import path_name
from jaxpar.optimisers import make
from jaxpar.optimisers_config import AdamW, Constant
from jaxpar.parallel.mesh import AXES, MeshConfig, make_mesh
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.program import build
from jaxpar.state import abstract_state
from jaxpar.step import Batch, chain
from jaxpar.steps.accumulate import accumulate
from jaxpar.steps.base import make_step
from jaxpar.steps.clip import clip_global

LLAMA = ModelConfig(vocabulary=64, layers=8, width=32, heads=16, kv_heads=8, head_size=4, hidden=64, init_std=0.1)
MODELS = {
    "llama": LLAMA,
    "gpt2": LLAMA.replace(
        kv_heads=16, norm=LayerNorm(), positions=Learned(), feedforward=MLP(), qkv_bias=True, attention_out_bias=True
    ),
    "windows, dropout, untied": LLAMA.replace(
        window=5, window_pattern=(True, False), dropout=0.2, tied_embeddings=False, qk_norm=True, remat="full"
    ),
    "seven layers": LLAMA.replace(layers=7),
}
MESH = MeshConfig.parse
# Each axis alone, and every pair of axes. All 35 factorisations of 8 are in the longer command.
MESHES = [
    *[f"{axis}=8" for axis in AXES],
    "data=2,stage=2,tensor=2",
    "data=2,fsdp=2,sequence=2",
    "stage=2,fsdp=2,sequence=2",
    "data=2,stage=4",
    "data=2,fsdp=2,tensor=2",
    "sequence=4,tensor=2",
    "stage=2,sequence=2,tensor=2",
]
# A large epsilon, so that a gradient that is nothing but rounding does not become a step of full size.
OPTIMISER = AdamW(schedule=Constant(1e-2), epsilon=1e-3)
ROWS, LENGTH, STEPS = 8, 16, 3


def batch_of(step: int) -> Batch:
    """Packed rows: two documents and some padding, with unequal token weights."""
    draw = np.random.default_rng(step)
    tokens = draw.integers(0, 64, (ROWS, LENGTH + 1), np.int32)
    first = draw.integers(4, 10, ROWS)
    at = np.arange(LENGTH, dtype=np.int32)[None]
    second = at >= first[:, None]
    segments = np.where(at >= LENGTH - 2, 0, 1 + second).astype(np.int32)
    positions = np.where(second, at - first[:, None], at).astype(np.int32)
    weights = (segments > 0) * draw.uniform(0.5, 1.5, (ROWS, LENGTH))
    ids = np.arange(step * ROWS, (step + 1) * ROWS, dtype=np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights.astype(np.float32), positions, segments, ids)


def run(cfg, mesh_config: MeshConfig, microbatches: int = 1, **how):
    """Loss and gradients of the first batch, the losses of three steps, and the parameters behind them."""
    mesh = make_mesh(mesh_config, jax.devices()[: np.prod(list(mesh_config.sizes.values()))])
    program = build(cfg, mesh, rows=ROWS // microbatches, length=LENGTH, **how)
    tx = make(OPTIMISER, program.specs, steps=STEPS)
    step = chain(make_step(program.grad_fn, tx), accumulate(microbatches), clip_global(1.0))
    # The state is made once, without a mesh, and put in place; that `init` is bitwise the same on every mesh has a test
    # of its own. Gradients come out of the very step that uses them: one program a mesh is compiled.
    places = jax.tree.map(lambda x: x.sharding, abstract_state(step, program, jax.random.key(1)))
    state = jax.device_put(fresh_state(cfg, step), places)
    put = lambda batch: jax.tree.map(lambda x: jax.device_put(x, program.batch_sharding), batch)

    @partial(jax.jit, out_shardings=(places, None, None))
    def update(state, batch):
        gradients = step.gradients(state, batch, None)
        new, metrics = step.apply(state, gradients, None)
        return new, metrics["loss"], gradients.mean()

    losses, first = [], None
    for i in range(STEPS):
        state, loss, grads = update(state, put(batch_of(i)))
        losses.append(float(loss))
        first = jax.device_get(grads) if first is None else first
    return first, losses, jax.device_get(state.params)


def fresh_state(cfg, step):
    params = jax.jit(decoder.init, static_argnums=0)(cfg, jax.random.key(0))
    return jax.jit(step.init)(params, jax.random.key(1))


_reference = {}


def reference(name):
    if name not in _reference:
        _reference[name] = run(MODELS[name], MeshConfig())
    return _reference[name]


def assert_equal(found, expected):
    grads, losses, params = found
    np.testing.assert_allclose(losses, expected[1], rtol=2e-6)
    for ours, theirs, tolerance in ((grads, expected[0], 2e-5), (params, expected[2], 2e-4)):
        # A key's bias has no gradient but rounding (the softmax takes it out): measured against the whole tree.
        least = 1e-3 * np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(theirs)))
        for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(ours)[0], jax.tree.leaves(theirs), strict=True):
            error = np.linalg.norm(a - b) / max(np.linalg.norm(b), least)
            assert error < tolerance, f"{path_name(path)}: relative error {error:.1e}"


@pytest.mark.parametrize("mesh", MESHES)
def test_a_mesh_is_the_single_device_run(mesh, devices):
    assert_equal(run(MODELS["llama"], MESH(mesh)), reference("llama"))


def test_the_meshes_have_every_pair_of_axes():
    used = [{axis for axis, size in MESH(mesh).sizes.items() if size > 1} for mesh in MESHES]
    assert all(any({a, b} <= axes for axes in used) for a in AXES for b in AXES)


@pytest.mark.parametrize("mesh", ["fsdp=2,tensor=4", "data=2,stage=2,sequence=2"])
def test_another_family_on_meshes(mesh, devices):
    assert_equal(run(MODELS["gpt2"], MESH(mesh)), reference("gpt2"))


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tensor=2", "sequence=4", "data=2,stage=2,sequence=2"])
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
    ],
)
def test_every_kind_of_sequence_attention(attention, layout, mesh, devices):
    """The ring in zigzag is the default."""
    assert_equal(run(LLAMA, MESH(mesh), sequence=SequenceConfig(attention, layout)), reference("llama"))


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


@pytest.mark.parametrize("stages", [2, 3])
def test_uneven_stages(stages, devices):
    """Seven layers divide over neither: some stages have one more."""
    assert_equal(run(MODELS["seven layers"], MESH(f"stage={stages}")), reference("seven layers"))


def test_accumulation_on_a_mesh_is_the_whole_batch(devices):
    assert_equal(run(LLAMA, MeshConfig(data=2, tensor=2), microbatches=4), reference("llama"))


def test_accumulation_around_a_pipeline(devices):
    assert_equal(run(LLAMA, MESH("data=2,stage=2"), microbatches=2), reference("llama"))


@pytest.mark.quick
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
