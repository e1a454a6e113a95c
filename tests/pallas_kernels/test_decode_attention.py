"""Decoding against float64, in plain XLA and by the TPU kernel in Pallas' interpreter: caches of every kind, ragged lengths,
split rows, pages; what must not be read, and what must not be ignored. `test_decode_mutants` shows that these checks see
what is wrong."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxpar.pallas_kernels import versions
from jaxpar.pallas_kernels.attention import MaskSpec, attention
from jaxpar.pallas_kernels.attention.merging import merge
from jaxpar.pallas_kernels.decode import DECODE_ATTENTION, decode_attention, mosaic_tpu
from jaxpar.pallas_kernels.decode.tpu_kernel import Settings
from jaxpar.pallas_kernels.decode.xla import decode_xla
from jaxpar.pallas_kernels.formats.quantised import quantise
from tests.pallas_kernels.attention_cases import errors, no_worse
from tests.pallas_kernels.decode_cases import Case, arguments, call, check_data, poisoned, truth

Tiles = mosaic_tpu.DecodeTiles
CASES = {
    "grouped, split": Case((3, 1, 200, 4, 2, 64), Tiles(128, 2), (200, 1, 77), jnp.bfloat16),
    "several queries, window, cap": Case((3, 5, 100, 8, 4, 32), Tiles(128, 3), (100, 3, 61), window=40, cap=3.0),
    "int8 rows": Case((2, 1, 160, 4, 2, 64), Tiles(128, 1), (0, 150), jnp.bfloat16, "int8_row", window=9, known=True),
    "int4 blocks": Case((2, 3, 96, 4, 4, 64), Tiles(128, 2), (96, 40), jnp.float32, "int4_g32"),
    "pages": Case((2, 2, 96, 4, 2, 32), Tiles(0, 2), (50, 95), page=16, window=30),
}
CEILINGS = {jnp.bfloat16: 8e-3, jnp.float32: 2e-6}
"""Of the relative error, whatever XLA's is."""
UNITS = {jnp.bfloat16: 2**-8, jnp.float32: 2**-18}
"""A difference that is rounding, where XLA has less by luck."""


@cache
def programs(name):
    case = CASES[name]
    return call(case, mosaic_tpu.decode_mosaic_tpu, tiles=case.tiles, interpret=True), call(case, decode_xla)


@pytest.mark.parametrize("name", CASES)
def test_against_float64_no_worse_than_xla(name):
    """The kernel runs before and after XLA, with the same bits; and with NaN in every slot that no row holds."""
    case = CASES[name]
    kernel, xla = programs(name)
    given = arguments(case)
    spoilt = poisoned(case, given)
    found, theirs, again, clean = kernel(*spoilt), xla(*spoilt), kernel(*spoilt), kernel(*given)
    for label, a, b, c, d, expected in zip(
        ("out", "lse"), found, theirs, again, clean, truth(case, given), strict=True
    ):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(a, d)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        unit = UNITS[jnp.float32 if label == "lse" else case.dtype]
        ours, xlas = errors(a, expected), errors(b, expected)
        no_worse(ours, xlas, unit, label)
        assert max(ours[0], xlas[0]) <= CEILINGS[case.dtype], (label, ours, xlas)
        # Nothing passes by being small.
        assert np.sqrt(np.mean(expected[np.isfinite(expected)] ** 2)) > 0.01, label


def test_every_argument_matters_as_much_as_in_float64():
    """Queries, keys and values move the output as they move the truth; lengths, windows and page tables are data."""
    name = "pages"
    case, (kernel, _) = CASES[name], programs(name)
    base, direction = arguments(case), arguments(case, seed=1)
    before, expected_before = kernel(*base), truth(case, base)
    for n in range(3):
        moved = tuple(x + 0.1 * d if n == i else x for i, (x, d) in enumerate(zip(base, direction, strict=True)))
        after, expected_after = kernel(*moved), truth(case, moved)
        for label, *four in zip(("out", "lse"), before, after, expected_before, expected_after, strict=True):
            a, b, x, y = (np.asarray(z, np.float64).ravel() for z in four)
            if label == "lse" and n == 2:
                np.testing.assert_array_equal(a, b)
                continue
            assert (b - a) @ (y - x) / (np.linalg.norm(b - a) * np.linalg.norm(y - x)) > 0.999, (n, label)
    *_, lens, window, table = base
    swapped = table.at[:, 2].set(table[::-1, 2])
    others = (
        (lens - 20, window, table),
        (lens, window - 25, table),
        (lens, jnp.int32(2**30), table),
        (lens, window, swapped),
        (lens * 0, window, table),
    )
    check_data(kernel, case, base, others, 2e-6)


def test_hard_inputs():
    """Outlier channels, all keys equal, and logits of hundreds."""
    name = "several queries, window, cap"
    case, (kernel, xla) = CASES[name], programs(name)
    q, k, v, *rest = arguments(case)
    channel = jnp.where(jnp.arange(q.shape[-1]) % 16 == 3, 20.0, 1.0)
    for given in (
        (q * channel[None, None, None], k, v * channel[None, None, None, None], *rest),
        (q, jnp.full_like(k, 0.5), v, *rest),
        (30 * q, 10 * k, v, *rest),
    ):
        expected = truth(case, given)
        for a, b, c in zip(kernel(*given), xla(*given), expected, strict=True):
            assert errors(a, c)[0] <= max(1.5 * errors(b, c)[0], UNITS[jnp.float32])


@pytest.mark.quick
def test_only_needed_blocks_are_fetched_and_each_is_computed_once():
    """The blocks of a grid against each row's definition; a step without one stays where it was, and fetches nothing."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        T, S, tokens, splits = (int(rng.integers(*ends)) for ends in ((1, 17), (1, 200), (4, 40), (1, 4)))
        window = int(rng.integers(1, 80)) if rng.random() < 0.6 else None
        lens = rng.integers(0, S + 30, 5).astype(np.int32)
        lens[:2] = 0, S
        settings = Settings(1.0, None, window is not None, splits, T, 1, S, tokens, None, None)
        first, count = mosaic_tpu.needed(settings, jnp.asarray(lens), window)
        steps = -(-mosaic_tpu.most_blocks(settings, window) // splits)
        # More steps than there are, for one shape.
        split, step, row = np.meshgrid(np.arange(3), np.arange(64), np.arange(5), indexing="ij")
        at, there = (np.asarray(x)[:splits, :steps] for x in settings.block(split, step, first[row], count[row]))
        assert at.min() >= 0
        assert at.max() <= (S - 1) // tokens
        for b, n in enumerate(lens):
            index = n - T + np.arange(T)[:, None]
            seen = (np.arange(S) <= index) & ((window is None) | (np.arange(S) > index - (window or 0)))
            needed = sorted(set(np.flatnonzero(seen.any(0)) // tokens))
            found = sorted(at[..., b][there[..., b]])
            # Behind its last slot, a row that ran further computes a block for nothing.
            assert (
                found == needed or (n > S and not needed and len(found) <= 1) or (n > S and set(needed) <= set(found))
            )
            fetched = at[..., b]
            for s in range(splits):
                moves = fetched[s, 1:] != fetched[s, :-1]
                assert not (moves & ~there[s, 1:, b]).any()


def test_no_races_and_nothing_read_that_was_not_written(capsys):
    """JAX's TPU interpreter: memory is NaN until it is written, and copies that race are found."""
    case = CASES["int4 blocks"]
    careful = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", random_seed=3)
    small = replace(case, shape=(1, 1, 64, 4, 4, 32), lens=(40,))
    run = call(small, mosaic_tpu.decode_mosaic_tpu, tiles=small.tiles, interpret=careful)
    given = arguments(small)
    for a, expected in zip(run(*given), truth(small, given), strict=True):
        assert errors(a, expected)[0] < 2e-6
    assert "RACE" not in capsys.readouterr().out


@pytest.mark.quick
def test_merged_parts_are_the_whole():
    """Attention over three parts of the keys, one of which is seen by nobody, against attention over all of them."""
    rng = np.random.default_rng(0)
    logits, values = (
        rng.standard_normal((4, 30)).astype(np.float32) * 5,
        rng.standard_normal((30, 6)).astype(np.float32),
    )
    logits[:, 20:] = logits[0, :20] = -np.inf
    parts = []
    for part in (slice(0, 10), slice(10, 20), slice(20, 30)):
        total = np.exp(logits[:, part]).sum(axis=1, keepdims=True)
        lse = np.log(total[:, 0], out=np.full(4, -np.inf, np.float32), where=total[:, 0] > 0)
        parts.append((np.exp(logits[:, part]) @ values[part] / np.where(total == 0, 1, total), lse))
    out, lse = jax.jit(partial(merge, axis=1))(*(np.stack(x, axis=1) for x in zip(*parts, strict=True)))
    np.testing.assert_array_equal(out[0], np.zeros(6))
    assert lse[0] == -np.inf
    weights = np.exp(logits[1:].astype(np.float64))
    np.testing.assert_allclose(out[1:], weights @ values / weights.sum(1, keepdims=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse[1:], np.log(weights.sum(1)), rtol=1e-6)


def test_xla_is_attention_with_the_whole_cache_to_the_bit():
    """What generation computed before there was an op of its own."""
    q, k, v, lens, *_ = arguments(replace(CASES["several queries, window, cap"], window=None))
    index = jnp.broadcast_to(jnp.arange(100, dtype=jnp.int32)[None], (3, 100))
    mask = MaskSpec(window=jnp.int32(40), q_index=lens[:, None] - 5 + jnp.arange(5)[None], k_index=index)
    expected = jax.jit(lambda q, k, v: attention(q, k[1], v[1], mask=mask, scale=0.3, cap=3.0))(q, k, v)
    found = jax.jit(
        lambda q, k, v: decode_attention(q, k, v, lens, scale=0.3, window=jnp.int32(40), cap=3.0, layer=jnp.int32(1))
    )(q, k, v)
    np.testing.assert_array_equal(found, expected)


def test_the_public_function_runs_the_kernel_and_chooses_it_on_a_tpu(monkeypatch):
    q, k, v, lens, *_ = arguments(replace(CASES["pages"], page=None))
    run = lambda name, **more: decode_attention(
        q, k, v, lens, scale=0.3, layer=0, lse_out=True, implementation=name, **more
    )
    both = jax.jit(lambda: (run("mosaic_tpu", interpret=True), run("xla")))
    for a, b in zip(*both(), strict=True):
        assert errors(a, np.asarray(b, np.float64))[0] < 2e-6
    monkeypatch.setattr(versions, "platforms", lambda: ("cpu", "tpu"))
    monkeypatch.setattr(versions, "split_by_compiler", lambda: False)
    traced = jax.jit(lambda *x: decode_attention(*x, scale=0.3, layer=0)).trace(q, k, v, lens)
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    assert [text[name].count("@tpu_custom_call") for name in ("cpu", "tpu")] == [0, 1]


@pytest.mark.quick
def test_what_it_cannot_do_is_one_sentence():
    q, k, lens = jnp.ones((2, 1, 4, 8)), jnp.ones((2, 6, 2, 8)), jnp.ones(2, jnp.int32)
    kernel = dict(implementation="mosaic_tpu", interpret=True)
    run = lambda q=q, k=k, v=None, lens=lens, **more: decode_attention(
        q, k, k if v is None else v, lens, scale=1.0, **more
    )
    for bad, words in [
        (lambda: run(k=k[0]), "of 4 dimensions and one shape; got"),
        (lambda: run(layer=0), "of 5 dimensions and one shape; got"),
        (lambda: run(k=k[:, :, :, :4]), "must agree in rows and head size"),
        (lambda: run(q=q[:, :, :3]), "the 3 query heads must be a multiple of the 2 key/value heads"),
        (lambda: run(lens=lens[:1]), r"needs lens \[2\]; got \(1,\)"),
        (lambda: run(table_BxP=jnp.ones((1, 3), jnp.int32)), r"a page table \[2, pages\]; got \(2,\) and \(1, 3\)"),
        (lambda: run(v=quantise(k, "int8_row")), "of one kind; got float32, float32 and int8_row"),
        (lambda: run(window=0), "at least 1 token, got 0"),
        (lambda: run(cap=0.0), "must be positive, got 0.0"),
        (lambda: run(implementation="cudnn"), "unknown decode_attention implementation 'cudnn'"),
        (lambda: run(implementation="mosaic_tpu"), "runs on TPUs, and here are CPUs only"),
        (lambda: run(q=jnp.ones((2, 17, 4, 8)), **kernel), "takes 1 to 16 queries a row .* got 17 and 68"),
        (lambda: run(q=q.astype(jnp.float16), **kernel), "bfloat16 or float32, got float16"),
        (lambda: run(k=quantise(k, "int8_tensor"), **kernel), "one scale a row or a block of it, got int8_tensor"),
        (lambda: run(k=quantise(k, "fp8_e4m3_row"), **kernel), "int8 or int4 with float32 scales, got fp8_e4m3_row"),
    ]:
        with pytest.raises(ValueError, match=words) as found:
            bad()
        assert "\n" not in str(found.value)
    names = [verdict.name for verdict in DECODE_ATTENTION.explain(q, k, k, lens, scale=1.0)]
    assert names == ["mosaic_tpu", "mosaic_gpu_codes", "mosaic_gpu", "xla"]
