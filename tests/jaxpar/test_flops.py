"""FLOPs against counts done by hand and against the compiler's own count."""

import jax
import jax.numpy as jnp
import pytest

from jaxpar import flops
from jaxpar.models import decoder
from jaxpar.models.config import ModelConfig
from jaxpar.models.feedforward.dense import MLP, GatedMLP
from jaxpar.models.norms import LayerNorm
from jaxpar.models.positions import Learned

GPT2 = ModelConfig(
    vocabulary=50257, layers=12, width=768, heads=12, context=1024, norm=LayerNorm(), positions=Learned(),
    feedforward=MLP(), qkv_bias=True, attention_out_bias=True,
)  # fmt: skip
LLAMA2 = ModelConfig(
    vocabulary=32000, layers=32, width=4096, heads=32, hidden=11008, context=4096, tied_embeddings=False
)  # fmt: skip
MISTRAL = ModelConfig(
    vocabulary=32000, layers=32, width=4096, heads=32, kv_heads=8, hidden=14336, context=8192, window=4096,
    tied_embeddings=False,
)  # fmt: skip
GEMMA3 = ModelConfig(
    vocabulary=262144, layers=18, width=640, heads=4, kv_heads=1, head_size=256, hidden=2048, context=2048,
    window=512, window_pattern=(True,) * 5 + (False,),
)  # fmt: skip


@pytest.mark.quick
def test_gpt2_small_by_hand():
    # One layer, one token: q, k, v and out are 768 x 768 each; the feed-forward is 768 x 3072 and back.
    projections = 4 * 2 * 768 * 768  # 4,718,592
    feedforward = 2 * 2 * 768 * 3072  # 9,437,184
    # 1024 tokens see 1 + 2 + ... + 1024 = 524,800 keys; each pair costs 64 products twice (QK, PV) in 12 heads.
    scores = 524_800 * 2 * 2 * 64 * 12 / 1024  # 1,574,400
    head = 2 * 768 * 50257  # 77,194,752
    by_hand = 12 * (projections + feedforward + scores) + head
    assert by_hand == 265_956_864
    assert flops.forward(GPT2).total == by_hand
    assert flops.training(GPT2) == 3 * by_hand


def test_llama2_7b_by_hand():
    # PaLM's rule: 6 N a token plus attention, N without the embedding table; here attention sees half of the pairs.
    parameters = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) + 4096 * 32000
    assert parameters == 6_607_077_376  # 6.738 billion less the embedding and the norms
    attention = 32 * 3 * 4 * 4096 * (4096 + 1) / 2  # layers, training, 4 T D over the visible half
    assert flops.training(LLAMA2) == 6 * parameters + attention
    assert flops.training(LLAMA2) == pytest.approx(4.2864e10, rel=1e-3)


def test_grouped_queries_and_window_by_hand():
    f = flops.forward(MISTRAL)
    assert f.projections == 32 * 2 * 4096 * (4096 + 1024 + 1024 + 4096)
    # The first 4096 queries see 1 .. 4096 keys, each of the 4096 behind them 4096.
    pairs = 4096 * 4097 // 2 + 4096 * 4096
    assert f.scores == 32 * pairs * 4 * 128 * 32 / 8192
    assert f.feedforward == 32 * 2 * 3 * 4096 * 14336


def test_layers_that_slide_and_layers_that_do_not():
    T = 2048
    sliding, full = 512 * 513 // 2 + (T - 512) * 512, T * (T + 1) // 2
    assert flops.forward(GEMMA3).scores == (15 * sliding + 3 * full) * 4 * 4 * 256 / T


@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
@pytest.mark.parametrize("length", [1, 2, 7, 20])
def test_pairs_are_the_ones_in_the_mask(length, window):
    i, j = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask = (j <= i) & (True if window is None else i - j < window)
    assert flops.pairs(length, window) == int(mask.sum())
    assert flops.pairs(length, window, causal=False) == length * length


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("feedforward", [GatedMLP(), MLP()])
def test_against_the_compiler(remat, feedforward):
    """On an unrolled model of rows too short for blocks, whose attention multiplies every pair: within what is not a matrix product.

    "full": each layer's last product is dropped from what is computed again, as nothing needs it.
    """
    cfg = ModelConfig(
        vocabulary=512, layers=2, width=128, heads=4, kv_heads=2, hidden=256, context=48, feedforward=feedforward,
        layer_loop="unroll", loss_chunk=64, remat=remat,
    )  # fmt: skip
    params = jax.eval_shape(lambda key: decoder.init(cfg, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, 48), jnp.int32)
    loss = lambda p, t: decoder.loss(cfg, p, t, t).loss_sum

    def xla(f):
        return jax.jit(f).lower(params, tokens).cost_analysis()["flops"] / (2 * 48)

    if remat == "none":
        forward = flops.forward(cfg, causal=False).total
        assert forward < xla(loss) < 1.03 * forward
    expected = flops.hardware(cfg, causal=False)
    dropped = cfg.layers * 2 * cfg.width * cfg.hidden if remat == "full" else 0
    assert expected - dropped < xla(jax.value_and_grad(loss)) < 1.04 * expected


def test_hardware_flops_grow_with_what_is_computed_again():
    counts = [flops.hardware(GPT2.replace(remat=r)) for r in ("none", "dots", "full")]
    f = flops.forward(GPT2)
    assert counts[0] == counts[1] == flops.training(GPT2) + f.scores / 2
    assert counts[2] == counts[0] + f.layers
    assert len({flops.training(GPT2.replace(remat=r)) for r in ("none", "full")}) == 1  # MFU does not gain by remat


def test_mfu():
    # nanoGPT's README figure: GPT-2 124M on 8 A100 40GB; the arithmetic, not the measurement.
    peak = flops.peak("NVIDIA A100-SXM4-40GB", 8)
    assert peak == 8 * 312e12
    assert flops.mfu(GPT2, peak / flops.training(GPT2), peak) == pytest.approx(1.0)
    assert flops.mfu(GPT2, 0.0, peak) == 0.0


@pytest.mark.parametrize(
    ("kind", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.5), ("NVIDIA GH200 480GB", 989.5), ("NVIDIA B200", 2250), ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla T4", 65), ("Tesla V100-SXM2-16GB", 125), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("TPU v2", 22.5), ("TPU v3", 61.5), ("TPU v4", 275), ("TPU v5 lite", 197), ("TPU v5p", 459), ("TPU v5", 459),
        ("TPU v6 lite", 918), ("TPU7x", 1153.5),
        ("cpu", None), ("NVIDIA L40", None), ("Radeon", None),
    ],
)  # fmt: skip
def test_peaks(kind, teraflops):
    assert flops.peak(kind) == (None if teraflops is None else pytest.approx(teraflops * 1e12))
