"""What decoding kernels are tested with: caches of every kind, and float64 by definition."""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpar.pallas_kernels.decode import mosaic_tpu
from jaxpar.pallas_kernels.decode.xla import gathered
from jaxpar.pallas_kernels.formats.quantised import quantise
from tests.pallas_kernels.attention_cases import errors, float64

LAYERS, LAYER = 2, 1


@dataclass(frozen=True)
class Case:
    """A program; lengths, window and page table are data in it.

    Attributes:
      shape: B, T, S, H, G, K.
      form: the number format of the cache, or None.
      page: tokens of a page. None: a dense cache.
      window: of the data; `known`: it is built into the program.
    """

    shape: tuple[int, ...]
    tiles: mosaic_tpu.DecodeTiles
    lens: tuple[int, ...]
    dtype: Any = jnp.float32
    form: str | None = None
    page: int | None = None
    window: int | None = None
    known: bool = False
    cap: float | None = None
    scale: float = 0.3


def call(case: Case, run, **more):
    """`(q, k, v, lens, window, table) -> out, lse`, compiled once. `run`: an implementation's function."""

    def program(q, k, v, lens, window, table):
        window = case.window if case.known else None if case.window is None else window
        table = None if case.page is None else table
        return run(q, k, v, lens, scale=case.scale, window=window, cap=case.cap, layer=LAYER, table_BxP=table, **more)

    return jax.jit(program)


def arguments(case: Case, seed=0):
    """Random ones. Pages lie in the pool in any order, and are named only as far as rows hold them."""
    B, T, S, H, G, K = case.shape
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape).astype(np.float32), case.dtype)
    lens = np.array(case.lens, np.int32)
    table = np.full((B, 1), -1, np.int32)
    places = (B, S)
    if case.page is not None:
        P = S // case.page
        places = (B * P + 1, case.page)
        table = rng.permutation(B * P + 1)[: B * P].reshape(B, P).astype(np.int32)
        table = np.where(np.arange(P) * case.page < lens[:, None], table, np.array([[-1], [10**6]] * B)[:B])
    q, (k, v) = draw(B, T, H, K), (draw(LAYERS, *places, G, K) for _ in range(2))
    if case.form is not None:
        k, v = (quantise(x.astype(jnp.float32), case.form) for x in (k, v))
    return q, k, v, jnp.asarray(lens), jnp.int32(case.window or 0), jnp.asarray(table, jnp.int32)


def poisoned(case: Case, given):
    """The arguments with NaN in every slot that no row holds, in all layers but also in the one that is asked for."""
    q, k, v, lens, window, table = given
    places = jax.tree.leaves(k)[0].shape[1:3]
    held = np.zeros(places, bool)
    for b, n in enumerate(np.asarray(lens)):
        for s in range(min(n, case.shape[2])):
            at = (b, s) if case.page is None else (int(table[b, s // case.page]), s % case.page)
            held[at] = True
    spoil = lambda x: jnp.where(held[None, :, :, None, None], x, jnp.nan).astype(x.dtype) if x.dtype != jnp.uint8 else x
    return q, jax.tree.map(spoil, k), jax.tree.map(spoil, v), lens, window, table


def truth(case: Case, given):
    """out [B, T, H, K] and lse [B, H, T] in float64, of the numbers that the cache holds."""
    q, k, v, lens, window, table = given
    B, T, S, H, *_ = case.shape
    table = None if case.page is None else table
    k, v = (np.asarray(gathered(x, LAYER, table, case.dtype).astype(jnp.float32)) for x in (k, v))
    seen = np.zeros((B, T, S), bool)
    for b, t, s in itertools.product(range(B), range(T), range(S)):
        index = int(lens[b]) - T + t
        seen[b, t, s] = s <= index and (case.window is None or s > index - int(window))
    q = np.asarray(q.astype(jnp.float32))
    return float64(q, k, v, np.zeros_like(q), np.zeros((B, H, T)), seen, case.scale, case.cap)[:2]


def check_data(kernel, case: Case, base, others, ceiling: float) -> None:
    """The same program with other lengths, windows and tables: right, and another result than with `base`; of rows that hold
    nothing exactly nothing."""
    before = kernel(*base)
    for other in others:
        given = (*base[:3], *other)
        found, expected = kernel(*given), truth(case, given)
        if not np.isfinite(expected[1]).any():
            np.testing.assert_array_equal(found[0], expected[0])
            np.testing.assert_array_equal(found[1], expected[1])
        else:
            assert errors(found[0], expected[0])[0] < ceiling
            assert np.abs(np.asarray(found[0], np.float32) - np.asarray(before[0], np.float32)).max() > 0.01
