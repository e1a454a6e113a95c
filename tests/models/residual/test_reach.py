"""Residual operators that look at earlier tokens: convolutions beside torch's, documents apart, memory linear in depth, and what
they cannot be combined with."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context
from jaxpar.models.residual.base import Behind
from jaxpar.models.residual.deep_delta import DeepDelta
from jaxpar.models.residual.short_window import ShortWindow
from jaxpar.models.routing.depth import MixtureOfDepths
from jaxpar.models.spec import path_name

CFG = ModelConfig(vocabulary=16, layers=2, width=16, heads=2, hidden=16, context=32, init_std=0.3)
TOKENS_BOTH = DeepDelta(channels=3, compressor="tokens", embedding="convolution", value="sigmoid")
MIXERS = [ShortWindow(window=3), TOKENS_BOTH]
every_mixer = pytest.mark.parametrize("mixer", MIXERS, ids=lambda m: type(m).__name__)


def noisy(cfg):
    """Initial parameters, with noise on the mixer's so that no kernel is an average or the identity."""
    params, draw = decoder.init(cfg, jax.random.key(0)), np.random.default_rng(1)
    noise = lambda path, x: ("residual/" in path_name(path)) * 0.3 * draw.standard_normal(x.shape).astype(np.float32)
    return jax.tree_util.tree_map_with_path(lambda path, x: x + noise(path, x), params)


@pytest.mark.quick
def test_convolutions_over_tokens_are_those_of_torch():
    """TC: a depthwise convolution of each feature of each channel, then the weighted sum. EC: likewise, of embeddings."""
    torch = pytest.importorskip("torch", reason="the newest leg has no PyTorch")
    draw, (V, D, S) = np.random.default_rng(0), (3, 8, 7)
    normal = lambda *shape: draw.standard_normal(shape).astype(np.float32)
    x_BxSxVxD, mix_KxVxD, read_V = normal(2, S, V, D), normal(4, V, D), normal(V)
    documents = jnp.concatenate([jnp.full((2, 3), -1), jnp.zeros((2, S), int)], axis=1)
    front = lambda x: jnp.pad(x, [(0, 0), (3, 0)] + [(0, 0)] * (x.ndim - 2))

    def conv(x_BxSxC, kernel_KxC):
        x = torch.nn.functional.pad(torch.tensor(x_BxSxC).transpose(1, 2), (3, 0))
        weight = torch.tensor(kernel_KxC).T[:, None].contiguous()
        return torch.nn.functional.conv1d(x, weight, groups=weight.shape[0]).transpose(1, 2).numpy()

    params = {"compress": {"mix": mix_KxVxD, "read": read_V}}
    found = TOKENS_BOTH.over_tokens(params, Behind(front(x_BxSxVxD), documents))
    expected = np.einsum(
        "bsvd,v->bsd", conv(x_BxSxVxD.reshape(2, S, V * D), mix_KxVxD.reshape(4, -1)).reshape(2, S, V, D), read_V
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    x_BxSxD = x_BxSxVxD[:, :, 0]
    state = TOKENS_BOTH.init(CFG, x_BxSxD, {"mix": mix_KxVxD}, Behind(front(x_BxSxD), documents))
    for c in range(V):
        np.testing.assert_allclose(state[:, :, c], conv(x_BxSxD, mix_KxVxD[:, c]), rtol=1e-4, atol=1e-5)


@every_mixer
def test_documents_in_one_row_do_not_meet(mixer):
    """A row of two documents; both in the other order; and another first document in front of the second, which sees nothing
    of it: bitwise, however large it is."""
    cfg = CFG.replace(residual=mixer, tied_embeddings=False)
    draw = np.random.default_rng(2)
    first, second = draw.integers(0, 15, 5), draw.integers(0, 15, 8)
    rows = np.array([[*first, *second], [*second, *first]], np.int32)
    segments = np.array([[1] * 5 + [2] * 8, [1] * 8 + [2] * 5], np.int32)
    positions = np.array([[*range(5), *range(8)], [*range(8), *range(5)]], np.int32)
    run = jax.jit(lambda p, rows, ctx: decoder.apply(cfg, p, rows, ctx).logits)
    params = noisy(cfg)
    params["embedding"]["tokens"] = params["embedding"]["tokens"].at[15].set(1e4)
    ctx = Context(positions=positions, segments=segments)
    packed, poisoned = run(params, rows, ctx), rows.copy()
    poisoned[0, :5] = 15
    again = run(params, poisoned, ctx)
    np.testing.assert_array_equal(again[0, 5:], packed[0, 5:])
    assert np.abs(again[0, :5] - packed[0, :5]).max() > 0.1
    np.testing.assert_allclose(packed[1, :8], packed[0, 5:], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packed[1, 8:], packed[0, :5], rtol=1e-4, atol=1e-4)
    # And tokens of one document do meet where they are one document.
    whole = run(params, rows, ctx.replace(segments=np.ones_like(segments)))
    assert np.abs(whole[0, 5:] - packed[0, 5:]).max() > 0.1


@pytest.mark.quick
def test_the_first_state_starts_as_the_repeated_embedding():
    """EC at initialisation is bitwise the model without it."""
    with_it, without = (CFG.replace(residual=DeepDelta(channels=2, embedding=e)) for e in ("convolution", "repeat"))
    tokens = np.arange(8, dtype=np.int32)[None]
    states = [decoder.embed(cfg, decoder.init(cfg, jax.random.key(0)), tokens, Context()) for cfg in (with_it, without)]
    np.testing.assert_array_equal(*states)


@every_mixer
def test_memory_is_linear_in_depth(mixer):
    def temporary_bytes(layers):
        cfg = CFG.replace(residual=mixer, layers=layers, remat="full", context=64)
        params = jax.eval_shape(partial(decoder.init, cfg), jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((8, 64), jnp.int32)
        loss = lambda params, tokens: decoder.loss(cfg, params, tokens, tokens).loss_sum
        # LLVM's effort changes no buffer.
        compiled = (
            jax.jit(jax.grad(loss), compiler_options={"xla_backend_optimization_level": 0})
            .lower(params, tokens)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(16) / temporary_bytes(8) < 2.2


@pytest.mark.quick
def test_the_cache_has_room_for_what_the_operator_keeps():
    cache = jax.eval_shape(lambda: kv.empty(CFG.replace(residual=TOKENS_BOTH), 2, 8))
    assert {site: x.shape for site, x in cache.behind.items()} == dict.fromkeys(
        ("attention", "feedforward"), (2, 2, 8, 3, 16)
    )
    assert cache.tokens.shape == (2, 8)
    plain = jax.eval_shape(lambda: kv.empty(CFG, 2, 8))
    assert plain.behind is None
    assert plain.tokens is None


@pytest.mark.quick
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CFG.replace(residual=ShortWindow(33)), "window = 33 tokens is outside 1 to model.context = 32"),
        (
            lambda: CFG.replace(residual=ShortWindow(3), depth=MixtureOfDepths()),
            "ShortWindow keeps more than one stream or reads earlier tokens'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(make, message):
    with pytest.raises(ValueError, match=message):
        make()
