"""Every kind in every layout against dense attention, through `sequence_attention` on whole arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from sharded import FAST, MASKS, SCALE, dense, dense_for, draw, in_layout, same, score, stored

from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.parallel.sequence.api import sequence_attention, sequence_layout
from jaxpar.parallel.sequence.layouts import LAYOUTS

PAIR = ("ring", "ulysses")


def mesh_of(devices, **sizes) -> Mesh:
    count = int(np.prod(list(sizes.values())))
    return Mesh(np.asarray(devices[:count]).reshape(tuple(sizes.values())), tuple(sizes))


def check(mesh, mask_name, *, kind, layout, axis, gradients=True, cap=None, T=32, **shape):
    order = sequence_layout(mesh, T, layout=layout, axis=axis)
    q, k, v, *weights = stored(order, draw(T, **shape))
    attention = sequence_attention(mesh, kind=kind, layout=layout, axis=axis)
    mask = in_layout(order, MASKS[mask_name](T))
    f = lambda q, k, v: attention(q, k, v, mask=mask, scale=SCALE, cap=cap, lse_out=True)
    if gradients:
        (_, outputs), found = score(f, *weights)(q, k, v)
    else:
        outputs, found = jax.jit(f, compiler_options=FAST)(q, k, v), None
    same(order, outputs, found, dense(mask_name, cap, T, **shape))


@pytest.mark.quick
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["rsa", "tokenring", "ulysses", "hybrid"])
def test_every_kind_in_every_layout(devices, kind, layout):
    """Four devices; grouped queries, packed documents with padding, a window and a soft cap at once.

    Those not here are in test_ring. Rings share one backward pass, whose layouts are compared there.
    """
    mesh = mesh_of(devices, ring=2, ulysses=2) if kind == "hybrid" else mesh_of(devices, sequence=4)
    axis = PAIR if kind == "hybrid" else "sequence"
    own = (kind, layout) in {
        ("ulysses", "striped"),
        ("hybrid", "zigzag"),
        ("tokenring", "contiguous"),
        ("rsa", "striped"),
    }
    check(mesh, "all", kind=kind, layout=layout, axis=axis, gradients=own, cap=4.0)


@pytest.mark.parametrize("kind", ["rsa", "tokenring", "ulysses", "hybrid"])
def test_eight_devices(devices, kind):
    mesh = mesh_of(devices, ring=4, ulysses=2) if kind == "hybrid" else mesh_of(devices, sequence=8)
    axis = PAIR if kind == "hybrid" else "sequence"
    check(mesh, "causal", kind=kind, layout="contiguous", axis=axis, gradients=False, B=1, H=8)


@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_with_rows_and_heads_sharded_too(devices, kind):
    """Batch over data and fsdp, heads over tensor; one key head for two tensor devices is repeated."""
    mesh = mesh_of(devices, data=2, fsdp=1, tensor=2, sequence=2)
    check(mesh, "one row of labels", kind=kind, layout="striped", axis="sequence", T=16, G=1)


def test_starts_that_differ(devices):
    """As `attention` with q_start and k_start: here all keys lie 7 tokens behind the queries."""
    q, k, v, *_ = draw(16)
    mesh = mesh_of(devices, sequence=2)
    order = sequence_layout(mesh, 16, layout="striped")
    attention = sequence_attention(mesh, layout="striped")
    arrays = stored(order, (q, k, v))
    mask = MaskSpec(window=12)
    f = lambda start: attention(*arrays, mask=mask, scale=SCALE, q_start=start, k_start=3)
    found = jax.jit(f, compiler_options=FAST)(10)
    index = jnp.arange(16, dtype=jnp.int32)[None]
    shifted = mask.replace(q_index=index + 10, k_index=index + 3)
    (expected, _), _ = dense_for(draw(16), shifted)
    np.testing.assert_allclose(order.restore(np.asarray(found)), expected, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        (dict(kind="rings"), {}, "unknown kind .*'rings' .did you mean 'ring'"),
        (dict(layout="stripes"), {}, "unknown layout 'stripes'"),
        (dict(axis="sequences"), {}, r"mesh tensor\(2\) × sequence\(4\) has no axis 'sequences'"),
        (dict(kind="hybrid"), {}, r"'hybrid' needs a pair of mesh axes, \(ring, Ulysses\), got 'sequence'"),
        (dict(axis=("tensor", "sequence")), {}, "'ring' needs one mesh axis"),
        (dict(layout="zigzag"), dict(T=20), "20 tokens .*multiple of 8; nearest that works: 24"),
        (dict(), dict(T=18), r"18 tokens .*sequence\(4\).*multiple of 4; nearest that works: 20"),
        (dict(kind="ring_bidirectional"), dict(T=12), "both directions over 4 devices.*multiple of 8.*16"),
        (dict(kind="ulysses"), dict(H=4), "Ulysses over 4 devices .*multiple of 4 query heads, got 2 .*: 2 devices"),
        (dict(), dict(H=3, G=1), "mesh axis tensor over 2 devices .*got 3 .*nearest that works: 1 device$"),
        (dict(kind="rsa", implementation="cudnn"), {}, "no implementation 'cudnn'"),
    ],
)
def test_refusals(devices, options, shape, message):
    """One sentence with the numbers, before anything is computed."""
    mesh = mesh_of(devices, data=1, tensor=2, sequence=4)
    q, k, v, *_ = draw(**{"T": 16, "H": 8, **shape})
    call = {name: options.pop(name) for name in ("implementation",) if name in options}
    with pytest.raises(ValueError, match=message) as found:
        sequence_attention(mesh, **options)(q, k, v, mask=MaskSpec(), scale=1.0, **call)
    assert "\n" not in str(found.value)


def test_refusals_of_shapes(devices):
    attention = sequence_attention(mesh_of(devices, data=4, sequence=2))
    q, k, v, *_ = draw(16)
    with pytest.raises(ValueError, match=r"2 rows .*data\(4\); nearest that works: 4"):
        attention(q, k, v, mask=MaskSpec(), scale=1.0)
    with pytest.raises(ValueError, match="8 keys and 16 queries"):
        attention(q, k[:, :8], v[:, :8], mask=MaskSpec(), scale=1.0)
