"""Ring attention against dense attention: layouts, masks, both directions, numbers of devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from sharded import FAST, MASKS, SCALE, dense, dense_for, documents, draw, in_layout, locally, same, score, stored

from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.parallel.sequence.layouts import LAYOUTS, Layout
from jaxpar.parallel.sequence.ring import ring_attention


def ring(devices, shards):
    return Mesh(np.asarray(devices[:shards]), ("sequence",))


def check(mesh, mask_name, layout, *, T=32, cap=None, both_ways=False, gradients=True, **shape):
    order = Layout(layout, mesh.size, T)
    q, k, v, *weights = stored(order, draw(T, **shape))
    mask = in_layout(order, MASKS[mask_name](T))
    f = locally(ring_attention, mesh, mask, cap=cap, layout=layout, axis="sequence", both_ways=both_ways)
    if gradients:
        (_, outputs), found = score(f, *weights)(q, k, v)
    else:
        outputs, found = jax.jit(f, compiler_options=FAST)(q, k, v), None
    same(order, outputs, found, dense(mask_name, cap, T, **shape))


@pytest.mark.quick
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_four_devices(devices, layout, both_ways):
    """Grouped queries, packed documents, a window and a soft cap at once, forward and backward."""
    gradients = not both_ways or layout == "contiguous"
    check(ring(devices, 4), "all", layout, cap=4.0, both_ways=both_ways, gradients=gradients)


@pytest.mark.parametrize(
    ("mask", "layout"),
    [
        ("bidirectional", "contiguous"),
        ("traced window", "striped"),
        ("documents", "contiguous"),
    ],
)
def test_masks(devices, mask, layout):
    """One at a time, on two devices."""
    check(ring(devices, 2), mask, layout, T=16)


def test_eight_devices(devices):
    check(ring(devices, 8), "causal", "zigzag", G=1)


@pytest.mark.parametrize("shards", [1, 3])
def test_rings_without_a_loop(devices, shards):
    check(ring(devices, shards), "window", "contiguous", T=12)


def test_indices_of_the_caller(devices):
    """They replace those of the layout, and travel with their keys."""
    T = 16
    index = jnp.asarray(np.random.default_rng(3).permutation(T)[None].repeat(2, 0), jnp.int32)
    mask = MaskSpec(window=6, q_index=index, k_index=index[:, ::-1])
    order = Layout("striped", 4, T)
    q, k, v, *weights = stored(order, draw(T))
    f = locally(ring_attention, ring(devices, 4), in_layout(order, mask), layout="striped", axis="sequence")
    (_, outputs), gradients = score(f, *weights)(q, k, v)
    same(order, outputs, gradients, dense_for(draw(T), mask))


def test_error_does_not_grow_with_the_ring(devices):
    """In float32 against float64, and in bfloat16 against float32 of the same numbers: outputs and gradients."""
    T, mask = 64, MaskSpec()
    exact = [np.asarray(x, np.float64) for x in draw(T)]
    with jax.enable_x64(True):
        inputs = [jnp.asarray(x, jnp.float64) for x in exact]
        (wanted, _), wanted_gradients = dense_for(inputs, mask)
    error = {}
    for shards in (2, 8):
        f = locally(ring_attention, ring(devices, shards), mask, layout="contiguous", axis="sequence")
        inputs = [jnp.asarray(x, jnp.float32) for x in exact]
        (_, (out, _)), gradients = score(f, *inputs[3:])(*inputs[:3])
        error[shards] = [np.abs(out - wanted).max()]
        error[shards] += [np.abs(a - b).max() for a, b in zip(gradients, wanted_gradients, strict=True)]
    assert np.max(error[2]) < 1e-5
    assert (np.array(error[8]) <= 2 * np.array(error[2]) + 2e-7).all(), error


def test_bfloat16_error_does_not_grow_with_the_ring(devices):
    T, mask = 64, MaskSpec()
    inputs = [x.astype(jnp.bfloat16) for x in draw(T)]
    wide = [x.astype(jnp.float32) for x in inputs]
    (wanted, _), wanted_gradients = dense_for(wide, mask)
    error = {}
    for shards in (2, 8):
        f = locally(ring_attention, ring(devices, shards), mask, layout="contiguous", axis="sequence")
        (_, (out, _)), gradients = score(f, *wide[3:])(*inputs[:3])
        error[shards] = [
            float(jnp.abs(a.astype(jnp.float32) - b).mean())
            for a, b in zip((out, *gradients), (wanted, *wanted_gradients), strict=True)
        ]
    assert np.max(error[2]) < 2e-2
    assert (np.array(error[8]) <= 1.3 * np.array(error[2])).all(), error


def test_large_logits(devices):
    """About 1e5: exp overflows at 88."""
    q, k, v, *weights = draw(32)
    inputs = (1e3 * q, 1e2 * k, v, *weights)
    f = locally(ring_attention, ring(devices, 4), MaskSpec(), layout="contiguous", axis="sequence")
    out, lse = jax.jit(f, compiler_options=FAST)(*inputs[:3])
    (expected, expected_lse), _ = dense_for(inputs, MaskSpec())
    assert np.abs(expected_lse).max() > 1e5
    np.testing.assert_allclose(out, expected, atol=1e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-6)


@pytest.mark.quick
def test_hidden_blocks_are_not_computed(devices):
    """A NaN in keys that nobody may see would reach every output if its block were computed: 0 · NaN is NaN."""
    T = 32
    q, k, v, *_ = draw(T)
    poisoned = k.at[:, T // 4 : T // 2].set(jnp.nan)
    segments = jnp.repeat(jnp.arange(1, 5, dtype=jnp.int32), T // 4)[None]
    mask = MaskSpec(q_segments=segments, k_segments=segments)
    options = dict(layout="contiguous", axis="sequence")
    of = lambda mask: locally(ring_attention, ring(devices, 4), mask, **options)
    whole = lambda mask: jax.jit(of(mask), compiler_options=FAST)(q, poisoned, v)[0]
    clean = np.isfinite(whole(mask)).all((0, 2, 3)).reshape(4, -1).all(1)
    assert clean.tolist() == [True, False, True, True]
    clean = np.isfinite(whole(MaskSpec())).all((0, 2, 3)).reshape(4, -1).all(1)
    assert clean.tolist() == [True, False, False, False]


def test_temporary_memory_falls_with_the_number_of_devices(devices):
    """Of the forward and backward pass. Linear in T/N but for the logits of one block, which are small here."""
    T = 512
    inputs = draw(T, B=1, H=2, G=2, K=64)
    size = {}
    for shards in (2, 8):
        f = locally(ring_attention, ring(devices, shards), MaskSpec(), layout="contiguous", axis="sequence")
        compiled = score(f, *inputs[3:], options=None).lower(*inputs[:3]).compile()
        size[shards] = compiled.memory_analysis().temp_size_in_bytes
    assert size[8] < 0.3 * size[2], size


def test_refusals(devices):
    q, k, v, *_ = draw(12)
    run = lambda **kw: locally(ring_attention, ring(devices, 4), MaskSpec(), axis="sequence", **kw)(q, k, v)
    with pytest.raises(ValueError, match=r"12 tokens .*zigzag layout over 4 devices.*multiple of 8; .*works: 16"):
        run(layout="zigzag")
    with pytest.raises(ValueError, match=r"12 tokens .*both directions over 4 devices.*multiple of 8; .*works: 16"):
        run(layout="striped", both_ways=True)
    mask = MaskSpec(q_index=jnp.arange(12, dtype=jnp.int32)[None])
    with pytest.raises(ValueError, match="both q_index and k_index"):
        locally(ring_attention, ring(devices, 4), mask, layout="striped", axis="sequence")(q, k, v)


def test_documents_have_padding_and_uneven_lengths():
    """What the other tests rely on."""
    found = documents(32)
    assert sorted({len(set(row.tolist())) for row in found}) == [4]
    assert (found[:, -1] == 0).all()
    assert in_layout(Layout("striped", 4, 32), MASKS["all"](32)).q_segments[0, 1] == found[0, 4]
    assert SCALE != 1
