"""The benchmark of kernels runs from end to end on a CPU, and its cases are those of real models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.experiments.bench import attention_backward, kernel_cases, kernel_rivals, kernels
from jaxpar.pallas_kernels.attention import MaskSpec, attention


def test_quick(tmp_path, capsys):
    """An op with kernels, one with a plain product beside it, and one of XLA's alone."""
    lines = kernels.main(
        ["--quick", "--only", "decode attention, tiny: int8", "int8_row x", "RMS", "--out", str(tmp_path)]
    )
    assert [line["op"] for line in lines] == ["quantised product", "decode attention", "RMSNorm"]
    about, *written = map(json.loads, (tmp_path / "kernels_cpu.jsonl").read_text().splitlines())
    assert written == json.loads(json.dumps(lines))
    assert {"date", "chip", "versions", "command", "platform", "ceilings", "rounds"} <= about.keys()
    assert set(about["ceilings"]) == {"float32", "int8", "copy"}
    assert min(about["ceilings"].values()) > 0
    product, decode, norm = (line["implementations"] for line in lines)
    for rows in (product, decode):
        assert rows["mosaic_tpu"] == {"not_measured": "runs on TPUs, and here are CPUs only"}
    for row in (product["xla"], product["float32 dot"], decode["xla"], norm["xla"]):
        assert len(row["all"]) == about["rounds"]
        assert row["p10"] <= row["seconds"] <= row["p90"]
    # int8 products are exact, and the plain product does not round x.
    assert product["xla"]["error"] < 1e-6 < 1e-3 < product["float32 dot"]["error"] < 2e-2
    assert max(decode["xla"]["error"], norm["xla"]["error"]) < 1e-6
    assert product["xla"]["best"] == "float32 dot"
    assert "to_best" not in norm["xla"]
    text = capsys.readouterr().out
    assert "not measured: runs on TPUs, and here are CPUs only" in text
    assert "Goals on an H200, not results" in text
    assert (tmp_path / "kernels_cpu.md").read_text() in text
    assert (tmp_path / "kernels_cpu.png").stat().st_size > 1000


def test_a_wrong_output_has_its_error():
    """What is compared is the timed output: one that is off by a hundredth in all of it."""
    case = kernel_cases.norm("tiny", 32, 64, "float32")
    arrays = case.make(jax.random.key(0))
    right = case.contenders["xla"](*arrays)
    assert kernels.error_of(case, arrays, right) < 1e-6
    assert kernels.error_of(case, arrays, 1.01 * right) == pytest.approx(0.01, rel=1e-3)
    assert kernels.error_of(case, arrays, jnp.zeros_like(right)) == 1


@pytest.mark.quick
def test_what_ops_need_at_least():
    """FLOPs and bytes against figures of the papers and plain counts."""
    found = list(kernel_cases.cases("chip"))
    ops = {case.op for case in found}
    assert set(kernels.GOALS) < ops
    assert {"RMSNorm", "rotary embedding", "SwiGLU", "cross-entropy, with gradients"} < ops
    threes = [case for case in found if case.model == "FlashAttention-3's"]
    assert len(threes) == 2 * 36
    # FlashAttention-3, section 4.1: 4 · T² · head size · heads, halved by a causal mask; 16k tokens in all, hidden size 2048.
    for case in threes:
        tokens = int(case.name.split(" x ")[1].split(",")[0])
        plain = 4 * 16384 * tokens * 2048 / (2 if "causal" in case.name else 1)
        assert case.flops == plain * (3.5 if "backward" in case.op else 1), case.name
    four = next(c for c in found if c.op == "quantised product" and "int4_g128 x bfloat16, 1 x 4096 x 14336" in c.name)
    weights = 4096 * 14336
    assert four.bytes == weights / 2 + weights / 128 * 4 + 2 * (4096 + 14336)
    # What is one kernel by two names is timed once.
    assert four.contenders["mosaic_gpu"] == 'is the same as "mosaic_gpu_few_rows" here'
    assert all(callable(four.contenders[name]) for name in ("mosaic_gpu_few_rows", "mosaic_gpu_codes", "xla"))
    cache = next(c for c in found if c.op == "decode attention" and "bfloat16 cache, 8 x 32768" in c.name)
    assert cache.bytes == pytest.approx(2 * 8 * 32768 * 8 * 128 * 2, rel=1e-3)
    assert all(list(case.contenders) != [] and case.flops > 0 for case in found)


def test_splash_attention_is_the_same_attention():
    """JAX's own kernel in Pallas' interpreter beside ours in XLA: shared heads, scale and window."""
    q, k, v = kernel_cases.normals(
        jax.random.key(0), (1, 128, 2, 128), (1, 128, 1, 128), (1, 128, 1, 128), dtype="float32"
    )
    sizes = dict(heads=2, tokens=128, scale=0.2, causal=True, window=40)
    found = jax.jit(kernel_rivals.splash(**sizes, interpret=True))(q, k, v)
    wanted = attention(q, k, v, mask=MaskSpec(window=40), scale=0.2, implementation="xla")
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)


def test_pytorch_is_the_same_attention():
    pytest.importorskip("torch")
    case = kernel_cases.attention(
        "tiny", "causal", "float32", True, batch=1, tokens=64, heads=2, groups=1, size=32, window=None, causal=True
    )
    arrays = case.make(jax.random.key(0))
    sampler = kernel_rivals.TorchSampler(case.contenders["torch SDPA"].build(arrays), shortest=1e-3)
    assert sampler.sample() > 0
    assert kernels.error_of(case, arrays, sampler.output()) < 1e-6
    case = kernel_cases.decode("tiny", None, "float32", batch=2, slots=64, heads=4, groups=2, size=32)
    arrays = case.make(jax.random.key(0))
    sampler = kernel_rivals.TorchSampler(case.contenders["torch SDPA"].build(arrays), shortest=1e-3)
    assert kernels.error_of(case, arrays, sampler.output()) < 1e-6


def test_the_backward_pass_is_measured_on_hopper_gpus_only(capsys):
    with pytest.raises(SystemExit):
        attention_backward.main([])
    assert "needs a Hopper GPU and JAX 0.11 or newer, and here are a cpu and JAX" in capsys.readouterr().err


def test_what_has_not_been_measured_has_an_empty_cell():
    text = attention_backward.table({"a shape": {"forward": 0.5, "difference": 8e-5}})
    assert text.splitlines()[-1] == "| a shape | 0.500 | - | - | - | - | 8e-05 |"
