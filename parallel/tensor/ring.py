"""Collective matmul: products that overlap with the gather before them and the scatter behind them.

Wang et al. 2023, "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models", §5.1:
an all-gather and its product become t steps, in each of which a device multiplies the tokens that it has and passes them
on; a product and its reduce-scatter likewise, with a sum that travels and collects. What a step sends does not depend on
what it multiplies, so the two can run at once. All kernels that read the same tokens share one ring. Here the gradients go
round rings of their own too, and sums travel in float32 (twice the bytes of bfloat16: an error that does not grow with t).

Runs inside `jax.shard_map`. Letters: t devices, r this one, S tokens of a device between branches, T = t·S. A device keeps
its own tokens for the backward pass, nothing of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp

from jaxpar.pallas_kernels.varying import alike
from jaxpar.parallel.tensor.gathered import TOKENS, part, whole


class Ring:
    """The steps of one axis. At step j the tokens of device r - j are here, and the sum of those of device r - 1 - j."""

    def __init__(self, axis: str):
        self.axis, self.devices = axis, jax.lax.axis_size(axis)
        self.rank = jax.lax.axis_index(axis)
        self.route = [(r, (r + 1) % self.devices) for r in range(self.devices)]

    def on(self, x):
        """To the next device."""
        return jax.lax.ppermute(x, self.axis, self.route)

    def visits(self, x_BxSxN) -> Sequence[tuple]:
        """`(device, its tokens)` for each step; t - 1 hops. Each hop is written before what is done with the visit."""
        held = x_BxSxN
        for j in range(self.devices):
            coming = self.on(held) if j + 1 < self.devices else None
            yield (self.rank - j) % self.devices, held
            held = coming

    def collect(self, term: Callable):
        """Σ over devices of `term(r)`, on device r; t - 1 hops. Where `term` is done, the sum for it may still be coming."""
        total = None
        for j in range(self.devices):
            coming = None if total is None else self.on(total)
            mine = term((self.rank - 1 - j) % self.devices)
            total = mine if coming is None else coming + mine
        return total


def columns(axis: str, x_BxSxD, kernels: Sequence, over: tuple[str, ...] = ()) -> list:
    """As `gathered.columns`: [B, T, ...] of every kernel [D, ...]. Kernels are cast to x's dtype."""
    flat = [k.astype(x_BxSxD.dtype).reshape(k.shape[0], -1) for k in kernels]
    ys = _columns(axis, over, *_split(alike(x_BxSxD, *flat)))
    return [y.reshape(*y.shape[:2], *k.shape[1:]) for y, k in zip(ys, kernels, strict=True)]


def row(axis: str, h, kernel, contract: int, over: tuple[str, ...] = ()):
    """As `gathered.row`: [B, S, D] of h [B, T, ...] and a kernel whose first `contract` dimensions are summed over."""
    inner = math.prod(kernel.shape[:contract])
    flat = kernel.astype(h.dtype).reshape(inner, -1)
    y = _row(axis, over, *alike(h.reshape(*h.shape[:2], inner), flat))
    return y.reshape(*y.shape[:2], *kernel.shape[contract:-1], -1)


def _split(arrays):
    x, *kernels = arrays
    return x, tuple(kernels)


def _product(equation: str, a, b):
    """In float32 (float64 for float64)."""
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


def _block(x_BxTxN, device, S: int):
    """The tokens of a device."""
    return jax.lax.dynamic_slice_in_dim(x_BxTxN, device * S, S, axis=TOKENS)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _columns(axis, over, x, kernels):
    ring, kernels = Ring(axis), [whole(kernel, 0, over) for kernel in kernels]
    B, S, _ = x.shape
    # Every place is written: the zeros only say where.
    ys = [jnp.zeros((B, ring.devices * S, k.shape[1]), x.dtype) for k in kernels]
    ys = alike(*ys, x)[:-1]
    for device, held in ring.visits(x):
        put = lambda y, k, held=held, at=device * S: jax.lax.dynamic_update_slice_in_dim(y, held @ k, at, axis=TOKENS)
        ys = [put(y, k) for y, k in zip(ys, kernels, strict=True)]
    return list(ys)


def _columns_forward(axis, over, x, kernels):
    return _columns(axis, over, x, kernels), (x, kernels)


def _columns_backward(axis, over, kept, d_ys):
    x, kernels = kept
    # Else the compiler sees that the first hop is that of the forward pass, and keeps a neighbour's tokens until now.
    x, d_ys = jax.lax.optimization_barrier((x, d_ys))
    ring, S, kernels = Ring(axis), x.shape[1], [whole(kernel, 0, over) for kernel in kernels]

    def for_tokens(device):
        return sum(_product("btf,df->btd", _block(d, device, S), k) for d, k in zip(d_ys, kernels, strict=True))

    d_x = ring.collect(for_tokens).astype(x.dtype)
    d_kernels = [0.0] * len(kernels)
    for device, held in ring.visits(x):
        d_kernels = [
            total + _product("btd,btf->df", held, _block(d, device, S))
            for total, d in zip(d_kernels, d_ys, strict=True)
        ]
    return d_x, tuple(part(d.astype(k.dtype), 0, over) for d, k in zip(d_kernels, kernels, strict=True))


_columns.defvjp(_columns_forward, _columns_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _row(axis, over, h, kernel):
    ring, kernel = Ring(axis), whole(kernel, 1, over)
    S = h.shape[1] // ring.devices
    return ring.collect(lambda device: _product("btf,fd->btd", _block(h, device, S), kernel)).astype(h.dtype)


def _row_forward(axis, over, h, kernel):
    return _row(axis, over, h, kernel), (h, kernel)


def _row_backward(axis, over, kept, d_y):
    h, kernel = kept
    ring, S, kernel = Ring(axis), d_y.shape[1], whole(kernel, 1, over)
    d_h, d_kernel = alike(jnp.zeros_like(h), d_y)[0], 0.0
    for device, held in ring.visits(d_y):
        d_h = jax.lax.dynamic_update_slice_in_dim(d_h, held @ kernel.T, device * S, axis=TOKENS)
        d_kernel = d_kernel + _product("btf,btd->fd", _block(h, device, S), held)
    return d_h, part(d_kernel.astype(kernel.dtype), 1, over)


_row.defvjp(_row_forward, _row_backward)
