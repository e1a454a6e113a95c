"""Layouts against their definitions, token by token."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.parallel.sequence.layouts import LAYOUTS, Chunks, Layout, needed

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("kind", "held"),
    [
        ("contiguous", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("striped", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("zigzag", [[0, 1, 6, 7], [2, 3, 4, 5]]),
    ],
)
def test_who_holds_what(kind, held):
    assert Layout(kind, 2, 8).positions.reshape(2, 4).tolist() == held


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_there_and_back(kind, shards):
    layout = Layout(kind, shards, 48)
    x = np.arange(2 * 48 * 3).reshape(2, 48, 3)
    stored = layout.arrange(x)
    assert sorted(layout.positions) == list(range(48))
    np.testing.assert_array_equal(stored, x[:, layout.positions])
    np.testing.assert_array_equal(layout.restore(stored), x)
    np.testing.assert_array_equal(layout.arrange(jnp.asarray(x)), stored)
    np.testing.assert_array_equal(layout.restore(jnp.asarray(stored)), x)
    np.testing.assert_array_equal(layout.arrange(x.transpose(2, 0, 1), axis=-1), stored.transpose(2, 0, 1))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_progressions_are_the_positions(kind):
    layout = Layout(kind, 4, 48)
    for chunks in (layout.chunks, layout.chunks.halved()):
        assert listed(chunks).reshape(-1).tolist() == layout.positions.tolist()


def listed(chunks: Chunks) -> np.ndarray:
    """int [N, C, count]."""
    return chunks.starts[..., None] + chunks.stride * np.arange(chunks.count)


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 2, 3, 7, 13])
@pytest.mark.parametrize(("shards", "length"), [(4, 24), (4, 8), (2, 12)])
def test_needed_blocks_by_brute_force(kind, causal, window, shards, length):
    q = Layout(kind, shards, length).chunks
    for k in [q, q.halved()] if q.count % 2 == 0 else [q]:
        found = needed(q, k, causal=causal, window=window)
        a, b = listed(q)[:, None, :, None, :, None], listed(k)[None, :, None, :, None, :]
        seen = np.ones(np.broadcast_shapes(a.shape, b.shape), bool)
        seen &= (b <= a) if causal else True
        seen &= (a - b < window) if window else True
        np.testing.assert_array_equal(found, seen.any((-1, -2)))
        if window:
            np.testing.assert_array_equal(needed(q, k, causal=causal, window=jnp.int32(window)), found)


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_balance_of_causal_work(shards):
    """Blocks that each device computes: equal for zigzag (2N+1 of 4N), 1 ... N for contiguous, N for striped."""
    blocks = {k: needed(c, c, causal=True).sum((1, 2, 3)) for k in LAYOUTS for c in [Layout(k, shards, 64).chunks]}
    assert blocks["zigzag"].tolist() == [2 * shards + 1] * shards
    assert blocks["contiguous"].tolist() == list(range(1, shards + 1))
    assert blocks["striped"].tolist() == [shards] * shards


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("contiguous", 4, 30), "30 tokens .* contiguous layout over 4 devices.*multiple of 4; nearest that works: 32"),
        (("zigzag", 4, 28), "28 tokens .* zigzag layout over 4 devices.*multiple of 8; nearest that works: 32"),
        (("striped", 8, 3), "3 tokens .*multiple of 8; nearest that works: 8"),
        (("zigzag", 4, 0), "0 tokens .*nearest that works: 8"),
        (("zig-zag", 4, 8), "unknown layout 'zig-zag' .did you mean 'zigzag'.*contiguous, striped, zigzag"),
        (("striped", 0, 8), "0 devices"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        Layout(*arguments)


def test_halves_and_arrays_that_do_not_fit():
    with pytest.raises(ValueError, match=r"12 tokens .* both directions over 4 devices.*multiple of 8; .* 16"):
        Layout("contiguous", 4, 12).chunks.halved()
    with pytest.raises(ValueError, match="has 10 tokens, and the striped layout is for 8"):
        Layout("striped", 4, 8).arrange(np.zeros((2, 10)))
