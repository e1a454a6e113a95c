"""Earlier tokens where those of a row lie over devices: each run of tokens with the n in front of it, beside the whole row."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxpar.models import reach
from jaxpar.models.context import Context, Ops
from jaxpar.models.residual.base import Behind
from jaxpar.parallel.sequence.layouts import LAYOUTS, Layout
from jaxpar.parallel.sequence.rows import SpreadRows
from jaxpar.parallel.tensor.by_hand import ByHand

B, T, D = 2, 24, 3
pytestmark = pytest.mark.quick


def spread(layout: str, sizes: dict[str, int], n: int, x_BxTxD, segments_BxT, weights_BxTxnxD):
    """What tokens see, from devices that tokens lie on: values and documents of the n before each token and it itself, [B, T, n +
    1, ...], in the row's order; and the gradient of the values' weighted sum."""
    mesh = Mesh(
        np.array(jax.devices()[: np.prod(list(sizes.values()))]).reshape(tuple(sizes.values())),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(sizes),
    )
    sequence = tuple(a for a in sizes if a != "tensor")
    shards = ByHand(sizes["tensor"]) if "tensor" in sizes else Ops().shards
    ops = Ops(rows=SpreadRows(layout, sequence) if sequence else Ops().rows, shards=shards)
    order = Layout(layout, sizes[sequence[0]] if sequence else 1, T)
    tokens, stream = PartitionSpec(None, sequence or None), PartitionSpec(None, tuple(sizes))

    def local(x, segments, places):
        ctx = Context(segments=segments, places=places, ops=ops)
        (x,) = ctx.ops.shards.own((x,))
        before = jnp.zeros((B, n, D))
        found = Behind(reach.extended(ctx, before, x), reach.documents(ctx, segments.shape, n))

        def window(own, found):
            np.testing.assert_array_equal(own.shape[:2], (found.values.shape[0], found.values.shape[1] - n))
            at = np.arange(own.shape[1])[:, None] + np.arange(n + 1)[None]
            return jax.tree.map(lambda leaf: leaf[:, at], tuple(found))

        return reach.by_run(window, found, x)

    def whole(x, segments):
        inside = (order.arrange(x), order.arrange(segments), jnp.asarray(order.positions))
        specs = (tokens, tokens, PartitionSpec(sequence or None))
        found = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=stream)(*inside)
        return jax.tree.map(order.restore, found)

    @jax.jit
    def run(x, segments):
        values, pull, documents = jax.vjp(partial(whole, segments=segments), x, has_aux=True)
        return values, documents, pull(weights_BxTxnxD)[0]

    return run(x_BxTxD, segments_BxT)


@pytest.mark.parametrize("n", [2, 13])
@pytest.mark.parametrize(
    ("layout", "sizes"),
    [
        *((layout, {"sequence": 4}) for layout in LAYOUTS),
        ("zigzag", {"ring": 2, "exchange": 2}),
        ("striped", {"ring": 2, "exchange": 2}),
        ("zigzag", {"sequence": 2, "tensor": 2}),
        ("zigzag", {"sequence": 2, "tensor": 4}),
        ("zigzag", {"sequence": 2, "tensor": 3}),  # whose parts are no pieces: runs of 2 tokens
        ("contiguous", {"tensor": 4}),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(f"{k}={v}" for k, v in x.items()),
)
def test_each_token_sees_the_tokens_before_it(layout, sizes, n, devices):
    """Whatever lies between: with 13, more tokens than any device's runs have."""
    draw = np.random.default_rng(0)
    x_BxTxD = draw.standard_normal((B, T, D)).astype(np.float32)
    segments_BxT = np.sort(draw.integers(1, 4, (B, T)).astype(np.int32), axis=1)
    weights = draw.standard_normal((B, T, n + 1, D)).astype(np.float32)
    values, documents, gradient = spread(layout, sizes, n, x_BxTxD, segments_BxT, weights)
    at = np.arange(T)[:, None] + np.arange(n + 1)[None]
    front = lambda x, fill: np.pad(x, [(0, 0), (n, 0), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
    np.testing.assert_array_equal(values, front(x_BxTxD, 0)[:, at])
    np.testing.assert_array_equal(documents, front(segments_BxT, -1)[:, at])
    expected = np.zeros((B, n + T, D), np.float32)
    np.add.at(expected, (slice(None), at), weights)
    np.testing.assert_allclose(gradient, expected[:, n:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "shards", "tokens", "length"),
    [("contiguous", 4, 6, 6), ("striped", 4, 6, 1), ("zigzag", 4, 6, 3), ("zigzag", 2, 4, 2), ("zigzag", 1, 24, 24)],
)
def test_runs_are_the_longest_there_are(layout, shards, tokens, length):
    order = Layout(layout, shards, T)
    found, runs = order.runs(tokens)
    assert found == length
    np.testing.assert_array_equal(order.positions.reshape(-1, found)[runs].reshape(-1), np.arange(T))
