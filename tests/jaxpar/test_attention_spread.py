"""Attention kernels on a mesh of several devices: equal to one device, and what is refused."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar import program
from jaxpar.models.config import ModelConfig
from jaxpar.pallas_kernels.dispatch import Implementation
from jaxpar.parallel.mesh import MeshConfig, make_mesh
from jaxpar.parallel.rules import Rules
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.program import build
from jaxpar.programs.attention import Spread
from jaxpar.step import Batch

CFG = ModelConfig(vocabulary=16, layers=2, width=32, heads=4, kv_heads=1, hidden=16, context=16, window=5)
SHARED = Rules().replicate("kv_heads")
ROWS, LENGTH = 4, 16


def mesh_of(text: str):
    config = MeshConfig.parse(text)
    return make_mesh(config, jax.devices()[: np.prod(list(config.sizes.values()))])


@pytest.fixture
def interpreted(monkeypatch):
    """Named kernels run in the interpreter, wherever a model is built."""
    refusal = Implementation.refusal
    monkeypatch.setattr(
        Implementation, "refusal", lambda one, a, o, interpret=False: refusal(one, a, o, interpret=one.kernel)
    )
    monkeypatch.setattr(program, "Spread", partial(Spread, interpret=True))


def gradients(name: str, mesh: str, attention: str = "ring"):
    cfg, kind = CFG.replace(attention_implementation=name), SequenceConfig(attention, layout="contiguous")
    built = build(cfg, mesh_of(mesh), SHARED, rows=ROWS, length=LENGTH, sequence=kind)
    rng = np.random.default_rng(0)
    tokens = lambda: rng.integers(0, 16, (ROWS, LENGTH)).astype(np.int32)
    # Two documents and padding.
    segments = np.broadcast_to(np.repeat(np.array([1, 2, 0], np.int32), [6, 8, 2]), (ROWS, LENGTH))
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    weights = (segments > 0).astype(np.float32)
    batch = Batch(tokens(), tokens(), weights, positions, segments, np.arange(ROWS, dtype=np.int32))
    batch = jax.device_put(batch, built.batch_sharding)
    args = built.init(jax.random.key(0)), batch, jax.random.key(1)
    run = jax.jit(lambda *x: built.grad_fn(*x[:2], None, x[2])).trace(*args)
    found = run.lower().compile()(*args)
    kernels = set(re.findall(r"name=attention_(forward|backward_\w)\b", str(run.jaxpr)))
    return jax.device_get((found.loss_sum, found.grads)), kernels


@cache
def on_one_device():
    return gradients("xla", "data=1")[0]


@pytest.mark.parametrize(
    ("mesh", "attention"),
    [
        ("data=2,fsdp=2,tensor=2", "ring"),
        ("data=2,fsdp=2,sequence=2", "ring"),
        ("data=2,sequence=2", "ulysses"),
        ("stage=2,sequence=2", "ring"),
        ("stage=2,sequence=2", "hybrid"),  # whose ring has one device
    ],
)
def test_the_kernel_on_several_devices_is_xla_on_one(interpreted, mesh, attention):
    """Rows over data and fsdp, heads over tensor, one key/value head for two devices; tokens beside rows, and in stages, where
    a hybrid has two axes in place of one; forwards and backwards."""
    ((kernel_loss, kernel_grads), kernels), (loss, grads) = gradients("mosaic_tpu", mesh, attention), on_one_device()
    assert kernels == {"forward", "backward_q", "backward_k"}
    np.testing.assert_allclose(kernel_loss, loss, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(kernel_grads), strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=3e-6 * max(np.abs(one).max(), 1e-3))


@pytest.mark.quick
def test_rows_and_heads_that_do_not_divide_are_said():
    spread = Spread(mesh_of("data=2,tensor=4"), Rules())
    shape = lambda rows, heads: jax.ShapeDtypeStruct((rows, 16, heads, 8), jnp.float32)
    q, k, v = spread.shares(shape(4, 8), shape(4, 2), shape(4, 2))
    assert (q.shape, k.shape, v.shape) == ((2, 16, 2, 8), (2, 16, 1, 8), (2, 16, 1, 8))
    for rows, heads, words in (
        (3, 8, r"takes whole rows, and 3 do not divide over data\(2\); use a multiple of 2"),
        (
            4,
            6,
            r"takes whole heads, and 6 query heads do not divide over tensor\(4\); use 3 instead of 4 devices there",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            spread(*(jnp.zeros((rows, 16, n, 8)) for n in (heads, 2, 2)), mask=None, implementation="mosaic_tpu")


@pytest.mark.quick
def test_kernels_are_refused_where_the_compiler_would_split_them(interpreted):
    cfg = CFG.replace(attention_implementation="mosaic_tpu", kv_heads=2)
    fix = r"use \"xla\", or tensor.products = \"gathered\""
    for mesh, words in (
        ("data=2,sequence=2,tensor=2", rf"data\(2\) × tensor\(2\) where tokens lie on several devices; {fix}"),
        ("stage=2,tensor=2", rf"split over tensor\(2\) inside of a pipeline; {fix}"),
    ):
        with pytest.raises(ValueError, match=words):
            build(cfg, mesh_of(mesh), rows=ROWS, length=LENGTH)
    with pytest.raises(ValueError, match=r'"rsa" holds whole rows of scores; use "xla", or another kind'):
        build(cfg, mesh_of("sequence=2"), rows=ROWS, length=LENGTH, sequence=SequenceConfig("rsa"))
    with pytest.raises(ValueError, match=r"split over stage\(2\) where tokens lie .* or a mesh without stage"):
        build(cfg, mesh_of("stage=2,sequence=2"), rows=ROWS, length=LENGTH, staged=False)
