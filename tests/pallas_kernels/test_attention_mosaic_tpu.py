"""The TPU attention kernels in Pallas' interpreter: against float64, no worse than 1.5 times plain XLA, and what they must
not read, skip or ignore. `test_attention_mutants` shows that these checks see what is wrong."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

from jaxpar.pallas_kernels import versions
from jaxpar.pallas_kernels.attention import MaskSpec, attention, mosaic_tpu
from jaxpar.pallas_kernels.attention.differentiable import attend
from jaxpar.pallas_kernels.attention.labels import labels
from jaxpar.pallas_kernels.attention.xla import xla_plan
from tests.pallas_kernels import attention_cases
from tests.pallas_kernels.attention_cases import (
    INPUTS,
    NAMES,
    arguments,
    documents,
    draw,
    errors,
    no_worse,
    program,
    seen_by,
    truth,
)

Case = partial(attention_cases.Case, tiles=mosaic_tpu.AttentionTiles(16, 8, 8, 16))
CEILINGS = {jnp.bfloat16: 8e-3, jnp.float32: 2e-6}
"""Of the relative error of normal data, whatever XLA's is."""
UNITS = {jnp.bfloat16: 2**-8, jnp.float32: 2**-18}
"""A difference that is rounding, where XLA has less by luck: a unit in the last place, and in float32 what sums add to it."""
WINDOW = jnp.int32(9)


CASES = {
    "causal, grouped, padded": Case((2, 40, 40, 4, 2, 64), MaskSpec(), jnp.bfloat16),
    "all at once": Case(
        (2, 24, 36, 4, 2, 96),
        MaskSpec(window=WINDOW, q_segments=documents(2, 24, 0), k_segments=documents(2, 36, 1)),
        starts=(13, 3),
        cap=4.0,
    ),
    "bidirectional, exact": Case((1, 32, 16, 2, 2, 128), MaskSpec(causal=False)),
    "window known": Case((1, 48, 48, 2, 1, 256), MaskSpec(window=7), jnp.bfloat16),
    "ragged cache": Case(
        (2, 8, 24, 2, 1, 64),
        MaskSpec(
            window=11,
            q_index=np.array([np.arange(3, 11), np.arange(15, 23)], np.int32),
            k_index=np.broadcast_to(np.arange(24, dtype=np.int32), (2, 24)),
        ),
    ),
}


@cache
def programs(name):
    """The case's kernels, and XLA: `(q, k, v, d_out, d_lse, mask, starts) -> out, lse, dq, dk, dv`, compiled once."""
    case = CASES[name]

    kernels = lambda *x, **more: mosaic_tpu.plan(*x, tiles=case.tiles, interpret=True, **more)
    return program(case, kernels), program(case, xla_plan)


@pytest.mark.parametrize("name", CASES)
def test_against_float64_no_worse_than_xla(name):
    """Kernels run before and after XLA, with the same bits: nothing is left in memory for them to find."""
    case = CASES[name]
    kernels, xla = programs(name)
    for kind in INPUTS if name in ("all at once", "causal, grouped, padded") else ("normal",):
        if kind == "large logits" and case.cap is not None:
            # The slope of the cap, 1 - tanh², has no digits left there, whoever computes it.
            continue
        given = arguments(case, kind)
        found = kernels(*given, case.mask, case.starts)
        theirs = xla(*given, case.mask, case.starts)
        again = kernels(*given, case.mask, case.starts)
        for label, a, b, c, expected in zip(NAMES, found, theirs, again, truth(case, given), strict=True):
            np.testing.assert_array_equal(a, c)
            assert a.dtype == b.dtype
            unit = UNITS[jnp.float32 if label == "lse" else case.dtype]
            ours, xlas = errors(a, expected), errors(b, expected)
            no_worse(ours, xlas, unit, (kind, label))
            if kind == "normal":
                assert ours[0] <= CEILINGS[case.dtype], (label, ours)
                # Nothing passes by being small.
                assert np.sqrt(np.mean(expected[np.isfinite(expected)] ** 2)) > 0.01, label


def test_every_argument_matters_as_much_as_in_float64():
    """A small change of each input moves each output as it moves the truth."""
    case = CASES["all at once"]
    kernels, _ = programs("all at once")
    base, direction = arguments(case), arguments(case, seed=1)
    before, expected_before = kernels(*base, case.mask, case.starts), truth(case, base)
    for n, argument in enumerate(("q", "k", "v", "d_out", "d_lse")):
        moved = tuple(x + 0.1 * d if n == i else x for i, (x, d) in enumerate(zip(base, direction, strict=True)))
        after, expected_after = kernels(*moved, case.mask, case.starts), truth(case, moved)
        for label, *four in zip(NAMES, before, after, expected_before, expected_after, strict=True):
            finite = np.isfinite(four[2])
            (a, b), (x, y) = ([np.asarray(z, np.float64)[finite] for z in pair] for pair in (four[:2], four[2:]))
            found, expected = b - a, y - x
            if not expected.any():
                assert np.abs(found).max() == 0, (argument, label)
            else:
                cosine = found @ expected / (np.linalg.norm(found) * np.linalg.norm(expected))
                assert cosine > 0.999, (argument, label)


def test_masks_and_offsets_are_data():
    """One program, other windows, documents and offsets: none of them is built in."""
    case = CASES["all at once"]
    kernels, _ = programs("all at once")
    given = arguments(case)
    changes = (
        {"mask": case.mask.replace(window=jnp.int32(2))},
        {"mask": case.mask.replace(q_segments=documents(2, 24, 5), k_segments=documents(2, 36, 6))},
        {"starts": (3, 13)},
        {"starts": (100, 0)},
        {"starts": (0, 100)},
    )
    for change in changes:
        other = replace(case, **change)
        found = kernels(*given, other.mask, other.starts)
        for label, a, expected in zip(NAMES, found, truth(other, given), strict=True):
            if np.isfinite(expected).any() and np.where(np.isfinite(expected), expected, 0).any():
                assert errors(a, expected)[0] < 2e-6, (change, label)
            else:
                # Nothing is seen: exactly nothing comes out.
                np.testing.assert_array_equal(a, expected)


def test_blocks_that_nothing_sees_are_not_read():
    """NaN in keys and values that are ahead of every query, or in front of every window."""
    case = CASES["all at once"]
    kernels, _ = programs("all at once")
    q, k, v, d_out, d_lse = arguments(case)
    mask = case.mask.replace(q_segments=np.ones((2, 24), np.int32), k_segments=np.ones((2, 36), np.int32))
    for starts, hidden in (((0, 3), slice(32, None)), ((30, 0), slice(0, 16))):
        spoilt = [x.at[:, hidden].set(jnp.nan) for x in (k, v)]
        found = kernels(q, *spoilt, d_out, d_lse, mask, starts)
        clean = kernels(q, k, v, d_out, d_lse, mask, starts)
        for label, a, b in zip(NAMES, found, clean, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=label)
        assert not np.asarray(found[3])[:, hidden].any()
        assert np.abs(np.asarray(found[3])).max() > 0.01


@pytest.mark.quick
def test_the_needed_blocks_are_those_that_are_seen():
    """Sides of 24 and 40, blocks of 8 and 16, against each mask's definition. Every block between the first and the last
    is needed too."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        start, first = int(rng.integers(0, 50)), int(rng.integers(0, 20))
        segments = [documents(2, n, int(rng.integers(100))) for n in (24, 40)] if rng.random() < 0.5 else (None, None)
        window = int(rng.integers(1, 40)) if rng.random() < 0.5 else None
        mask = MaskSpec(bool(rng.random() < 0.5), window, *segments)
        found = labels(mask, (start, first), (24, 40), (8, 16))
        seen = np.pad(seen_by(mask, 2, 24, 40, start, first), ((0, 0), (0, 0), (0, 8)))
        needed = seen.reshape(2, 3, 8, 3, 16).any(axis=(2, 4))
        for pairs, span in ((needed, found.keys), (np.swapaxes(needed, 1, 2), found.queries)):
            for b, i in np.ndindex(2, 3):
                lo, hi = (int(x[b % len(x), i]) for x in span)
                at = np.flatnonzero(pairs[b, i])
                # Blocks are told apart by their ends alone: never one too few.
                assert not len(at) or (lo <= at[0] and at[-1] <= hi)
                if segments[0] is None:
                    assert (lo, hi) == ((at[0], at[-1]) if len(at) else (0, -1))


def test_no_races_and_nothing_read_that_was_not_written(capsys):
    """JAX's TPU interpreter: memory is NaN until it is written, parallel blocks come in any order, reads out of bounds raise,
    and copies that race are found. The results are those of the other interpreter."""
    case = Case((1, 16, 16, 2, 1, 8), MaskSpec(q_segments=documents(1, 16, 0), k_segments=documents(1, 16, 0)))
    given = arguments(case)
    careful = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", random_seed=3)
    tiles = mosaic_tpu.AttentionTiles(8, 8, 8, 8)

    def run(interpret):
        plan = mosaic_tpu.plan(*given[:3], mask=case.mask, scale=case.scale, tiles=tiles, interpret=interpret)
        (out, lse), back = jax.vjp(lambda *x: attend(plan, *x, case.mask, case.starts), *given[:3])
        return out, lse, *back(given[3:])

    for a, expected in zip(run(careful), truth(case, given), strict=True):
        assert errors(a, expected)[0] < 2e-6
    assert "RACE" not in capsys.readouterr().out


def test_the_public_function_runs_it():
    """Blocks of the table, more queries than one block holds, and a batch dimension from outside."""
    q, k, v, *_ = (jnp.asarray(x) for x in draw(0, 3, 140, 150, 2, 1, 8))
    call = lambda name, **more: jax.vmap(
        lambda q, k, v: attention(
            q, k, v, mask=MaskSpec(), scale=0.3, q_start=10, lse_out=True, implementation=name, **more
        )
    )(q[:, None], k[:, None], v[:, None])
    for a, b in zip(call("mosaic_tpu", interpret=True), call("xla"), strict=True):
        assert errors(a, np.asarray(b, np.float64))[0] < 2e-6


def test_one_trace_for_two_platforms_has_one_gradient(monkeypatch, devices):
    """Inside a shard_map, where it is chosen: kernels where the trace is lowered for a TPU, XLA on a CPU. What is kept between
    the passes is the same, and kept once."""
    monkeypatch.setattr(versions, "platforms", lambda: ("cpu", "tpu"))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("data")
    one = lambda q, k, v: jnp.sum(attention(q, k, v, mask=MaskSpec(), scale=0.3) ** 2)
    local = lambda q, k, v: jax.grad(one, (0, 1, 2))(q, k, v)
    traced = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows)).trace(
        *(jnp.ones((8, 128, heads, 8)) for heads in (2, 1, 1))
    )
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    assert text["tpu"].count("@tpu_custom_call") == 3
    assert text["cpu"].count("@tpu_custom_call") == 0
    _, kept = jax.eval_shape(
        lambda q: jax.vjp(lambda q: attention(q, q, q, mask=MaskSpec(), scale=0.3), q), jnp.ones((1, 128, 1, 8))
    )
    # q as queries, keys and values, out, and the log-sum-exp, besides numbers.
    assert sum(x.size for x in jax.tree.leaves(kept)) <= 4 * 128 * 8 + 128 + 16


@pytest.mark.quick
def test_what_it_cannot_do_is_one_sentence():
    q = jnp.ones((1, 4, 2, 8))
    call = lambda q=q, **more: attention(
        q, q, q, mask=MaskSpec(), scale=1.0, implementation="mosaic_tpu", **{"interpret": True, **more}
    )
    for bad, words in [
        (lambda: call(q.astype(jnp.float16)), "takes bfloat16 or float32, got float16"),
        (lambda: call(q[..., :7]), "a multiple of 8 up to 256, got 7"),
        (lambda: call(q[:, :0]), "at least, got 1, 0 and 0"),
        (lambda: call(interpret=False), "runs on TPUs, and here are CPUs only"),
    ]:
        with pytest.raises(ValueError, match=words) as found:
            bad()
        assert "\n" not in str(found.value)
