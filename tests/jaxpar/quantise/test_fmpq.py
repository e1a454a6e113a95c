"""COMET's FMPQ: orders of channels that change nothing, blocks with outliers, the mixed product, and 4-bit caches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.errors import UserError
from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.models.feedforward.dense import MLP
from jaxpar.models.norms import LayerNorm
from jaxpar.models.positions import Learned
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.pallas_kernels.formats import dequantise, get, quantise
from jaxpar.pallas_kernels.matmul import Operands, product_reference, quant_matmul
from jaxpar.pallas_kernels.matmul.mixed import Mixed, inputs, mixed_matmul
from jaxpar.quantise.fmpq import Fmpq, Orders, calibrated, orders, permuted, share_of_four

LLAMA = ModelConfig(vocabulary=61, layers=2, width=64, heads=4, kv_heads=2, hidden=96, context=64, init_std=0.1)
GPT2 = LLAMA.replace(
    kv_heads=4, norm=LayerNorm(), positions=Learned(), feedforward=MLP(), qkv_bias=True, attention_out_bias=True,
    norm_placement="pre_post", tied_embeddings=False,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(0, 61, (4, 16), np.int32)
OUTLIERS = [3, 17, 40]


def model(cfg):
    """Parameters whose products read outliers in three channels of the stream and one of each hidden layer, and no
    parameter is symmetric in its channels."""
    params = jax.jit(decoder.init, static_argnums=0)(cfg, jax.random.key(0))
    noise = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(str(path))), x.shape)
    params = jax.tree_util.tree_map_with_path(noise, params)
    for branch in params["layers"].values():
        branch["norm"] = {**branch["norm"], "scale": branch["norm"]["scale"].at[:, jnp.asarray(OUTLIERS)].mul(30.0)}
    up = params["layers"]["feedforward"]["up"]
    up["kernel"] = up["kernel"].at[0, :, 7].mul(20.0).at[1, :, 90].mul(20.0)
    return params


def logits(cfg, params, ops=None):
    run = jax.jit(lambda p: decoder.apply(cfg, p, TOKENS, Context(ops=Ops() if ops is None else ops)).logits)
    return np.asarray(run(params), np.float64)


def off(found, exact) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("cfg", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_an_order_of_channels_leaves_the_float_model_as_it_is(cfg):
    """Any order, with all biases, norms, tables and heads that there are; a kernel left out would show."""
    params = model(cfg)
    rng = np.random.default_rng(1)
    shuffled = lambda *shape: rng.permuted(np.broadcast_to(np.arange(shape[-1]), shape), axis=-1)
    any_order = Orders(shuffled(64), shuffled(2, cfg.kv_heads, 16), shuffled(2, 96))
    exact = logits(cfg, params)
    assert off(logits(cfg, permuted(params, any_order)), exact) < 1e-5
    wrong = permuted(params, Orders(any_order.stream, any_order.heads, any_order.hidden[::-1]))
    kernel = permuted(params, any_order)["layers"]["feedforward"]["down"]["kernel"]
    wrong["layers"]["feedforward"]["down"] = {**wrong["layers"]["feedforward"]["down"], "kernel": kernel}
    assert off(logits(cfg, wrong), exact) > 1e-2


def test_outliers_come_first_and_a_block_holds_them():
    params = model(LLAMA)
    found = orders(LLAMA, calibrated(LLAMA, params, [TOKENS]))
    assert sorted(found.stream[:3].tolist()) == OUTLIERS
    assert found.hidden[:, 0].tolist() == [7, 90]
    fmpq = Fmpq(block=16)
    quantised, eight = fmpq.apply(LLAMA, params, [TOKENS[:2], TOKENS[2:]])
    assert eight["feedforward in"].tolist() == eight["attention in"].tolist() == [[True, False, False, False]] * 2
    assert eight["feedforward out"][:, 0].all()
    scattered = {site: fmpq.outliers(x) for site, x in calibrated(LLAMA, params, [TOKENS]).items()}
    assert scattered["attention in"].sum(axis=1).tolist() == [3, 3], "the order has to gain something"
    shares = share_of_four(LLAMA, eight)
    assert shares["attention in"] == 0.75
    assert 0.7 < shares["all"] < 1
    # What the activations' rounding does, beside the same weights and none.
    exact = logits(
        LLAMA, jax.tree.map(lambda m: getattr(m, "weights", m), quantised, is_leaf=lambda m: isinstance(m, Mixed))
    )
    blocks = lambda wide: jax.tree.map(lambda x: jnp.full_like(x, wide) if x.dtype == bool else x, quantised)
    four, mixed, wide = (
        off(logits(LLAMA, p, fmpq.ops(Ops())), exact) for p in (blocks(False), quantised, blocks(True))
    )
    assert wide < mixed < 0.8 * four


@pytest.mark.quick
def test_the_mixed_product_is_exact_and_nearly_that_of_eight_bits():
    """COMET's claim on planted outliers: at least 75 % of blocks in 4 bits; error at most 1.3 × that of W4A8, and a third of
    that of W4A4."""
    rng = np.random.default_rng(0)
    M, K, N, g = 32, 1024, 48, 128
    x, w = rng.standard_normal((M, K)), rng.standard_normal((K, N))
    x[:, :100] *= 60
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    exact = product_reference(x, w, (-1, -2))
    q = quantise(w, f"int4_g{g}", 0)
    eight = jnp.arange(K // g) < 1
    y = jax.jit(mixed_matmul)(x, Mixed(q, eight))
    whole, scales = inputs(x, eight)
    values = np.asarray(whole, np.float64) * np.repeat(np.asarray(scales, np.float64), g, axis=1)
    assert off(y, product_reference(values, q, (-1, -2))) < 3e-7
    assert np.abs(whole[:, :g]).max() == 127
    assert np.abs(whole[:, g:]).max() == 7
    # The weights' own rounding is the same in all three.
    mine = product_reference(values, w, (-1, -2))
    at = lambda bits: product_reference(dequantise(quantise(x, f"int{bits}_g{g}")), w, (-1, -2))
    assert off(mine, exact) < 1.3 * max(off(at(8), exact), 0.02)
    assert 3 * off(mine, exact) < off(at(4), exact)
    both = quant_matmul(x, q, Operands(inputs=get(f"int8_g{g}")))
    np.testing.assert_allclose(
        np.asarray(jax.jit(mixed_matmul)(x, Mixed(q, eight | True))), np.asarray(both), rtol=1e-6
    )


@pytest.mark.parametrize("form", ["int4_g8", "int8_row"])
def test_a_cache_in_a_number_format_holds_rounded_keys_and_values(form):
    """In chunks, ragged, and token by token: each slot has exactly the rounding of what the plain cache holds."""
    cfg = LLAMA.replace(layers=1, head_size=32)
    params = jax.jit(decoder.init, static_argnums=0)(cfg, jax.random.key(0))
    run = jax.jit(lambda cache, tokens, counts: decoder.forward(cfg, params, tokens, cache, counts))
    plain, rounded = kv.empty(cfg, 4, 16), kv.empty(cfg, 4, 16, form=form)
    assert rounded.capacity == 16
    for tokens, counts in (
        (TOKENS[:, :6], [6, 2, 4, 5]),
        (TOKENS[:, 6:7], [1, 1, 0, 1]),
        (TOKENS[:, 7:8], [1, 1, 1, 1]),
    ):
        counts = jnp.asarray(counts, jnp.int32)
        one, plain = run(plain, tokens, counts)
        two, rounded = run(rounded, tokens, counts)
    # One layer: keys and values do not depend on what attention read.
    for a, b in ((plain.k, rounded.k), (plain.v, rounded.v)):
        np.testing.assert_array_equal(np.asarray(dequantise(quantise(a, form))), np.asarray(dequantise(b)))
    assert 1e-4 < off(np.asarray(two, np.float64), np.asarray(one, np.float64)) < (0.02 if form == "int8_row" else 0.5)


@pytest.mark.quick
def test_a_quantised_cache_is_small_and_the_plain_one_is_as_before():
    cfg = LLAMA.replace(head_size=32)
    size = lambda form: sum(x.nbytes for x in jax.tree.leaves(kv.empty(cfg, 2, 8, form=form)) if x.ndim > 1)
    assert size("int4_g32") == size(None) * (4 + 1) / 32
    cache = kv.empty(cfg, 2, 8)
    assert cache.k.dtype == jnp.float32
    assert cache.k.shape == (2, 2, 8, 2, 32)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Fmpq(block=3), "block = 3.*even"),
        (lambda: Fmpq(outlier=1.0), "outlier = 1.0.*above 1"),
        (lambda: Fmpq(block=64).check(LLAMA), r"blocks of 64 channels do not divide hidden = 96"),
        (lambda: Fmpq(block=16).check(LLAMA.replace(residual=DeepDelta(channels=4))), "has DeepDelta and GatedMLP"),
        (lambda: Fmpq(block=16).apply(LLAMA, model(LLAMA), []), "got none"),
        (lambda: kv.empty(LLAMA, 1, 8, form="int4_g32"), "heads of 16: int4_g32 takes blocks of 32"),
        (lambda: kv.empty(LLAMA, 1, 8, form="nvfp4"), "nvfp4: its scale for a whole tensor"),
        (
            lambda: mixed_matmul(jnp.ones((2, 32)), Mixed(quantise(jnp.ones((32, 4)), "int4_g16", 0), jnp.ones(4, bool))),
            r"has 2 groups, and its inputs 4 blocks",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(call, words):
    with pytest.raises((ValueError, UserError), match=words):
        call()
