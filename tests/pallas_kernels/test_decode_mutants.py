"""One-line breakages of the TPU decoding kernel: the comparison with float64 sees every one of them."""

from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxpar.pallas_kernels.attention import merging
from jaxpar.pallas_kernels.decode import mosaic_tpu, tpu_kernel
from tests.pallas_kernels.attention_cases import errors
from tests.pallas_kernels.decode_cases import Case, arguments, call, poisoned, truth
from tests.pallas_kernels.test_attention_mutants import load

CASE = Case(
    (3, 2, 48, 4, 2, 16),
    mosaic_tpu.DecodeTiles(0, 2),
    (0, 23, 48),
    jnp.float32,
    "int4_g8",
    8,
    window=16,
    cap=1.5,
    scale=0.9,
)
MUTANTS = (
    (tpu_kernel, "jnp.where(top == -jnp.inf, 0.0, top)", "top"),
    (tpu_kernel, "self.cap * jnp.tanh(found / self.cap)", "jnp.tanh(found / self.cap)"),
    (tpu_kernel, "(x.q_labels[:, :1] == x.k_labels[...]) & ", ""),
    (tpu_kernel, "jnp.minimum(index_Mx1 + 1, self.slots)", "jnp.minimum(index_Mx1, self.slots)"),
    (tpu_kernel, "index_Mx1 - window + 1 - place", "index_Mx1 - window - place"),
    (tpu_kernel, "jnp.where(row < held, values, jnp.zeros_like(values))", "values"),
    (tpu_kernel, "jnp.minimum((split + 1) * share, count)", "count"),
    (tpu_kernel, ">> (32 - self.bits)", ">> 24"),
    (mosaic_tpu, "(layer[0], table", "(0, table"),
    (mosaic_tpu, "x.scales[layer]", "x.scales[0]"),
    (mosaic_tpu, "n % heads // (heads // G)", "n % heads % G"),
    (mosaic_tpu, "queries - window + 1, 0)", "queries - window + 9, 0)"),
    (merging, "return each / whole", "return 1 / whole + 0 * each"),
)


@pytest.fixture(scope="module")
def problem():
    given = arguments(CASE)
    return poisoned(CASE, given), truth(CASE, given)


def right(calls, problem) -> bool:
    given, expected = problem
    found = call(CASE, calls.decode_mosaic_tpu, tiles=CASE.tiles, interpret=True)(*given)
    try:
        return all(errors(a, b)[0] < 3e-6 for a, b in zip(found, expected, strict=True))
    except AssertionError:
        # Not finite where the truth is.
        return False


def test_the_unbroken_kernel_is_right(problem):
    assert right(mosaic_tpu, problem)


@pytest.mark.parametrize("number", range(len(MUTANTS)))
def test_mutants_are_killed(problem, number, monkeypatch):
    module, old, new = MUTANTS[number]
    source = Path(module.__file__).read_text()
    assert old in source, f"{module.__name__} has no {old!r} any more"
    made = load(module, source.replace(old, new), monkeypatch)
    calls = made if module is mosaic_tpu else load(mosaic_tpu, Path(mosaic_tpu.__file__).read_text(), monkeypatch)
    if module is tpu_kernel:
        calls.Settings, calls.decode = made.Settings, made.decode
    if module is merging:
        calls.merge = made.merge
    assert not right(calls, problem), f"{old!r} -> {new!r} makes no difference"
