"""Generation with weights quantised once."""

import jax
import numpy as np
import pytest

from jaxpar import generation, options
from jaxpar.commands.generate import GenerateConfig
from jaxpar.errors import UserError
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Ops
from jaxpar.models.feedforward.dense import MLP
from jaxpar.models.norms import LayerNorm
from jaxpar.models.positions import Learned
from jaxpar.pallas_kernels import versions
from jaxpar.pallas_kernels.formats import Quantised, dequantise
from jaxpar.quantise.choose import parse
from jaxpar.quantise.fmpq import Fmpq
from jaxpar.quantise.weights import QuantisedWeights

LLAMA = ModelConfig(vocabulary=61, layers=2, width=32, heads=4, kv_heads=2, hidden=64, context=128, init_std=0.3)
GPT2 = LLAMA.replace(
    kv_heads=4, norm=LayerNorm(), positions=Learned(), feedforward=MLP(), qkv_bias=True, layer_loop="unroll"
)
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [58]]


@pytest.mark.parametrize(("cfg", "name"), [(LLAMA, "w4g32a16"), (GPT2, "w8a16")], ids=["llama", "gpt2"])
def test_weight_only_generation_is_that_of_the_rounded_weights(cfg, name):
    params = jax.jit(decoder.init, static_argnums=0)(cfg, jax.random.key(0))
    quantised = parse(name).apply(cfg, params)
    value = lambda q, p: dequantise(q).reshape(p.shape) if isinstance(q, Quantised) else q
    rounded = jax.tree.map(value, quantised, params, is_leaf=lambda x: isinstance(x, Quantised))
    assert not np.array_equal(
        rounded["layers"]["attention"]["out"]["kernel"], params["layers"]["attention"]["out"]["kernel"]
    )
    found = generation.generate(cfg, quantised, PROMPTS, new_tokens=12)
    assert found == generation.generate(cfg, rounded, PROMPTS, new_tokens=12)


def test_activations_are_rounded_too():
    """Logits with 8-bit activations are close, with 4-bit ones less so, and neither is what the weights alone give."""
    params = jax.jit(decoder.init, static_argnums=0)(LLAMA, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, 61, (2, 16), np.int32)
    from jaxpar.models.context import Context

    def logits(how):
        p, ops = (params, Ops()) if how is None else (how.apply(LLAMA, params), how.ops(Ops()))
        run = jax.jit(lambda p: decoder.apply(LLAMA, p, tokens, Context(ops=ops)).logits)
        return np.asarray(run(p), np.float64)

    exact = logits(None)
    off = {n: np.linalg.norm(logits(parse(n)) - exact) / np.linalg.norm(exact) for n in ("w8a16", "w8a8", "w4g32a4")}
    assert 1e-4 < off["w8a16"] < off["w8a8"] < 0.1 < off["w4g32a4"] < 1


def test_weights_lie_on_gpus_as_products_of_eight_bits_take_them(monkeypatch):
    """Where activations have 8 bits too; tokens are what they are elsewhere."""
    params = jax.jit(decoder.init, static_argnums=0)(LLAMA, jax.random.key(0))
    how = parse("w8a8")
    here = how.apply(LLAMA, params)
    monkeypatch.setattr(versions, "platforms", lambda: ("cpu", "cuda"))
    laid, alone = how.apply(LLAMA, params), parse("w8a16").apply(LLAMA, params)
    monkeypatch.undo()
    order = lambda p, name: p["layers"]["attention"][name]["kernel"].codes.format.layout.major_to_minor
    assert [order(laid, name) for name in ("query", "out")] == [(2, 3, 0, 1), (2, 0, 1)]
    assert {order(p, "query") for p in (here, alone)} == {(0, 1, 2, 3)}
    generate = lambda p: generation.generate(LLAMA, p, PROMPTS, new_tokens=12, ops=how.ops(Ops()))
    assert generate(laid) == generate(here)


@pytest.mark.quick
def test_bytes_shrink_as_the_format_says():
    cfg = LLAMA.replace(width=256, heads=2, head_size=128, hidden=512)
    params = jax.jit(decoder.init, static_argnums=0)(cfg, jax.random.key(0))
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree["layers"]["feedforward"]["up"]))
    before = size(params)
    assert size(parse("w4a16").apply(cfg, params)) == before * (4 + 32 / 128) / 32
    assert size(parse("mxfp8").apply(cfg, params)) == before * 8.25 / 32


@pytest.mark.quick
def test_words_and_what_they_stand_for():
    assert parse("w8a16") == QuantisedWeights("int8_row")
    assert parse("w4a8") == QuantisedWeights("int4_g128", "int8_row")
    assert parse("w4g32a4") == QuantisedWeights("int4_g32", "int4_g32")
    assert parse("mxfp4") == QuantisedWeights("mxfp4", "mxfp4")
    assert parse("w4a4kv4") == QuantisedWeights("int4_g128", "int4_g128", "int4_g32")
    assert parse("w16a16kv8") == QuantisedWeights(cache="int8_row")
    assert parse("w4g64axkv4g16") == Fmpq(block=64, cache="int4_g16")
    config = options.parse(GenerateConfig(), ["--quantise", "w8a8"], prog="t")
    assert config.quantise == QuantisedWeights("int8_row", "int8_row")
    for text, words in (
        ("w5a16", "w5a16.*w8a16, w4a16"),
        ("mxfp9", "unknown number format 'mxfp9'; did you mean mxfp"),
    ):
        with pytest.raises(ValueError, match=words):
            parse(text)


@pytest.mark.quick
def test_what_cannot_be_quantised_is_told():
    params = jax.jit(decoder.init, static_argnums=0)(LLAMA, jax.random.key(0))
    with pytest.raises(UserError, match=r"width = 32: int4_g128 .* 128 .*w4g32a16"):
        parse("w4a16").apply(LLAMA, params)
    up = params["layers"]["feedforward"]["up"]
    broken = {**params["layers"]["feedforward"], "up": {"kernel": up["kernel"].at[1, 3, 5].set(np.nan)}}
    with pytest.raises(ValueError, match=r"layers/feedforward/up/kernel: .*1 of its 4096 values .* \(1, 3, 5\)"):
        parse("w8a16").apply(LLAMA, {**params, "layers": {**params["layers"], "feedforward": broken}})
