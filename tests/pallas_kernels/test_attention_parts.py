"""Gradients of attention over parts of the keys, each by an implementation of its own: their sum is that over all keys, and is
not rounded to the operands' dtype on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpar.pallas_kernels import gpu
from jaxpar.pallas_kernels.attention import MaskSpec, attention, attention_gradients
from jaxpar.pallas_kernels.attention.block import dropped
from tests.pallas_kernels.attention_cases import draw, errors, float64, seen_by

SHAPE, START, SCALE = (1, 24, 48, 4, 2, 16), 20, 0.4
KERNELS = ("mosaic_tpu", "mosaic_gpu") if gpu.MAY_INTERPRET else ("mosaic_tpu",)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["xla", *KERNELS])
def test_parts_of_the_keys_add_up_in_float32(name):
    *qkv, d_out, d_lse = draw(0, *SHAPE)
    q, k, v, d_out = (jnp.asarray(x, jnp.bfloat16) for x in (*qkv, d_out))
    mask = MaskSpec(q_segments=np.ones((1, 24), np.int32), k_segments=np.repeat([[2, 1]], [5, 43], 1).astype(np.int32))
    truth = float64(
        *(np.asarray(x, np.float32) for x in (q, k, v, d_out)), d_lse, seen_by(mask, *SHAPE[:3], START), SCALE
    )
    call = dict(scale=SCALE, implementation=name, interpret=name != "xla")

    @jax.jit
    def parts(q, k, v, d_out, d_lse):
        out, lse = attention(q, k, v, mask=mask, scale=SCALE, q_start=START, lse_out=True, implementation="xla")
        drop = dropped(out, d_out, d_lse)
        found = []
        for at in (slice(0, 24), slice(24, 48)):
            part = mask.replace(k_segments=mask.k_segments[:, at])
            rows = q, k[:, at], v[:, at], d_out, lse, drop
            found.append(attention_gradients(*rows, mask=part, q_start=START, k_start=at.start, **call))
        return found

    (dq, *first), (dq_more, *second) = parts(q, k, v, d_out, d_lse)
    assert {x.dtype for x in (dq, *first)} == {jnp.dtype(jnp.float32)}
    sums = dq + dq_more, *(jnp.concatenate(pair, axis=1) for pair in zip(first, second, strict=True))
    for label, found, expected in zip(("dq", "dk", "dv"), sums, truth[2:], strict=True):
        assert errors(found, expected)[0] < 6e-3, label
        # Of float32 numbers, next to none happens to be one of bfloat16, where it is not zero.
        rounded = np.asarray(found.astype(jnp.bfloat16).astype(jnp.float32) == found)[np.asarray(found) != 0]
        assert rounded.mean() < 0.05, label
