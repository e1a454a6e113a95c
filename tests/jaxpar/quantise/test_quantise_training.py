"""Training in number formats: what is multiplied, on meshes and one device, and what does not fit."""

import dataclasses
from functools import cache

import jax
import pytest

from jaxpar import options, serialise
from jaxpar.config import RunConfig
from jaxpar.experiments.parity.compare import LLAMA, batch_of, errors, run
from jaxpar.models import decoder
from jaxpar.models.context import Context, Ops
from jaxpar.pallas_kernels.formats import get
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.tensor.config import TensorConfig
from jaxpar.presets import PRESETS
from jaxpar.quantise.training import Quantise

CFG = LLAMA.replace(layers=2)
GROUPS = Quantise("int8_g16")
MESH = MeshConfig.parse


@cache
def one_device(quantise):
    return run(CFG, MeshConfig(), quantise=quantise)


@pytest.mark.parametrize(
    ("mesh", "tensor"),
    [("data=2,tensor=2", TensorConfig()), ("fsdp=2,tensor=2", TensorConfig("gathered"))],
    ids=["partitioned", "by hand"],
)
def test_a_mesh_is_one_device(mesh, tensor, devices):
    """But for values that sums in another order push over the edge between two codes."""
    expected, plain = one_device(GROUPS), one_device(None)
    found = run(CFG, MESH(mesh), quantise=GROUPS, tensor=tensor)
    off = {name: error for name, (error, _) in errors(found, expected).items()}
    rounding = {name: error for name, (error, _) in errors(expected, plain).items()}
    assert off["losses"] < 5e-4
    assert rounding["gradients"] > 0.01
    assert off["gradients"] < rounding["gradients"] / 10


@pytest.mark.quick
def test_products_of_layers_are_quantised_and_nothing_else():
    """Six products a layer with three quantised dot products each; the head's operands are the compute dtype's."""
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Listening:
        inner: object

        def __call__(self, x, w, contract=1):
            seen.append((w.shape, self.inner.operands))
            return self.inner(x, w, contract)

    ops = Quantise("mxint8", "mxfp8").ops(Ops())
    ops = dataclasses.replace(ops, matmul=Listening(ops.matmul))
    batch = batch_of(0, length=32)
    params = jax.eval_shape(lambda: decoder.init(CFG.replace(layer_loop="unroll", layers=1), jax.random.key(0)))
    cfg = CFG.replace(layer_loop="unroll", layers=1)
    loss = lambda params: decoder.loss(cfg, params, batch.tokens, batch.targets, None, Context(ops=ops)).loss_sum
    jax.eval_shape(loss, params)
    D, F = cfg.width, cfg.hidden
    assert sorted(shape for shape, _ in seen) == sorted(
        [(D, 16, 4), (D, 8, 4), (D, 8, 4), (16, 4, D), (D, F), (D, F), (F, D)]
    )
    operands = {how for _, how in seen}
    assert {(how.inputs, how.weights, how.gradients) for how in operands} == {
        (get("mxint8"), get("mxint8"), get("mxfp8"))
    }


@pytest.mark.quick
def test_options_read_and_write_it():
    config = options.parse(PRESETS["tiny"](), ["--quantise", "mxint8", "--quantise.backward", "none"], prog="t")
    assert config.quantise == Quantise("mxint8", "none")
    asymmetric = options.parse(PRESETS["tiny"](), ["--quantise", "mxint8", "--quantise.no-symmetric"], prog="t")
    assert [fmt.element.symmetric for fmt in asymmetric.quantise.formats()] == [False, False]
    assert serialise.from_json(RunConfig, serialise.to_json(config)) == config
    assert options.parse(config, ["--quantise", "none"], prog="t").quantise is None


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Quantise("mxfp9"), "unknown number format 'mxfp9'; did you mean mxfp"),
        (lambda: Quantise("mxfp8", "mxfq4"), "unknown number format 'mxfq4'"),
        (lambda: Quantise("mxfp8", symmetric=False), "nothing that 'asymmetric' changes"),
        (lambda: Quantise(rotate=24), "rotate = 24.*power of two"),
    ],
)
def test_formats_that_are_none(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("quantise", "cfg", "sizes", "tensor", "length", "words"),
    [
        (Quantise(), {"width": 48}, {}, TensorConfig(), 32, "model.width = 48: mxfp8_e4m3 .* 32 or 64"),
        (Quantise(), {"hidden": 80}, {}, TensorConfig(), 32, "model.hidden = 80: .* 64 or 96"),
        (Quantise(), {}, {}, TensorConfig(), 24, "data.length = 24: .* 32"),
        (Quantise(), {}, {"sequence": 2}, TensorConfig(), 32, "data.length on each of 2 devices = 16"),
        (Quantise(), {}, {"tensor": 2}, TensorConfig("gathered"), 32, "kv_heads × .* on each of 2 devices = 16"),
        (Quantise(), {}, {"tensor": 2}, TensorConfig("ring"), 32, "'ring' .* no number formats; .* 'gathered'"),
        (Quantise("nvfp4"), {}, {"stage": 2}, TensorConfig(), 32, "nvfp4 has a scale for a whole tensor, .* axis stage"),
        (Quantise("int8_row"), {}, {"sequence": 2}, TensorConfig(), 32, "whole row, .* axis sequence"),
        (Quantise(rotate=64), {}, {}, TensorConfig(), 32, "rotate = 64 does not divide model.width = 32; take at most 32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(quantise, cfg, sizes, tensor, length, words):
    sizes = {axis: 1 for axis in ("data", "fsdp", "tensor", "sequence", "stage")} | sizes
    with pytest.raises(ValueError, match=words):
        quantise.check(CFG.replace(**cfg), sizes, tensor, length)


@pytest.mark.quick
def test_what_fits_is_let_through():
    sizes = {axis: 1 for axis in ("data", "fsdp", "tensor", "sequence", "stage")}
    for quantise in (Quantise(), Quantise("nvfp4"), Quantise("int8_row", "none"), Quantise("mxint4", rotate=32)):
        quantise.check(CFG, sizes, TensorConfig(), 32)
    Quantise("mxfp8", "none").check(CFG, sizes, TensorConfig(), 24)
    GROUPS.check(CFG, sizes | {"tensor": 2, "stage": 2}, TensorConfig("gathered"), 16)
