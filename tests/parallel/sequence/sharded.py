"""Small inputs, the dense answer, and a kind of sequence attention run over fake devices in a given layout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jaxpar.pallas_kernels.attention import MaskSpec, attention_reference
from jaxpar.parallel.sequence.layouts import Layout

SCALE = 0.35
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
"""Compiler options: compiling is nearly all that these tests do, and takes half as long with them."""


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
    "one row of labels": lambda T: MaskSpec(
        window=jnp.int32(9), q_segments=documents(T)[:1], k_segments=documents(T)[:1]
    ),
    "causal": lambda T: MaskSpec(),
    "bidirectional": lambda T: MaskSpec(causal=False),
    "window": lambda T: MaskSpec(window=5),
    "traced window": lambda T: MaskSpec(window=jnp.int32(T // 2)),
    "documents": lambda T: MaskSpec(q_segments=documents(T), k_segments=documents(T)),
    "all": lambda T: MaskSpec(window=T // 2 + 1, q_segments=documents(T), k_segments=documents(T)),
}


def score(f, weights, lse_weights, options=FAST):
    """Compiled value and gradients of a scalar of out and lse without symmetries; rows without keys give no lse."""

    def total(q, k, v):
        out, lse = f(q, k, v)
        finite = jnp.isfinite(lse)
        loss = jnp.sum(out.astype(jnp.float32) * weights) + jnp.sum(jnp.where(finite, lse, 0.0) * lse_weights)
        return loss, (out, lse)

    return jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True), compiler_options=options)


@functools.cache
def dense(name, cap=None, T=32, **shape):
    """(out, lse), (dq, dk, dv) of the reference for `draw(T, **shape)` and the mask of that name."""
    return dense_for(draw(T, **shape), MASKS[name](T), cap)


def dense_for(inputs, mask, cap=None):
    """The same for any inputs and mask."""
    q, k, v, *weights = inputs
    f = lambda q, k, v: attention_reference(q, k, v, mask=mask, scale=SCALE, cap=cap)
    (_, outputs), gradients = score(f, *weights)(q, k, v)
    return jax.tree.map(np.asarray, (outputs, gradients))


def locally(function, mesh: Mesh, mask: MaskSpec, check_vma=True, **options):
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
        check_vma=check_vma,
    )
    return lambda q, k, v: whole(q, k, v, arrays)


def in_layout(layout: Layout, mask: MaskSpec) -> MaskSpec:
    """The mask with its arrays in stored order."""
    arrays = {n: getattr(mask, n) for n in ("q_segments", "k_segments", "q_index", "k_index")}
    return mask.replace(**{n: jnp.asarray(layout.arrange(np.asarray(x))) for n, x in arrays.items() if x is not None})


def same(order: Layout, outputs, gradients, expected):
    """Asserts outputs to 1e-5 and gradients (None: not taken) to 1e-4, in stored order, against those of `dense`."""
    (out, lse), (wanted, wanted_lse) = outputs, expected[0]
    np.testing.assert_allclose(order.restore(np.asarray(out)), wanted, atol=1e-5)
    np.testing.assert_allclose(order.restore(np.asarray(lse), axis=2), wanted_lse, atol=1e-5)
    for name, a, b in zip("qkv", gradients or (), expected[1], strict=bool(gradients)):
        np.testing.assert_allclose(order.restore(np.asarray(a)), b, atol=1e-4, err_msg=f"gradient of {name}")


def stored(order: Layout, inputs):
    """q, k, v and the weights of `draw` in stored order."""
    return [jnp.asarray(order.arrange(np.asarray(x), axis=2 if x.ndim == 3 else 1)) for x in inputs]
