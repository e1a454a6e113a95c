"""`model.attention_implementation`: what it changes, and what it refuses before anything is traced."""

from typing import get_args

import jax
import numpy as np
import pytest

from jaxpar.models import decoder
from jaxpar.models.config import AttentionImplementation, ModelConfig
from jaxpar.pallas_kernels.attention import IMPLEMENTATIONS
from jaxpar.parallel.mesh import MeshConfig, make_mesh
from jaxpar.program import build

CFG = ModelConfig(vocabulary=16, layers=2, width=16, heads=2, hidden=16, context=16)

pytestmark = pytest.mark.quick


def one_device():
    return make_mesh(MeshConfig(data=1), jax.devices()[:1])


def test_the_option_has_the_implementations_that_there_are():
    assert get_args(AttentionImplementation) == IMPLEMENTATIONS


def test_what_cannot_be_done_here_is_refused_before_tracing():
    for name, words in [
        ("mosaic_tpu", 'attention with implementation="mosaic_tpu" runs on TPUs, and here are CPUs only; use'),
        ("cudnn", "takes bfloat16 or float16, got float32"),
    ]:
        with pytest.raises(ValueError, match=words) as found:
            build(CFG.replace(attention_implementation=name), one_device(), rows=2, length=16)
        assert str(found.value).startswith("model.attention_implementation: ")
        assert "\n" not in str(found.value)


def test_xla_is_what_it_is_without():
    build(CFG.replace(attention_implementation="xla"), one_device(), rows=2, length=16)
    params = decoder.init(CFG, jax.random.key(0))
    tokens = np.arange(32, dtype=np.int32).reshape(2, 16) % 16
    texts = [
        jax.jit(decoder.apply, static_argnums=0).lower(cfg, params, tokens).as_text()
        for cfg in (CFG, CFG.replace(attention_implementation="xla"))
    ]
    assert texts[0] == texts[1]
    with pytest.raises(ValueError, match="runs on TPUs"):
        decoder.apply(CFG.replace(attention_implementation="mosaic_tpu"), params, tokens)
