"""The Hopper attention kernels in JAX's Mosaic GPU interpreter: against float64, no worse than 1.5 times plain XLA, without
races. `test_attention_mutants` shows that these checks see what is wrong, `test_attention_cuda_aot` that a GPU's compiler
takes the kernels."""

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, PartitionSpec

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.attention import ATTENTION, MaskSpec, attention, mosaic_gpu
from jaxpar.pallas_kernels.attention.labels import kinds, labels
from jaxpar.pallas_kernels.attention.xla import xla_plan
from jaxpar.pallas_kernels.dispatch import explain
from tests.pallas_kernels.attention_cases import (
    NAMES,
    Case,
    arguments,
    documents,
    draw,
    errors,
    no_worse,
    program,
    seen_by,
    truth,
)

pytestmark = pytest.mark.quick
interpreted = pytest.mark.skipif(
    not gpu.MAY_INTERPRET, reason=f"JAX interprets Mosaic GPU kernels from 0.11 on, this is {jax.__version__}"
)

TILES = mosaic_gpu.AttentionTiles(64, 64, 64)
CEILINGS = {jnp.bfloat16: 8e-3, jnp.float16: 1e-3, jnp.float32: 1e-6}
UNITS = {jnp.bfloat16: 2**-8, jnp.float16: 2**-11, jnp.float32: 2**-18}
"""As in `test_attention_mosaic_tpu`."""
CASES = {
    "causal, grouped, more steps than stages": Case((1, 160, 160, 2, 1, 64), MaskSpec(), jnp.bfloat16, tiles=TILES),
    "all at once": Case(
        (2, 70, 180, 1, 1, 80),
        MaskSpec(window=jnp.int32(100), q_segments=documents(2, 70, 0), k_segments=documents(2, 180, 1)),
        jnp.float16,
        starts=(90, 3),
        cap=4.0,
        tiles=mosaic_gpu.AttentionTiles(128, 128, 128),
    ),
    "backward in two kernels": Case(
        (1, 160, 160, 2, 1, 64), MaskSpec(), jnp.bfloat16, tiles=replace(TILES, kernels_back=2)
    ),
    "bidirectional, exact": Case(
        (1, 128, 128, 1, 1, 256), MaskSpec(causal=False), jnp.bfloat16, tiles=mosaic_gpu.TABLE[-1].tiles
    ),
}
DEVICES = [AbstractDevice(device_kind=kind, num_cores=132, platform="gpu") for kind in ("NVIDIA H200", "NVIDIA B200")]
H200, B200 = (AbstractMesh((), (), abstract_device=device) for device in DEVICES)
TWO = AbstractMesh((2,), ("data",), axis_types=(AxisType.Auto,), abstract_device=DEVICES[0])


@cache
def programs(name):
    """As in `test_attention_mosaic_tpu`; the interpreter raises where copies and reads race."""
    case = CASES[name]

    careful = plgpu.InterpretGPUParams(detect_races=True)
    kernels = lambda *x, **more: mosaic_gpu.plan(*x, tiles=case.tiles, interpret=careful, **more)
    return program(case, kernels), program(case, xla_plan)


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_against_float64_no_worse_than_xla(name):
    case = CASES[name]
    kernels, xla = programs(name)
    given = arguments(case)
    found, theirs = (run(*given, case.mask, case.starts) for run in (kernels, xla))
    for label, a, b, expected in zip(NAMES, found, theirs, truth(case, given), strict=True):
        assert a.dtype == b.dtype
        dtype = jnp.float32 if label == "lse" else case.dtype
        ours, xlas = errors(a, expected), errors(b, expected)
        no_worse(ours, xlas, UNITS[dtype], label)
        assert ours[0] <= CEILINGS[dtype], (label, ours)
        # Nothing passes by being small.
        assert np.sqrt(np.mean(expected[np.isfinite(expected)] ** 2)) > 0.01, label


@interpreted
@pytest.mark.parametrize(("start", "hidden"), [(40, slice(128, None)), (150, slice(0, 128))])
def test_masks_and_offsets_are_data_and_what_nothing_sees_is_not_read(start, hidden):
    """The same program, another window, documents and offsets; NaN in keys that are ahead of every query, or behind every
    window."""
    base = CASES["all at once"]
    ones = np.ones((2, 70), np.int32), np.ones((2, 180), np.int32)
    mask = base.mask.replace(window=jnp.int32(7), q_segments=ones[0], k_segments=ones[1])
    case = replace(base, mask=mask, starts=(start, 0))
    q, k, v, d_out, d_lse = given = arguments(case, seed=1)
    spoilt = [x.at[:, hidden].set(jnp.nan) for x in (k, v)]
    found = programs("all at once")[0](q, *spoilt, d_out, d_lse, case.mask, case.starts)
    for label, a, expected in zip(NAMES, found, truth(case, given), strict=True):
        assert errors(a, expected)[0] < CEILINGS[jnp.float32 if label == "lse" else jnp.float16], label
    assert not np.asarray(found[3])[:, hidden].any()


@interpreted
def test_the_public_function_runs_it_and_again_under_vmap():
    """Steps of the table."""
    q, k, v, *_ = (jnp.asarray(x, jnp.bfloat16) for x in draw(0, 2, 20, 30, 1, 1, 24))
    call = lambda *x, **more: attention(*x, mask=MaskSpec(), scale=0.3, lse_out=True, **more)
    run = lambda *x: call(*x, implementation="mosaic_gpu", interpret=True)
    found = jax.jit(jax.vmap(run))(*(x[:, None] for x in (q, k, v)))
    for a, expected in zip(found, call(q, k, v, implementation="xla"), strict=True):
        assert errors(a[:, 0], np.asarray(expected, np.float64))[0] < 4e-3


@pytest.mark.skipif(gpu.MAY_INTERPRET, reason="JAX 0.11 or newer has an interpreter")
def test_an_old_jax_says_that_it_cannot_interpret():
    q = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match=f"from JAX 0.11 on, and this is JAX {jax.__version__}"):
        attention(q, q, q, mask=MaskSpec(), scale=1.0, implementation="mosaic_gpu", interpret=True)


def test_the_runs_of_blocks_that_need_no_mask_are_those_of_which_all_is_seen():
    """Blocks of 8 queries and 16 keys, against each mask's definition; what is said to be clear is, and none is missed where
    one follows another."""
    rng = np.random.default_rng(0)
    cleared = 0

    @jax.jit
    def runs(mask, starts):
        found = labels(mask, starts, (24, 72), (8, 16))
        return mosaic_gpu.run_of(mosaic_gpu.may_be_clear(kinds(mask, padded=True), found, (8, 16)))

    for number in range(24):
        start, first = int(rng.integers(0, 50)), int(rng.integers(0, 20))
        causal, windowed, packed = ((True, False, False), (True, True, False), (False, False, True))[number % 3]
        segments = [np.sort(rng.integers(0, 2, (2, n)), axis=1) for n in (24, 72)] if packed else (None, None)
        mask = MaskSpec(causal, np.int32(rng.integers(16, 60)) if windowed else None, *segments)
        lo, hi = map(np.asarray, runs(mask, (start, first)))
        seen = np.pad(seen_by(mask, 2, 24, 72, start, first), ((0, 0), (0, 0), (0, 8)))
        every = seen.reshape(2, 3, 8, 5, 16).all(axis=(2, 4))
        for b, i in np.ndindex(2, 3):
            row = b % len(lo)
            at = np.arange(lo[row, i], hi[row, i] + 1)
            assert every[b, i, at].all()
            if len(at):
                assert at[-1] == 4 or not every[b, i, at[-1] + 1]
            else:
                assert not every[b, i].any()
            cleared += len(at)
    assert cleared > 40


def test_who_gets_the_kernel():
    shape = lambda *sizes, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(sizes, dtype)
    q, k, wide = shape(1, 256, 4, 64), shape(1, 256, 2, 64), shape(1, 256, 2, 264)
    call = dict(mask=MaskSpec(), scale=1.0, lse_out=True)
    reason = lambda *x, **more: {v.name: v for v in explain(ATTENTION, *x, **call | more)}["mosaic_gpu"].reason
    assert reason(q, k, k) == "runs on NVIDIA GPUs, and here are CPUs only"
    assert reason(wide, wide, wide).endswith("got 264")
    assert reason(*[shape(1, 8, 2, 64, dtype=jnp.float32)] * 3) == "takes bfloat16 or float16, got float32"
    assert reason(q, shape(1, 0, 2, 64), shape(1, 0, 2, 64)).endswith("got 1, 256 and 0")
    with jax.sharding.use_abstract_mesh(B200):
        assert reason(q, k, k) == "is written for Hopper GPUs, and here is a NVIDIA B200"
    with jax.sharding.use_abstract_mesh(H200):
        assert reason(q, k, k) == "is chosen on NVIDIA GPUs"
        few = shape(1, 8, 4, 64)
        assert reason(few, k, k).endswith("only its name chooses it for fewer than 64, and here are 8")
        run = jax.jit(lambda *x: attention(*x, **call, implementation="mosaic_gpu"))
        text = run.trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    with pytest.raises(ValueError, match="keys must be 64 or 128 tokens, got 96"):
        mosaic_gpu.AttentionTiles(96, 64, 64)
    with pytest.raises(ValueError, match="kernels_back must be 1 or 2, got 3"):
        mosaic_gpu.AttentionTiles(64, 64, 64, kernels_back=3)
    with pytest.raises(ValueError, match="stages_q must be at least 1 step, got 0"):
        mosaic_gpu.AttentionTiles(64, 64, 64, stages_q=0)


def test_it_lowers_forward_and_backward_for_a_gpu_inside_a_shard_map():
    """Where JAX keeps account of what differs between devices."""
    q = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)

    def both(q):
        call = lambda q: attention(q, q, q, mask=MaskSpec(), scale=1.0, implementation="mosaic_gpu")
        out, back = jax.vjp(call, q)
        return back(out)[0]

    with jax.sharding.use_abstract_mesh(TWO):
        spec = PartitionSpec("data")
        split = jax.jit(jax.shard_map(both, mesh=TWO, in_specs=spec, out_specs=spec))
        text = split.trace(q).lower(lowering_platforms=("cuda",)).as_text()
    kernels = ["backward_dk_dv"] if gpu.MAY_ADD else ["backward_k_dk_dv", "backward_q_dq"]
    assert sorted(set(re.findall(r"attention_((?:for|back)ward\w+?)_mosaic_gpu", text))) == [
        *kernels,
        "forward_out_lse",
    ]
