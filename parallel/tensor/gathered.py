"""Tensor parallelism with tokens spread between branches: all-gather -> column products, row product -> reduce-scatter.

Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", §4.2.2: Megatron's f becomes an
all-gather of the tokens (backward: a reduce-scatter), g a reduce-scatter (backward: an all-gather), so that norms, dropout
and the residual stream have 1/t of the tokens on each of t devices and the bytes stay those of two all-reduces. A device
keeps its own tokens for the backward pass and gathers again, as there.

Where kernels lie over further axes (`over`, FSDP), a product gathers them, forward and again backward, and scatters their
gradients: nothing of them is kept but a device's own part.

Along an axis of one device nothing is sent, and nothing is in the program for it.

Letters: t devices of the axis, S tokens of a device between branches, T = t·S.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax

from jaxpar.pallas_kernels.varying import alike

TOKENS = 1
"""The dimension of an activation that its tokens are."""


def alone(axis: str) -> bool:
    """Whether it has one device. A sum over that one would be a copy."""
    return jax.lax.axis_size(axis) == 1


def gather(x, axis: str):
    """[B, S, ...] of each device -> [B, T, ...], in the devices' order."""
    return x if alone(axis) else jax.lax.all_gather(x, axis, axis=TOKENS, tiled=True)


def scatter(x, axis: str):
    """[B, T, ...] -> [B, S, ...]: this device's tokens, summed over the devices."""
    return x if alone(axis) else jax.lax.psum_scatter(x, axis, scatter_dimension=TOKENS, tiled=True)


def own(x, axis: str):
    """[B, T, ...] -> [B, S, ...]: this device's tokens."""
    if alone(axis):
        return x
    n = x.shape[TOKENS] // jax.lax.axis_size(axis)
    return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * n, n, axis=TOKENS)


def whole(kernel, dimension: int, over: tuple[str, ...]):
    """A kernel of which each device along `over` has a part of one dimension."""
    return jax.lax.all_gather(kernel, over, axis=dimension, tiled=True) if over else kernel


def part(d_kernel, dimension: int, over: tuple[str, ...]):
    """Of a kernel's gradient this device's part, summed over the devices along `over`."""
    return jax.lax.psum_scatter(d_kernel, over, scatter_dimension=dimension, tiled=True) if over else d_kernel


def columns(axis: str, matmul: Callable, x_BxSxD, kernels, over: tuple[str, ...] = ()) -> list:
    """`matmul(all tokens, kernel)` for each kernel [D, ...] of this device: [B, T, ...] each. One gather for all.

    Args:
      over: the axes that D of the kernels lies on besides.
    """
    if over:  # What is sent has the products' dtype.
        kernels = [kernel.astype(x_BxSxD.dtype) for kernel in kernels]
    x, *kernels = alike(x_BxSxD, *kernels)
    return _columns(axis, matmul, over, x, tuple(kernels))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _columns(axis, matmul, over, x, kernels):
    tokens = gather(x, axis)
    return [matmul(tokens, whole(kernel, 0, over)) for kernel in kernels]


def _columns_forward(axis, matmul, over, x, kernels):
    return _columns(axis, matmul, over, x, kernels), (x, kernels)


def _columns_backward(axis, matmul, over, kept, d_ys):
    # Else the compiler sees the forward pass's gather, and keeps all tokens until now.
    x, d_ys = jax.lax.optimization_barrier((kept[0], d_ys))
    products = lambda tokens, kernels: [matmul(tokens, kernel) for kernel in kernels]
    _, pull = jax.vjp(products, gather(x, axis), tuple(whole(kernel, 0, over) for kernel in kept[1]))
    d_tokens, d_kernels = pull(d_ys)
    return scatter(d_tokens, axis), tuple(part(d, 0, over) for d in d_kernels)


_columns.defvjp(_columns_forward, _columns_backward)


def row(axis: str, matmul: Callable, h, kernel, contract: int, over: tuple[str, ...] = ()):
    """`matmul(h [B, T, ...], kernel [..., D], contract)`, summed over the devices: this one's tokens, [B, S, D].

    Args:
      over: the axes that D of the kernel lies on besides.
    """
    if not over:
        return scatter(matmul(h, kernel, contract), axis)
    return scatter(_row(matmul, contract, over, *alike(h, kernel.astype(h.dtype))), axis)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _row(matmul, contract, over, h, kernel):
    return matmul(h, whole(kernel, kernel.ndim - 1, over), contract)


def _row_forward(matmul, contract, over, h, kernel):
    return _row(matmul, contract, over, h, kernel), (h, kernel)


def _row_backward(matmul, contract, over, kept, d_y):
    h, kernel = kept
    last = kernel.ndim - 1
    _, pull = jax.vjp(lambda h, kernel: matmul(h, kernel, contract), h, whole(kernel, last, over))
    d_h, d_kernel = pull(d_y)
    return d_h, part(d_kernel, last, over)


_row.defvjp(_row_forward, _row_backward)
