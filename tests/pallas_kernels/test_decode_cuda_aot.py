"""The Hopper decoding kernel compiled for an H200, on a machine without one. `.ci/aot` runs this where the compiler is."""

import json
import sys
from pathlib import Path

import pytest

from jaxpar.pallas_kernels.decode import mosaic_gpu
from jaxpar.pallas_kernels.tiles import look_up
from tests.pallas_kernels import cuda_target
from tests.processes import start

LAYERS, B, SLOTS = 4, 8, 8192
CASES = {
    # T, H, G, K, dtype, tokens of a page
    "one query": (1, 32, 8, 128, "bfloat16", None),
    "narrow": (1, 32, 8, 64, "float16", None),
    "wide, many queries": (16, 4, 1, 256, "bfloat16", None),
    "pages": (3, 32, 8, 128, "bfloat16", 16),
}
"""They take every row of the block table."""


def compiled() -> dict:
    """Of each case: what the compiler says of its kernel, and the bytes that the program holds besides arguments and results."""
    import jax
    import jax.numpy as jnp

    from jaxpar.pallas_kernels.decode import decode_attention

    def program(q, k, v, lens, window, layer, table):
        call = dict(scale=0.1, window=window, cap=20.0, layer=layer, table_BxP=table, lse_out=True)
        return decode_attention(q, k, v, lens, implementation="mosaic_gpu", **call)

    found = {}
    for label, (T, H, G, K, dtype, page) in CASES.items():
        shape = lambda *sizes, kind="int32": jax.ShapeDtypeStruct(sizes, jnp.dtype(kind))
        places = (B, SLOTS) if page is None else (B * SLOTS // page, page)
        cache = shape(LAYERS, *places, G, K, kind=dtype)
        table = None if page is None else shape(B, SLOTS // page)
        given = shape(B, T, H, K, kind=dtype), cache, cache, shape(B), shape(), shape(), table
        made = cuda_target.compiled(program, *given)
        (one,) = made.kernels
        found[label] = {
            "target": one.target,
            "products": sorted(one.products),
            "copies": one.ptx.count("cp.async.bulk.tensor"),
            "fences": one.ptx.count("fence.proxy.async"),
            "spills": one.spills,
            "shared": one.shared,
            "temp": made.temp_bytes,
        }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("aot") / "found.json"
    run = start(["-m", "tests.pallas_kernels.test_decode_cuda_aot", str(file)], **cuda_target.environment())
    assert run.wait(600) == 0, run.output
    return json.loads(file.read_text())


@cuda_target.needs_compiler
def test_every_row_of_the_table_compiles_into_registers_and_no_cache_is_copied(found):
    assert set(found) == set(CASES)
    for label, (T, H, G, K, dtype, page) in CASES.items():
        made, short = found[label], {"bfloat16": "bf16", "float16": "f16"}[dtype]
        assert made["target"] == "sm_90a"
        # Logits of 64 rows and tokens, and sums over the head size.
        assert made["products"] == sorted({f"m64n{columns}k16.f32.{short}.{short}" for columns in (64, K)}), label
        # Queries, keys and values, page by page, and the result chunk by chunk.
        assert made["copies"] >= 2 * (1 if page is None else 64 // page) + K // 64
        # Behind zeroed values, and behind log-sum-exp and each chunk of the result.
        assert made["fences"] >= 2 + K // 64
        assert made["spills"] == 0, label
        assert made["shared"] <= cuda_target.SHARED_BYTES
        one_layer = B * SLOTS * G * K * 2
        assert made["temp"] < one_layer / (2 if T * H // G == 64 else 8), (label, made)


@pytest.mark.quick
def test_the_cases_take_every_row_of_the_table():
    taken = {look_up(mosaic_gpu.TABLE, "NVIDIA H200", head_size=K) for _, _, _, K, *_ in CASES.values()}
    assert taken == {row.tiles for row in mosaic_gpu.TABLE}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(compiled()))
