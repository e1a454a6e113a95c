"""Attention against float64, torch and JAX's own, forward and backward; its masks; and partial results merged."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from jaxpar.pallas_kernels.attention import MaskSpec, attention
from jaxpar.pallas_kernels.attention.reference import attention_reference


def inputs(B, T, S, H, G, K, seed=0, dtype=np.float32):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: draw.standard_normal(shape).astype(dtype)
    return normal(B, T, H, K), normal(B, S, G, K), normal(B, S, G, K)


def dense(q, k, v, seen, scale, cap=None):
    """Float64, one head and query at a time: the definition. Returns out and lse."""
    B, T, H, K = q.shape
    G = k.shape[2]
    out, lse = np.zeros((B, T, H, K)), np.full((B, H, T), -np.inf)
    for b, t, h in itertools.product(range(B), range(T), range(H)):
        at = np.flatnonzero(seen[b, t])
        if not len(at):
            continue
        logits = scale * (k[b, at, h // (H // G)].astype(np.float64) @ q[b, t, h].astype(np.float64))
        logits = logits if cap is None else cap * np.tanh(logits / cap)
        top = logits.max()
        weights = np.exp(logits - top)
        out[b, t, h] = weights @ v[b, at, h // (H // G)].astype(np.float64) / weights.sum()
        lse[b, h, t] = top + np.log(weights.sum())
    return out, lse


def seen_by(mask: MaskSpec, B, T, S, q_start=0, k_start=0):
    """The mask from its definition, element by element."""
    found = np.zeros((B, T, S), bool)
    for b, t, s in itertools.product(range(B), range(T), range(S)):
        q = q_start + t if mask.q_index is None else int(mask.q_index[b, t])
        k = k_start + s if mask.k_index is None else int(mask.k_index[b, s])
        ok = not mask.causal or k <= q
        ok &= mask.window is None or q - k < int(mask.window)
        if mask.q_segments is not None:
            ok &= int(mask.q_segments[b, t]) == int(mask.k_segments[b, s]) != 0
        found[b, t, s] = ok
    return found


def segments(B, T, seed=3):
    draw = np.random.default_rng(seed)
    return np.sort(draw.integers(0, 4, (B, T)), axis=1).astype(np.int32)[:, ::-1].copy()


MASKS = {
    "causal": lambda B, T: MaskSpec(),
    "bidirectional": lambda B, T: MaskSpec(causal=False),
    "window": lambda B, T: MaskSpec(window=7),
    "traced window": lambda B, T: MaskSpec(window=jnp.int32(7)),
    "segments": lambda B, T: MaskSpec(q_segments=segments(B, T), k_segments=segments(B, T)),
    "all": lambda B, T: MaskSpec(window=9, q_segments=segments(B, T), k_segments=segments(B, T)),
}


@pytest.mark.quick
@pytest.mark.parametrize("T", [12, 72])
@pytest.mark.parametrize("name", MASKS)
def test_forward_against_float64(name, T):
    """72 queries go block by block, 12 at once."""
    B, H, G, K = 2, 4, 2, 8
    q, k, v = inputs(B, T, T, H, G, K)
    mask = MASKS[name](B, T)
    cap = 3.0 if name == "all" else None
    out, lse = attention(q, k, v, mask=mask, scale=0.4, cap=cap, lse_out=True)
    expected, expected_lse = dense(q, k, v, seen_by(mask, B, T, T), 0.4, cap)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6)


@pytest.mark.parametrize("name", MASKS)
def test_blocks_have_the_gradients_of_the_whole(name):
    """The log-sum-exp's cotangent too. No gradient is NaN where a query sees nothing."""
    B, T, H, G, K = 2, 70, 4, 2, 8
    q, k, v = inputs(B, T, T, H, G, K)
    weights = inputs(B, T, T, H, G, K, seed=1)[0]
    mask = MASKS[name](B, T)

    def score(f):
        def total(q, k, v):
            out, lse = f(q, k, v)
            return (out * weights).sum() + jnp.where(jnp.isfinite(lse), lse, 0.0).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(q, k, v)

    found = score(lambda q, k, v: attention(q, k, v, mask=mask, scale=0.4, lse_out=True))
    expected = score(lambda q, k, v: attention_reference(q, k, v, mask=mask, scale=0.4))
    for a, b in zip(found, expected, strict=True):
        assert np.isfinite(a).all()
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_gradients_against_finite_differences_in_float64():
    with jax.enable_x64(True):
        q, k, v = inputs(1, 9, 9, 2, 1, 4, dtype=np.float64)
        seg = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0]], np.int32)
        mask = MaskSpec(window=4, q_segments=seg, k_segments=seg)
        f = lambda q, k, v: (attention(q, k, v, mask=mask, scale=0.5, cap=2.0) ** 3).sum()
        check_grads(f, (q, k, v), order=1, modes=["rev"], rtol=1e-6)


@settings(max_examples=8, deadline=None)
@given(
    T=st.integers(1, 80),
    S=st.integers(1, 80),
    G=st.sampled_from([1, 2]),
    start=st.integers(0, 90),
    causal=st.booleans(),
)
def test_odd_shapes_and_offsets(T, S, G, start, causal):
    q, k, v = inputs(1, T, S, 2 * G, G, 4)
    mask = MaskSpec(causal=causal)
    out = attention(q, k, v, mask=mask, scale=0.5, q_start=start, k_start=5)
    expected, _ = dense(q, k, v, seen_by(mask, 1, T, S, start, 5), 0.5)
    np.testing.assert_allclose(out, expected, atol=3e-6)


def test_parts_of_the_keys_merge_to_the_whole():
    """What a ring does: blocks by their offsets, merged by log-sum-exp; the gradient goes through the merge."""
    q, k, v = inputs(2, 24, 24, 4, 2, 8)
    whole = lambda q, k, v: attention(q, k, v, mask=MaskSpec(), scale=0.4)

    def merged(q, k, v):
        parts = [
            attention(q, k[:, i : i + 8], v[:, i : i + 8], mask=MaskSpec(), scale=0.4, k_start=i, lse_out=True)
            for i in (0, 8, 16)
        ]
        lse = jnp.stack([lse for _, lse in parts])
        weights = jax.nn.softmax(lse, axis=0)
        return sum(out * jnp.moveaxis(w, 1, 2)[..., None] for (out, _), w in zip(parts, weights, strict=True))

    np.testing.assert_allclose(merged(q, k, v), whole(q, k, v), atol=2e-6)
    total = lambda f: jax.grad(lambda q, k, v: (f(q, k, v) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(total(merged), total(whole), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


@pytest.mark.quick
def test_ragged_rows_by_their_indices():
    """A cache: row b's queries stand at its own length."""
    q, k, v = inputs(2, 3, 16, 4, 2, 8)
    q_index = np.array([[4, 5, 6], [11, 12, 13]], np.int32)
    k_index = np.broadcast_to(np.arange(16, dtype=np.int32), (2, 16))
    mask = MaskSpec(window=5, q_index=q_index, k_index=k_index)
    out = attention(q, k, v, mask=mask, scale=0.4)
    expected, _ = dense(q, k, v, seen_by(mask, 2, 3, 16), 0.4)
    np.testing.assert_allclose(out, expected, atol=3e-6)


@pytest.mark.quick
def test_a_query_that_sees_nothing_gives_zero():
    q, k, v = inputs(1, 6, 6, 2, 2, 4)
    seg = np.array([[1, 1, 0, 0, 2, 2]], np.int32)
    out, lse = attention(q, k, v, mask=MaskSpec(q_segments=seg, k_segments=seg), scale=1.0, lse_out=True)
    assert (np.asarray(out)[0, 2:4] == 0).all()
    assert np.isneginf(np.asarray(lse)[0, :, 2:4]).all()
    assert np.isfinite(np.asarray(lse)[0, :, [0, 1, 4, 5]]).all()


def test_against_jax_and_torch():
    torch = pytest.importorskip("torch")
    q, k, v = inputs(2, 40, 40, 4, 2, 16)
    ours = attention(q, k, v, mask=MaskSpec(), scale=0.25)
    np.testing.assert_allclose(ours, jax.nn.dot_product_attention(q, k, v, scale=0.25, is_causal=True), atol=2e-6)
    to = lambda x: torch.tensor(np.moveaxis(x, 1, 2).copy(), requires_grad=True)
    theirs_in = [to(x) for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*theirs_in, is_causal=True, scale=0.25, enable_gqa=True)
    np.testing.assert_allclose(ours, np.moveaxis(theirs.detach().numpy(), 1, 2), atol=2e-6)
    (theirs**2).sum().backward()
    grads = jax.grad(lambda *x: (attention(*x, mask=MaskSpec(), scale=0.25) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)
    for a, b in zip(grads, theirs_in, strict=True):
        np.testing.assert_allclose(a, np.moveaxis(b.grad.numpy(), 1, 2), atol=2e-5)


def test_bfloat16_is_as_close_as_its_inputs_allow():
    q, k, v = (x.astype(jnp.bfloat16) for x in inputs(2, 40, 40, 4, 2, 16))
    out = attention(q, k, v, mask=MaskSpec(), scale=0.25)
    assert out.dtype == jnp.bfloat16
    mask = seen_by(MaskSpec(), 2, 40, 40)
    expected, _ = dense(*(np.asarray(x.astype(jnp.float32)) for x in (q, k, v)), mask, 0.25)
    error = np.linalg.norm(np.asarray(out.astype(jnp.float32)) - expected) / np.linalg.norm(expected)
    assert error < 4e-3


@pytest.mark.quick
def test_bad_calls_are_one_sentence():
    q, k, v = inputs(1, 4, 4, 4, 2, 8)
    call = lambda q=q, k=k, v=v, **more: attention(q, k, v, **{"mask": MaskSpec(), "scale": 1.0, **more})
    for bad, words in [
        (
            lambda: call(implementation="flash"),
            "unknown attention implementation 'flash'; choose one of 'xla', 'mosaic_gpu', 'cudnn'",
        ),
        (lambda: call(implementation="cudnn"), "takes bfloat16 or float16, got float32"),
        (lambda: call(q=q[:, :, :3]), "3 query heads must be a multiple of the 2"),
        (lambda: call(k=k[:, :3]), "of one shape"),
        (lambda: call(cap=-1.0), "soft cap must be positive, got -1.0"),
        (lambda: call(mask=MaskSpec(q_segments=np.ones((1, 4), np.int32))), "both q_segments and k_segments"),
        (lambda: call(mask=MaskSpec(window=0)), "at least 1 token, got 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            bad()
