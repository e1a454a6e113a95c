"""What attention kernels are tested with: float64 by its definition, and the errors that are looked at."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.pallas_kernels.attention import MaskSpec
from jaxpar.pallas_kernels.attention.differentiable import attend

NAMES = ("out", "lse", "dq", "dk", "dv")
INPUTS = {
    "normal": lambda x, n: x,
    "outlier channels": lambda x, n: x * np.where(np.arange(x.shape[-1]) % 16 == 3, 20, 1).astype(x.dtype),
    "all equal": lambda x, n: np.full_like(x, 0.5),
    "large logits": lambda x, n: 30 * x if n < 2 else x,
    "ramp": lambda x, n: x * np.linspace(-1, 2, x.shape[1], dtype=x.dtype).reshape(1, -1, *[1] * (x.ndim - 2)),
}


@dataclass(frozen=True, eq=False)
class Case:
    """A program; `mask` and `starts` are data in it.

    Attributes:
      shape: B, T, S, H, G, K.
      tiles: of the kernel; None: those of its table.
    """

    shape: tuple[int, ...]
    mask: MaskSpec
    dtype: type = jnp.float32
    starts: tuple[int, int] = (0, 0)
    cap: float | None = None
    tiles: Any = None
    scale: float = 0.3


def program(case: Case, make: Callable):
    """`(q, k, v, d_out, d_lse, mask, starts) -> out, lse, dq, dk, dv`, compiled once. `make`: an implementation's plan."""

    def run(q, k, v, d_out, d_lse, mask, starts):
        (out, lse), back = jax.vjp(lambda *x: attend(plan, *x, mask, starts), q, k, v)
        return out, lse, *back((d_out, d_lse))

    B, T, S, H, G, K = case.shape
    q, k = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in ((B, T, H, K), (B, S, G, K)))
    plan = make(q, k, k, mask=case.mask, scale=case.scale, cap=case.cap, q_start=jnp.int32(0), k_start=jnp.int32(0))
    return jax.jit(run)


def documents(B, N, seed):
    """Sorted documents 1 to 3, each row then ends in padding."""
    found = np.sort(np.random.default_rng(seed).integers(1, 4, (B, N)), axis=1)
    found[:, N - 3 :] = 0
    return found.astype(np.int32)


def arguments(case, kind="normal", seed=0):
    q, k, v, d_out, d_lse = draw(seed, *case.shape)
    q, k, v, d_out = (jnp.asarray(INPUTS[kind](x, n), case.dtype) for n, x in enumerate((q, k, v, d_out)))
    return q, k, v, d_out, jnp.asarray(d_lse)


def truth(case, given):
    B, T, S = case.shape[:3]
    lifted = [np.asarray(x.astype(jnp.float32)) for x in given]
    return float64(*lifted, seen_by(case.mask, B, T, S, *case.starts), case.scale, case.cap)


def draw(seed, B, T, S, H, G, K):
    """Float32 normal q, k, v, and cotangents of out and lse."""
    normal = np.random.default_rng(seed).standard_normal
    shapes = (B, T, H, K), (B, S, G, K), (B, S, G, K), (B, T, H, K), (B, H, T)
    return tuple(normal(shape).astype(np.float32) for shape in shapes)


def seen_by(mask: MaskSpec, B, T, S, q_start=0, k_start=0):
    """bool [B, T, S]: the mask from its definition, element by element."""
    found = np.zeros((B, T, S), bool)
    of = lambda array, b, n, start: start + n if array is None else int(array[b % len(array), n])
    for b, t, s in itertools.product(range(B), range(T), range(S)):
        q, k = of(mask.q_index, b, t, q_start), of(mask.k_index, b, s, k_start)
        ok = not mask.causal or k <= q
        ok &= mask.window is None or q - k < int(mask.window)
        if mask.q_segments is not None:
            ok &= (
                int(mask.q_segments[b % len(mask.q_segments), t])
                == int(mask.k_segments[b % len(mask.k_segments), s])
                != 0
            )
        found[b, t, s] = ok
    return found


def float64(q, k, v, d_out, d_lse, seen, scale, cap=None, sinks=None):
    """out, lse, dq, dk, dv in float64 by the chain rule, holding all of the weights; with sinks [H] d_sinks too."""
    q, k, v, d_out, d_lse = (np.asarray(x).astype(np.float64) for x in (q, k, v, d_out, d_lse))
    R = q.shape[2] // k.shape[2]
    k, v = (np.repeat(x, R, axis=2) for x in (k, v))
    logits = scale * np.einsum("bthk,bshk->bhts", q, k)
    slope = np.ones_like(logits)
    if cap is not None:
        slope = 1 - np.tanh(logits / cap) ** 2
        logits = cap * np.tanh(logits / cap)
    logits = np.where(seen[:, None], logits, -np.inf)
    top = np.max(logits, axis=-1, keepdims=True)
    if sinks is not None:
        sinks = np.asarray(sinks).astype(np.float64)[None, :, None, None]
        top = np.maximum(top, sinks)
    top = np.where(np.isneginf(top), 0, top)
    weights = np.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True) + (0 if sinks is None else np.exp(sinks - top))
    lse = np.where(total == 0, -np.inf, np.log(np.where(total == 0, 1, total)) + top)[..., 0]
    weights = weights / np.where(total == 0, 1, total)
    out = np.einsum("bhts,bshk->bthk", weights, v)
    d_weights = np.einsum("bthk,bshk->bhts", d_out, v)
    common = d_lse[..., None] - np.sum(weights * d_weights, axis=-1, keepdims=True)
    d_logits = weights * (d_weights + common)
    d_logits = d_logits * slope * scale
    shared = lambda x: x.reshape(*x.shape[:2], -1, R, x.shape[3]).sum(axis=3)
    dq = np.einsum("bhts,bshk->bthk", d_logits, k)
    dk = shared(np.einsum("bhts,bthk->bshk", d_logits, q))
    dv = shared(np.einsum("bhts,bthk->bshk", weights, d_out))
    if sinks is None:
        return out, lse, dq, dk, dv
    # The logit of a value 0.
    return out, lse, dq, dk, dv, np.sum(np.exp(sinks - top) / total * common, axis=(0, 2, 3))


def no_worse(ours, others, unit: float, about) -> None:
    """`errors` of ours at most 1.5 times those of another, or of the dtype's own rounding. The worst row is one number among
    hundreds: it varies by more than the norm."""
    for kept, x, y, times in zip(("norm", "row", "bias"), ours, others, (1, 3, 1), strict=True):
        assert x <= times * max(1.5 * y, unit), (about, kept, x, y)


def errors(found, expected) -> tuple[float, float, float]:
    """Relative Frobenius error, the worst row's error against the typical row, and the bias along the expected.

    A row is what stands along the last dimension. Non-finite elements must be the same ones.
    """
    found, expected = np.asarray(found).astype(np.float64), np.asarray(expected)
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    found, expected = np.where(finite, found, 0), np.where(finite, expected, 0)
    off, norm = found - expected, np.linalg.norm(expected)
    rows = np.linalg.norm(off.reshape(-1, off.shape[-1]), axis=-1)
    typical = norm / np.sqrt(len(rows))
    return np.linalg.norm(off) / norm, rows.max() / typical, abs((off * expected).sum()) / norm**2
