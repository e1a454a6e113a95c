"""The decoder's meaning: causality, documents, slices, caches, loops and policies. Not its shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models import spec as specs
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.feedforward.dense import MLP
from jaxpar.models.norms import LayerNorm, RMSNorm
from jaxpar.models.positions import Learned, Llama3Scaling, NoPositions, Rope, YarnScaling

BASE = ModelConfig(vocabulary=61, layers=2, width=32, heads=4, kv_heads=2, hidden=48, context=64, init_std=0.2)
SHAPES = {
    "llama": BASE,
    "gpt2": BASE.replace(
        kv_heads=4, norm=LayerNorm(), positions=Learned(), feedforward=MLP(), qkv_bias=True, attention_out_bias=True
    ),
    "gemma3": BASE.replace(
        norm=RMSNorm(unit_offset=True),
        norm_placement="pre_post",
        qk_norm=True,
        window=5,
        window_pattern=(True, False),
        positions=Rope(base=1e6, local_base=1e4),
        embedding_scale=32**0.5,
        attention_cap=20.0,
        logit_cap=10.0,
    ),
    "untied_post_yarn": BASE.replace(
        tied_embeddings=False, norm_placement="post", positions=Rope(scaling=YarnScaling(), fraction=0.5)
    ),
    "nope": BASE.replace(positions=NoPositions(), window=7),
}
# Eager JAX compiles each operation alone; whole functions compile faster.
apply = jax.jit(decoder.apply, static_argnums=0)
embed = jax.jit(decoder.embed, static_argnums=0)
init = jax.jit(decoder.init, static_argnums=0)
each_shape = pytest.mark.parametrize("cfg", SHAPES.values(), ids=SHAPES)


def params_of(cfg, seed=0):
    return init(cfg, jax.random.key(seed))


def tokens_of(cfg, rows=2, length=12, seed=1):
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, cfg.vocabulary)


@pytest.mark.quick
@each_shape
def test_causality_by_gradients(cfg):
    """The logits at t have a gradient with respect to inputs up to t, and exactly none after it."""
    params, tokens = params_of(cfg), tokens_of(cfg, rows=1, length=10)
    ctx = Context()
    state = embed(cfg, params, tokens, ctx)

    def at(state, t):
        state, _ = decoder.blocks(cfg, params["layers"], state, ctx)
        return (decoder.head(cfg, params, state, ctx)[0, t] ** 2).sum()

    grad = jax.jit(jax.grad(at))
    for t in (0, 4, 9):
        reach = np.asarray(jnp.abs(grad(state, t)[0]).sum(-1))
        assert (reach[t + 1 :] == 0).all()
        assert reach[t] > 0
    if cfg.window is None:
        assert (np.asarray(jnp.abs(grad(state, 9)[0]).sum(-1)) > 0).all()


@each_shape
def test_packed_documents_equal_documents_alone(cfg):
    """Two documents and padding in one row: each sees itself only, wherever it stands."""
    params = params_of(cfg)
    a, b = tokens_of(cfg, 1, 5, seed=2), tokens_of(cfg, 1, 8, seed=3)
    row = jnp.concatenate([a, b, jnp.zeros((1, 3), jnp.int32)], axis=1)
    segments = jnp.array([[1] * 5 + [2] * 8 + [0] * 3])
    positions = jnp.array([[*range(5), *range(8), 0, 0, 0]])
    packed = apply(cfg, params, row, Context(positions, segments)).logits
    np.testing.assert_allclose(packed[:, :5], apply(cfg, params, a).logits, atol=2e-5)
    np.testing.assert_allclose(packed[:, 5:13], apply(cfg, params, b).logits, atol=2e-5)
    assert np.isfinite(packed).all()


@each_shape
def test_cached_decode_equals_the_full_forward_pass(cfg):
    """Ragged rows, prefilled in unequal chunks and then token by token."""
    params, tokens = params_of(cfg), tokens_of(cfg, rows=3, length=14)
    full = apply(cfg, params, tokens).logits
    forward = jax.jit(lambda tokens, cache, counts: decoder.forward(cfg, params, tokens, cache, counts))
    cache = kv.empty(cfg, rows=3, capacity=24)
    done = np.zeros(3, int)
    for counts in ([4, 2, 1], [4, 4, 3], [1, 1, 1], [1, 0, 1], [2, 4, 4]):
        width = 4 if max(counts) > 1 else 1
        chunk = np.zeros((3, width), np.int32)
        for b, n in enumerate(counts):
            chunk[b, :n] = tokens[b, done[b] : done[b] + n]
        logits, cache = forward(jnp.asarray(chunk), cache, jnp.asarray(counts))
        for b, n in enumerate(counts):
            np.testing.assert_allclose(logits[b, :n], full[b, done[b] : done[b] + n], atol=3e-5)
            done[b] += n
    assert done.tolist() == np.asarray(cache.lens).tolist() == [12, 11, 10]


@pytest.mark.quick
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_stack_in_slices_equals_the_whole(name):
    """The seam of pipelines and early exits: `blocks` on slices, with a static and with a traced first layer."""
    cfg = SHAPES[name]
    params, tokens, ctx = params_of(cfg), tokens_of(cfg), Context()
    state = embed(cfg, params, tokens, ctx)
    blocks = jax.jit(decoder.blocks, static_argnums=(0, 4))
    whole, _ = blocks(cfg, params["layers"], state, ctx)
    slice_of = lambda a, b: jax.tree.map(lambda p: p[a:b], params["layers"])
    half, _ = blocks(cfg, slice_of(0, 1), state, ctx)
    static, _ = blocks(cfg, slice_of(1, 2), half, ctx, 1)
    traced, _ = jax.jit(lambda i: decoder.blocks(cfg, slice_of(1, 2), half, ctx, first_layer=i))(1)
    np.testing.assert_allclose(static, whole, atol=1e-5)
    np.testing.assert_allclose(traced, whole, atol=1e-5)
    head = jax.jit(decoder.head, static_argnums=0)
    np.testing.assert_allclose(head(cfg, params, whole, ctx), apply(cfg, params, tokens).logits, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_loops_and_remat_policies_are_the_same_function(name):
    cfg = SHAPES[name]
    tokens = tokens_of(cfg)
    targets = jnp.roll(tokens, -1, axis=1)

    def grads(cfg):
        f = lambda p: decoder.loss(cfg, p, tokens, targets).loss_sum
        return jax.jit(jax.value_and_grad(f))(params)

    params = params_of(cfg)
    loss, expected = grads(cfg)
    changes = [
        {"layer_loop": "unroll"},
        {"remat": "full"},
        {"remat": "dots"},
        {"loss_chunk": 5},
    ]
    for change in [*changes, {"layer_loop": "unroll", "remat": "full"}]:
        other, found = grads(cfg.replace(**change))
        np.testing.assert_allclose(other, loss, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-4, rtol=1e-3), found, expected)


@pytest.mark.quick
def test_loss_is_the_weighted_sum_of_log_probabilities():
    cfg = SHAPES["gemma3"]
    params, tokens = params_of(cfg), tokens_of(cfg)
    targets, weights = jnp.roll(tokens, -1, 1), jax.random.uniform(jax.random.key(5), tokens.shape)
    sums = jax.jit(decoder.loss, static_argnums=0)(cfg, params, tokens, targets, weights)
    logp = jax.nn.log_softmax(apply(cfg, params, tokens).logits)
    expected = -(jnp.take_along_axis(logp, targets[..., None], -1)[..., 0] * weights).sum()
    np.testing.assert_allclose(sums.loss_sum, expected, rtol=1e-5)
    np.testing.assert_allclose(sums.weight_sum, weights.sum(), rtol=1e-6)


def test_dropout_belongs_to_the_sample_and_the_layer():
    """Rows in another order, or alone, drop the same elements; evaluation drops none."""
    cfg = BASE.replace(dropout=0.3)
    params, tokens, key = params_of(cfg), tokens_of(cfg, rows=4), jax.random.key(9)
    run = lambda rows: apply(cfg, params, tokens[rows], Context(key=key, sample_ids=100 + rows)).logits
    all_rows = run(jnp.arange(4))
    np.testing.assert_allclose(run(jnp.array([2, 0])), all_rows[jnp.array([2, 0])], atol=1e-5)
    assert not np.allclose(all_rows, apply(cfg, params, tokens).logits, atol=1e-2)
    same = apply(cfg.replace(dropout=0.0), params, tokens).logits
    np.testing.assert_array_equal(apply(cfg, params, tokens).logits, same)


@pytest.mark.quick
def test_a_layer_is_the_same_whatever_stands_around_it():
    deep, shallow = params_of(BASE.replace(layers=3)), params_of(BASE)
    # The projections back to the stream are scaled by 1/sqrt(2·layers): compare one that is not.
    a, b = (p["layers"]["attention"]["query"]["kernel"] for p in (deep, shallow))
    np.testing.assert_array_equal(a[:2], b)
    assert not np.array_equal(a[0], a[1])
    untied = params_of(BASE.replace(tied_embeddings=False))
    np.testing.assert_array_equal(untied["embedding"]["tokens"], shallow["embedding"]["tokens"])


def test_initial_values_have_the_declared_spread():
    cfg = ModelConfig(width=256, layers=2, heads=4)
    flat = specs.flatten(decoder.spec(cfg))
    params = params_of(cfg)
    leaves = {specs.path_name(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    assert leaves.keys() == flat.keys()
    for name, s in flat.items():
        assert leaves[name].shape == s.shape
        if isinstance(s.init, specs.Normal):
            np.testing.assert_allclose(np.std(leaves[name]), s.init.std, rtol=0.02)
    assert specs.count(decoder.spec(cfg)) == sum(x.size for x in leaves.values())


@pytest.mark.quick
@each_shape
def test_bfloat16_compute_is_close_and_keeps_float32_parameters(cfg):
    cfg16 = cfg.replace(dtype="bfloat16")
    params, tokens = params_of(cfg16), tokens_of(cfg)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = apply(cfg16, params, tokens).logits
    expected = apply(cfg, params, tokens).logits
    assert logits.dtype == jnp.float32
    error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
    assert 0 < error < 0.05


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_bfloat16_gradients_compile_and_are_close(loop):
    cfg = BASE.replace(layer_loop=loop)
    params, tokens = params_of(cfg), tokens_of(cfg)

    def grads(cfg):
        return jax.jit(jax.grad(lambda p: decoder.loss(cfg, p, tokens, tokens).loss_sum))(params)

    for a, b in zip(jax.tree.leaves(grads(cfg.replace(dtype="bfloat16"))), jax.tree.leaves(grads(cfg)), strict=True):
        assert a.dtype == jnp.float32
        assert np.linalg.norm(a - b) < 0.05 * np.linalg.norm(b)


def test_configs_that_cannot_be_are_refused_with_their_numbers():
    for change, words in [
        ({"heads": 5, "kv_heads": 5, "head_size": None}, "width = 32 is not divisible by model.heads = 5"),
        ({"kv_heads": 3}, "heads = 4 is not divisible by model.kv_heads = 3"),
        ({"layers": 0}, "model.layers must be at least 1, got 0"),
        ({"window": 0}, "model.window must be at least 1 token, got 0"),
        ({"window_pattern": ()}, "window_pattern is empty"),
        ({"dropout": 1.5}, "dropout = 1.5 is outside"),
        ({"head_size": 7, "width": 32}, "rotary embeddings turn pairs"),
    ]:
        with pytest.raises(ValueError, match=words):
            BASE.replace(**change)


def test_llama3_scaling_keeps_short_waves_and_stretches_long_ones():
    plain, _ = Rope(base=500_000.0).frequencies(64, local=False)
    scaled, scale = Rope(base=500_000.0, scaling=Llama3Scaling()).frequencies(64, local=False)
    wave = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[wave < 8192 / 4], plain[wave < 8192 / 4])
    np.testing.assert_allclose(scaled[wave > 8192], plain[wave > 8192] / 8)
    assert scale == 1.0
