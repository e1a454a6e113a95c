"""GPipe by plain differentiation through the permutes: short, slow in memory, and what the executors are compared with.

One scan of m + p - 1 ticks in which every device runs its stage; JAX differentiates it. It keeps what every tick needs
until the end, so its memory grows with the number of microbatches. Run forwards only, it gives a pipeline's loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.varying import varying
from jaxpar.parallel.pipeline.execute import Parts

Tree = Any


def loss(
    parts: Parts,
    shared: Tree,
    layers: Tree,
    pieces: Tree,
    micros: Tree,
    *,
    axis: str = "stage",
    axes: Iterable[str] = (),
) -> jax.Array:
    """The summed loss of all microbatches: this device's part, which is all of it on the last stage and 0 elsewhere.

    Arguments as for `execute.gradients`, with one chunk a device.
    """
    everywhere = lambda tree: jax.tree.map(lambda x: varying(jnp.asarray(x), (axis, *axes)), tree)
    shared, layers, pieces, micros = map(everywhere, (shared, layers, pieces, micros))
    layers, piece = jax.tree.map(lambda x: x[0], (layers, pieces))
    devices, device = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    m = jax.tree.leaves(micros)[0].shape[0]
    route = [(d, (d + 1) % devices) for d in range(devices)]

    def tick(carry, t):
        received, total = carry
        number = t - device
        active = (number >= 0) & (number < m)
        micro = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, jnp.clip(number, 0, m - 1), 0, False), micros)
        # Devices that wait run on what enters the pipeline: on the zeros that nobody sent, a stage may give NaN, and the
        # gradient of a choice keeps it.
        takes = active & (device > 0)
        x = jax.tree.map(lambda a, b: jnp.where(takes, b, a), parts.first(shared, micro), received)
        y = everywhere(parts.middle(layers, x, piece, micro))
        ends = active & (device == devices - 1)
        last = lambda y: everywhere(parts.last(shared, y, micro).astype(jnp.float32))
        total = total + jax.lax.cond(ends, last, lambda y: everywhere(jnp.zeros((), jnp.float32)), y)
        return (jax.tree.map(lambda x: jax.lax.ppermute(x, axis, route), y), total), None

    state = jax.eval_shape(lambda: parts.first(shared, jax.tree.map(lambda x: x[0], micros)))
    empty = everywhere(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state))
    (_, total), _ = jax.lax.scan(tick, (empty, everywhere(jnp.zeros((), jnp.float32))), jnp.arange(m + devices - 1))
    return total


def gradients(
    parts: Parts,
    shared: Tree,
    layers: Tree,
    pieces: Tree,
    micros: Tree,
    *,
    axis: str = "stage",
    axes: Iterable[str] = (),
) -> tuple[jax.Array, Tree, Tree]:
    """As `execute.gradients`."""
    everywhere = lambda tree: jax.tree.map(lambda x: varying(x, (axis, *axes)), tree)
    run = lambda shared, layers: loss(parts, shared, layers, pieces, micros, axis=axis, axes=axes)
    total, (d_shared, d_layers) = jax.value_and_grad(run, argnums=(0, 1))(everywhere(shared), everywhere(layers))
    return total, d_shared, d_layers
