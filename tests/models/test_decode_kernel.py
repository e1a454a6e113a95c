"""The decoding kernel inside of the model, in Pallas' interpreter: a cache in 4 bits, layers that slide and layers that do not
in one loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.models import cache as kv
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.context import Context, Ops
from jaxpar.pallas_kernels import versions
from jaxpar.pallas_kernels.decode import decode_attention
from tests.pallas_kernels.test_attention_mosaic_gpu import H200

CFG = ModelConfig(
    vocabulary=16,
    layers=2,
    width=32,
    heads=2,
    kv_heads=1,
    head_size=32,
    hidden=16,
    context=32,
    window=3,
    window_pattern=(True, False),
)
TOKENS = np.arange(16, dtype=np.int32).reshape(2, 8) * 7 % 16


def interpreted(*arrays, **call):
    return decode_attention(*arrays, **(call | {"implementation": "mosaic_tpu", "interpret": True}))


def test_decoding_in_steps_is_that_of_plain_xla():
    params = decoder.init(CFG, jax.random.key(0))

    def run(ops):
        advance = jax.jit(lambda *x: decoder.advance(CFG, params, x[0], Context(cache=x[1], ops=ops), x[2])[:2])
        cache, found = kv.empty(CFG, 2, 20, form="int4_g32"), []
        for tokens, counts in ((TOKENS[:, :4], np.array([4, 3])), (TOKENS[:, 4:], np.array([2, 4]))):
            logits, cache = advance(tokens, cache, counts)
            found.append(np.where(np.arange(4)[None, :, None] < counts[:, None, None], logits, 0))
        return found

    for a, b in zip(run(Ops(decode=interpreted)), run(Ops()), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_program_for_a_tpu_decodes_with_it_and_prefills_a_long_prompt_without(monkeypatch):
    monkeypatch.setattr(versions, "platforms", lambda: ("tpu",))
    monkeypatch.setattr(versions, "split_by_compiler", lambda: False)
    params = jax.eval_shape(lambda: decoder.init(CFG, jax.random.key(0)))

    def kernels(T, name=None):
        cfg = CFG.replace(attention_implementation=name)
        cache = jax.eval_shape(lambda: kv.empty(cfg, 2, 20))
        tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
        run = lambda params, tokens, cache: decoder.advance(cfg, params, tokens, Context(cache=cache))[0]
        lowered = jax.jit(run).trace(params, tokens, cache).lower(lowering_platforms=("tpu",))
        return lowered.as_text().count("@tpu_custom_call")

    assert kernels(1) > 0
    assert kernels(1, "xla") == kernels(17) == 0


@pytest.mark.quick
def test_a_program_for_a_hopper_gpu_decodes_with_it_by_itself():
    """Whichever kernel attention itself was asked to be; where it does not fit, XLA does it."""
    cfg = CFG.replace(head_size=64, dtype="bfloat16")
    params = jax.eval_shape(lambda: decoder.init(cfg, jax.random.key(0)))

    def kernels(slots=128, name=None, form=None):
        own = cfg.replace(attention_implementation=name)
        cache = jax.eval_shape(lambda: kv.empty(own, 2, slots, form=form))
        tokens = jax.ShapeDtypeStruct((2, 1), jnp.int32)
        run = lambda params, tokens, cache: decoder.advance(own, params, tokens, Context(cache=cache))[0]
        with jax.sharding.use_abstract_mesh(H200):
            lowered = jax.jit(run).trace(params, tokens, cache).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("custom_call @mosaic_gpu")

    assert kernels() == kernels(name="mosaic_gpu") == kernels(form="int8_row") > 0
    assert kernels(name="xla") == kernels(slots=20) == kernels(form="fp8_e4m3_row") == 0
