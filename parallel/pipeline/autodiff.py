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
    """The summed loss of all microbatches, of `parts.last`'s shape: this device's part, on the last stage and at exits.

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
        y, at_exits = y if parts.exits else (y, ())
        none = lambda y: everywhere(jnp.zeros(total.shape, jnp.float32))
        some = lambda f: lambda y: everywhere(f(shared, y, micro).astype(jnp.float32))
        ends = active & (device == devices - 1)
        found = jax.lax.cond(ends, some(parts.last), none, y)
        exits = zip(parts.exits, parts.which(piece), at_exits, strict=True) if parts.exits else ()
        for functions, there, state in exits:
            found += jax.lax.switch(jnp.where(active, there, 0), [none, *map(some, functions)], state)
        total = total + found
        return (jax.tree.map(lambda x: jax.lax.ppermute(x, axis, route), y), total), None

    micro = jax.tree.map(lambda x: x[0], micros)
    state = jax.eval_shape(lambda: parts.first(shared, micro))
    empty = everywhere(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state))
    none = everywhere(jnp.zeros(jax.eval_shape(parts.last, shared, empty, micro).shape, jnp.float32))
    (_, total), _ = jax.lax.scan(tick, (empty, none), jnp.arange(m + devices - 1))
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

    def run(shared, layers):
        sums = loss(parts, shared, layers, pieces, micros, axis=axis, axes=axes)
        return sums.ravel()[0], sums

    (_, sums), grads = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)(everywhere(shared), everywhere(layers))
    return sums, *grads
