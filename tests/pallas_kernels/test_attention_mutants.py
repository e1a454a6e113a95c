"""One-line breakages of the attention kernels for TPUs and for Hopper GPUs: the comparison with float64 sees every one of
them, or the interpreter's race detector does."""

import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.attention import (
    MaskSpec,
    gpu_fused,
    gpu_kernels,
    labels,
    mosaic_gpu,
    mosaic_tpu,
    tpu_kernels,
)
from jaxpar.pallas_kernels.attention.block import dropped
from tests.pallas_kernels.attention_cases import draw, errors, float64, seen_by

SHAPE = (2, 24, 32, 4, 2, 8)
STARTS, SCALE, CAP = (13, 3), 0.7, 2.0
FORWARD, BACKWARD = ("out", "lse"), ("dq", "dk", "dv")
MUTANTS = (
    (tpu_kernels, FORWARD, "shrink = jnp.exp(before - level)", "shrink = jnp.ones_like(before)"),
    (tpu_kernels, FORWARD, "x.sum[...] * shrink +", "x.sum[...] +"),
    (tpu_kernels, FORWARD, "jnp.where(top == -jnp.inf, 0.0, top)", "top"),
    (tpu_kernels, FORWARD, "jnp.log(share) + x.top[:, :1]", "jnp.log(share)"),
    (tpu_kernels, FORWARD, "logits = logits * self.scale", "logits = logits * self.scale**2"),
    (tpu_kernels, FORWARD, "step <= last[at, i]", "step < last[at, i]"),
    (tpu_kernels, BACKWARD, "1 - bent * bent", "1 - bent"),
    (tpu_kernels, BACKWARD, "d_weights - x.drop[...]", "d_weights"),
    (tpu_kernels, BACKWARD, "x.sum_k[...] * settings.scale", "x.sum_k[...]"),
    (tpu_kernels, BACKWARD, "(head == 0) & (step == 0)", "step == 0"),
    (tpu_kernels, BACKWARD, "step <= last[at, i]", "step < last[at, i]"),
    (labels, FORWARD, 'k["index"] <= q["index"]', 'k["index"] < q["index"]'),
    (labels, FORWARD, 'k["index"] < window)', 'k["index"] <= window)'),
    (labels, FORWARD, ' & (q["segment"] != 0)', ""),
    (labels, FORWARD, 'k_low["index"] <= q_high["index"]', 'k_high["index"] <= q_high["index"]'),
    (labels, FORWARD, 'k_low["segment"] <= q_high["segment"]', 'k_low["segment"] < q_high["segment"]'),
    (labels, BACKWARD, "jnp.argmax(pairs_RxNxM[..., ::-1], axis=-1)", "jnp.argmax(pairs_RxNxM, axis=-1)"),
    (mosaic_tpu, FORWARD, "jax.lax.div(h, R)", "h % self.G"),
    (mosaic_tpu, FORWARD, "self.settings.row(b), 0, i", "0, 0, i"),
    (mosaic_tpu, FORWARD, "- 3) // self.block[1 - side] + 2", "- 3) // self.block[1 - side] + 1"),
    (mosaic_tpu, BACKWARD, "g * R + r", "r * self.G + g"),
    (mosaic_tpu, BACKWARD, "jnp.where(lse == -jnp.inf, 0, lse)", "lse"),
)


def documents(N, rng):
    found = np.sort(rng.integers(1, 4, (2, N)), axis=1).astype(np.int32)
    found[:, N - 2 :] = 0
    return found


@pytest.fixture(scope="module")
def problem():
    """Inputs, the mask, and the truth, by name."""
    rng = np.random.default_rng(4)
    B, T, S = SHAPE[:3]
    given = draw(0, *SHAPE)
    mask = MaskSpec(window=5, q_segments=documents(T, rng), k_segments=documents(S, rng))
    seen = seen_by(mask, B, T, S, *STARTS)
    return given, mask, dict(zip(FORWARD + BACKWARD, float64(*given, seen, SCALE, CAP), strict=True))


def load(module, source, monkeypatch):
    """A module of this source under another name."""
    made = types.ModuleType(f"{module.__name__}_mutant")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    exec(compile(source, made.__name__, "exec"), vars(made))
    return made


def right(calls, problem, names) -> bool:
    """Whether these outputs of the kernels that `calls` calls are as the truth."""
    (q, k, v, d_out, d_lse), mask, truth = problem
    arrays = tuple(map(jnp.asarray, (q, k, v)))
    tiles = calls.AttentionTiles(8, 8, 8, 8)
    plan = calls.plan(
        *arrays, mask=mask, scale=SCALE, cap=CAP, q_start=STARTS[0], k_start=STARTS[1], tiles=tiles, interpret=True
    )
    if names == FORWARD:
        found = plan.forward(*arrays, mask, STARTS)
    else:
        out, lse = (jnp.asarray(truth[name], jnp.float32) for name in FORWARD)
        drop = dropped(out, jnp.asarray(d_out), jnp.asarray(d_lse))
        found = plan.backward(*arrays, mask, STARTS, lse, drop, jnp.asarray(d_out))
    try:
        return all(errors(a, truth[name])[0] < 3e-6 for name, a in zip(names, found, strict=True))
    except AssertionError:
        # Infinite where the truth is not.
        return False


@pytest.mark.parametrize("names", [FORWARD, BACKWARD])
def test_unbroken_kernels_are_right(problem, names):
    assert right(mosaic_tpu, problem, names)


@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_mutants_are_killed(problem, number, monkeypatch):
    module, names, old, new = MUTANTS[number]
    source = Path(module.__file__).read_text()
    assert old in source, f"{module.__name__} has no {old!r} any more"
    made = load(module, source.replace(old, new), monkeypatch)
    calls = made if module is mosaic_tpu else load(mosaic_tpu, Path(mosaic_tpu.__file__).read_text(), monkeypatch)
    if module is tpu_kernels:
        calls.tpu_kernels = made
    if module is labels:
        calls.labels, calls.kinds = made.labels, made.kinds
    assert not right(calls, problem, names), f"{old!r} -> {new!r} makes no difference"


GPU_SHAPE, GPU_STARTS = (1, 128, 256, 2, 1, 16), (200, 0)
GPU_MUTANTS = (
    (gpu_kernels, FORWARD, "sums = sums * wide(shrink, settings.size)", "sums = sums"),
    (gpu_kernels, FORWARD, "jnp.where(top == -jnp.inf, 0.0, top)", "top"),
    (gpu_kernels, FORWARD, "jnp.log(share) + top * LOG2", "jnp.log(share) + top"),
    (gpu_kernels, FORWARD, "pl.ds((x.first + n) * settings.columns", "pl.ds(n * settings.columns"),
    (gpu_kernels, FORWARD, "(first <= j) & (j <= last)", "j <= last"),
    (gpu_kernels, FORWARD, "    plgpu.commit_smem()\n    q, k", "    q, k"),
    (gpu_kernels, FORWARD, "pl.when(step >= settings.stages)", "pl.when(step > settings.stages)"),
    (mosaic_gpu, FORWARD, 'q_high["index"] - k_low["index"] <', 'q_low["index"] - k_low["index"] <'),
    (gpu_kernels, BACKWARD, "1 - bent * bent", "1 - bent"),
    (gpu_kernels, BACKWARD, "x.head * settings.shared + lax.div(n, x.steps)", "x.head * settings.shared"),
    (gpu_kernels, BACKWARD, "d_weights - wide(drop)", "d_weights"),
    (mosaic_gpu, BACKWARD, "jnp.swapaxes(clear, 1, 2)", "clear.reshape(1, 2, 2)"),
    (gpu_fused, BACKWARD, "x.k_tile.at[w, :, mine]", "x.k_tile.at[0, :, mine]"),
    (gpu_fused, BACKWARD, "@pl.when(n > 0)", "@pl.when(n > 1)"),
    (gpu_fused, BACKWARD, "send(steps, dq.value())", "dq.value()"),
    (gpu_fused, BACKWARD, "d_logits.at[lax.rem(n, 2), w]", "d_logits.at[lax.rem(n + 1, 2), w]"),
    (gpu_fused, BACKWARD, "plgpu.barrier_wait(x.both)\n        d_logits = write", "d_logits = write"),
)
GPU_LIMITS = {"out": 1e-3, "lse": 3e-6, "dq": 2e-3, "dk": 2e-3, "dv": 2e-3}
interpreted = pytest.mark.skipif(
    not gpu.MAY_INTERPRET, reason=f"JAX interprets Mosaic GPU kernels from 0.11 on, this is {jax.__version__}"
)


@pytest.fixture(scope="module")
def gpu_problem():
    """Of the key steps of 64 the first is another document, the next holds two, the third is out of some queries' windows
    and not of others', and in the last all is seen."""
    given = [x.astype(np.float16).astype(np.float32) for x in draw(0, *GPU_SHAPE)]
    B, T, S = GPU_SHAPE[:3]
    k_segments = np.repeat([[1, 2]], [100, S - 100], axis=1).astype(np.int32)
    mask = MaskSpec(causal=False, window=180, q_segments=np.full((B, T), 2, np.int32), k_segments=k_segments)
    seen = seen_by(mask, B, T, S, *GPU_STARTS)
    return given, mask, dict(zip(FORWARD + BACKWARD, float64(*given, seen, SCALE, CAP), strict=True))


def right_on_gpu(calls, gpu_problem, names, kernels_back: int) -> bool:
    """As `right`; kernels that the interpreter stops for a race, or a barrier that nobody waits at, are not."""
    given, mask, truth = gpu_problem
    q, k, v, d_out = (jnp.asarray(x, jnp.float16) for x in given[:4])
    tiles, careful = (
        calls.AttentionTiles(64, 64, 64, kernels_back=kernels_back),
        plgpu.InterpretGPUParams(detect_races=True),
    )
    plan = calls.plan(q, k, v, mask=mask, scale=SCALE, cap=CAP, tiles=tiles, interpret=careful)
    try:
        if names == FORWARD:
            found = jax.jit(lambda *x: plan.forward(*x, mask, GPU_STARTS))(q, k, v)
        else:
            out, lse = (jnp.asarray(truth[name], jnp.float32) for name in FORWARD)
            drop = dropped(out, jnp.asarray(given[3]), jnp.asarray(given[4]))
            found = jax.jit(lambda *x: plan.backward(*x[:3], mask, GPU_STARTS, *x[3:]))(q, k, v, lse, drop, d_out)
        found = [np.asarray(x) for x in found]
    except jax.errors.JaxRuntimeError as error:
        if not re.search("RACE DETECTED|no threads observed phase", str(error)):
            raise
        # What the interpreter stopped in the middle of.
        gpu.reset_interpreter()
        return False
    try:
        return all(errors(a, truth[name])[0] < GPU_LIMITS[name] for name, a in zip(names, found, strict=True))
    except AssertionError:
        return False


@interpreted
@pytest.mark.quick
@pytest.mark.parametrize(("names", "kernels_back"), [(FORWARD, 1), (BACKWARD, 1), (BACKWARD, 2)])
def test_unbroken_gpu_kernels_are_right(gpu_problem, names, kernels_back):
    assert right_on_gpu(mosaic_gpu, gpu_problem, names, kernels_back)


@interpreted
@pytest.mark.quick
@pytest.mark.parametrize("number", range(len(GPU_MUTANTS)))
def test_gpu_mutants_are_killed(gpu_problem, number, monkeypatch):
    module, names, old, new = GPU_MUTANTS[number]
    source = Path(module.__file__).read_text()
    assert old in source, f"{module.__name__} has no {old!r} any more"
    made = load(module, source.replace(old, new), monkeypatch)
    calls = made if module is mosaic_gpu else load(mosaic_gpu, Path(mosaic_gpu.__file__).read_text(), monkeypatch)
    if module is not mosaic_gpu:
        setattr(calls, module.__name__.rpartition(".")[2], made)
    kernels_back = 2 if module is gpu_kernels else 1
    assert not right_on_gpu(calls, gpu_problem, names, kernels_back), f"{old!r} -> {new!r} makes no difference"
