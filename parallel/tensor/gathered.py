"""Tensor parallelism with tokens spread between branches: all-gather -> column products, row product -> reduce-scatter.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", §4.2.2: Megatron's f becomes an
all-gather of the tokens (backward: a reduce-scatter), g a reduce-scatter (backward: an all-gather), so that norms, dropout
and the residual stream have 1/t of the tokens on each of t devices and the bytes stay those of two all-reduces. A device
keeps its own tokens for the backward pass and gathers again, as there.

Letters: t devices of the axis, S tokens of a device between branches, T = t·S.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from jaxpar.pallas_kernels.varying import alike

TOKENS = 1
"""The dimension of an activation that its tokens are."""


def gather(x, axis: str):
    """[B, S, ...] of each device -> [B, T, ...], in the devices' order."""
    return jax.lax.all_gather(x, axis, axis=TOKENS, tiled=True)


def scatter(x, axis: str):
    """[B, T, ...] -> [B, S, ...]: this device's tokens, summed over the devices."""
    return jax.lax.psum_scatter(x, axis, scatter_dimension=TOKENS, tiled=True)


def own(x, axis: str):
    """[B, T, ...] -> [B, S, ...]: this device's tokens."""
    n = x.shape[TOKENS] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * n, n, axis=TOKENS)


def columns(axis: str, matmul: Callable, x_BxSxD, kernels) -> list:
    """`matmul(all tokens, kernel)` for each kernel [D, ...] of this device: [B, T, ...] each. One gather for all."""
    x, *kernels = alike(x_BxSxD, *kernels)
    return _columns(axis, matmul, x, tuple(kernels))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _columns(axis, matmul, x, kernels):
    whole = gather(x, axis)
    return [matmul(whole, kernel) for kernel in kernels]


def _columns_forward(axis, matmul, x, kernels):
    return _columns(axis, matmul, x, kernels), (x, kernels)


def _columns_backward(axis, matmul, kept, d_ys):
    # Else the compiler sees the forward pass's gather, and keeps all tokens until now.
    x, d_ys = jax.lax.optimization_barrier((kept[0], d_ys))
    products = lambda whole, kernels: [matmul(whole, kernel) for kernel in kernels]
    _, pull = jax.vjp(products, gather(x, axis), kept[1])
    d_whole, d_kernels = pull(d_ys)
    return scatter(d_whole, axis), d_kernels


_columns.defvjp(_columns_forward, _columns_backward)


def row(axis: str, matmul: Callable, h, kernel, contract: int):
    """`matmul(h [B, T, ...], kernel [..., D], contract)`, summed over the devices: this one's tokens, [B, S, D]."""
    return scatter(matmul(h, kernel, contract), axis)
