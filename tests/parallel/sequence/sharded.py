"""Small inputs, the dense answer, and a kind of sequence attention run over fake devices in a given layout."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpar.pallas_kernels.attention import MaskSpec, attention_reference
from jaxpar.parallel.sequence.layouts import Layout

SCALE = 0.35


def draw(T=32, B=2, H=4, G=2, K=8, seed=0, dtype=np.float32):
    """q, k, v, and weights for the outputs and for their log-sum-exps."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
    return normal(B, T, H, K), normal(B, T, G, K), normal(B, T, G, K), normal(B, T, H, K), normal(B, H, T)


def documents(T, B=2, padding=3):
    """Packed documents [B, T]: three, of uneven lengths, and padding at the end."""
    rows = []
    for b in range(B):
        ends = sorted({T // 4 + b, T // 2 + 1 + 2 * b, T - padding})
        rows.append(np.searchsorted(ends, np.arange(T), side="right") + 1)
        rows[-1][T - padding :] = 0
    return jnp.asarray(np.stack(rows), jnp.int32)


MASKS = {
    "causal": lambda T: MaskSpec(),
    "bidirectional": lambda T: MaskSpec(causal=False),
    "window": lambda T: MaskSpec(window=5),
    "traced window": lambda T: MaskSpec(window=jnp.int32(T // 2)),
    "documents": lambda T: MaskSpec(q_segments=documents(T), k_segments=documents(T)),
    "all": lambda T: MaskSpec(window=T // 2 + 1, q_segments=documents(T), k_segments=documents(T)),
}


def score(f, weights, lse_weights):
    """`total_of`, compiled."""
    return jax.jit(total_of(f, weights, lse_weights))


def total_of(f, weights, lse_weights):
    """A scalar of out and lse whose gradient has no zero by symmetry; rows without keys give no lse."""

    def total(q, k, v):
        out, lse = f(q, k, v)
        finite = jnp.isfinite(lse)
        loss = jnp.sum(out.astype(jnp.float32) * weights) + jnp.sum(jnp.where(finite, lse, 0.0) * lse_weights)
        return loss, (out, lse)

    return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)


def dense(q, k, v, weights, lse_weights, mask, cap=None):
    """(out, lse), (dq, dk, dv) of the reference."""
    f = lambda q, k, v: attention_reference(q, k, v, mask=mask, scale=SCALE, cap=cap)
    # Not compiled as a whole: its operations are, once for all tests.
    (_, outputs), gradients = total_of(f, weights, lse_weights)(q, k, v)
    return outputs, gradients


def locally(function, mesh: Mesh, mask: MaskSpec, **options):
    """A function of whole arrays in stored order from one of a device's shards, over every axis of the mesh."""
    along = P(None, tuple(mesh.axis_names))
    arrays = {n: getattr(mask, n) for n in ("q_segments", "k_segments", "q_index", "k_index", "window")}
    arrays = {n: x for n, x in arrays.items() if isinstance(x, jax.Array | np.ndarray)}
    specs = {n: P() if n == "window" else along for n in arrays}

    def shard(q, k, v, arrays):
        return function(q, k, v, mask=mask.replace(**arrays), scale=SCALE, **options)

    whole = jax.shard_map(
        shard,
        mesh=mesh,
        in_specs=(along, along, along, specs),
        out_specs=(along, P(None, None, tuple(mesh.axis_names))),
    )
    return lambda q, k, v: whole(q, k, v, arrays)


def in_layout(layout: Layout, mask: MaskSpec) -> MaskSpec:
    """The mask with its arrays in stored order."""
    arrays = {n: getattr(mask, n) for n in ("q_segments", "k_segments", "q_index", "k_index")}
    return mask.replace(**{n: layout.arrange(x) for n, x in arrays.items() if x is not None})


def compare(function, order: Layout, inputs, mask: MaskSpec, mesh: Mesh, cap=None, atol=1e-5, gradient_atol=1e-4, **kw):
    """Asserts that a kind of attention has the outputs and the gradients of the dense one."""
    stored = [order.arrange(x, axis=2 if x.ndim == 3 else 1) for x in inputs]
    f = locally(function, mesh, in_layout(order, mask), cap=cap, **kw)
    (_, (out, lse)), gradients = score(f, *stored[3:])(*stored[:3])
    (expected, expected_lse), expected_gradients = dense(*inputs, mask, cap)
    np.testing.assert_allclose(order.restore(np.asarray(out)), expected, atol=atol)
    np.testing.assert_allclose(order.restore(np.asarray(lse), axis=2), expected_lse, atol=atol)
    for name, found, wanted in zip("qkv", gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(
            order.restore(np.asarray(found)), wanted, atol=gradient_atol, err_msg=f"gradient of {name}"
        )
