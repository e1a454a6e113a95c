"""One-line breakages of the TPU attention kernels: the comparison with float64 sees every one of them."""

import sys
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.pallas_kernels.attention import MaskSpec, labels, mosaic_tpu, tpu_kernels
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
