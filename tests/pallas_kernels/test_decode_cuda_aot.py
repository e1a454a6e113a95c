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
    # T, H, G, K, dtype of queries, format of the cache, tokens of a page
    "one query": (1, 32, 8, 128, "bfloat16", None, None),
    "narrow": (1, 32, 8, 64, "float16", None, None),
    "wide, many queries": (16, 4, 1, 256, "bfloat16", None, None),
    "pages": (3, 32, 8, 128, "bfloat16", None, 16),
    "KV8": (1, 32, 8, 128, "bfloat16", "int8_row", None),
    "KV4": (1, 32, 8, 128, "bfloat16", "int4_row", None),
    "KV4 blocks": (1, 32, 8, 128, "bfloat16", "int4_g32", None),
    "wide KV8": (1, 4, 1, 256, "bfloat16", "int8_row", None),
    "wide KV4 pages": (2, 4, 1, 256, "bfloat16", "int4_g32", 32),
}
"""They take every row of the block table."""
BITS = {None: 16, "int8_row": 8, "int4_row": 4, "int4_g32": 4}
SPILLS = {64: 0, 128: 0, 256: 192}
"""Bytes by head size, at most: of codes, with addresses beside 128 registers of sums. Floats spill nothing."""


def given(T: int, H: int, G: int, K: int, dtype: str, form: str | None, page: int | None) -> tuple:
    """Shapes of queries, keys, values, lengths, window, layer and page table."""
    import jax
    import jax.numpy as jnp

    from jaxpar.pallas_kernels.formats.quantised import quantise

    shape = lambda *sizes, kind="int32": jax.ShapeDtypeStruct(sizes, jnp.dtype(kind))
    places = (B, SLOTS) if page is None else (B * SLOTS // page, page)
    cache = shape(LAYERS, *places, G, K, kind=dtype)
    if form is not None:
        cache = jax.eval_shape(lambda: quantise(jnp.zeros(cache.shape), form))
    table = None if page is None else shape(B, SLOTS // page)
    return shape(B, T, H, K, kind=dtype), cache, cache, shape(B), shape(), shape(), table


def compiled() -> dict:
    """Of each case: what the compiler says of its kernel, and the bytes that the program holds besides arguments and results."""
    from jaxpar.pallas_kernels.decode import decode_attention

    def program(q, k, v, lens, window, layer, table):
        call = dict(scale=0.1, window=window, cap=20.0, layer=layer, table_BxP=table, lse_out=True)
        return decode_attention(q, k, v, lens, implementation="mosaic_gpu", **call)

    found = {}
    for label, case in CASES.items():
        made = cuda_target.compiled(program, *given(*case))
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
    for label, (_, _, G, K, dtype, form, page) in CASES.items():
        made, short = found[label], {"bfloat16": "bf16", "float16": "f16"}[dtype]
        bits = BITS[form]
        assert made["target"] == "sm_90a"
        # Logits of 64 rows and tokens, and sums over the head size, or over half of it: even and odd channels.
        columns = {64, K // 2 if bits == 4 else K}
        assert made["products"] == sorted({f"m64n{n}k16.f32.{short}.{short}" for n in columns}), label
        # Queries, keys and values (with scales), page by page, and the result chunk by chunk.
        pieces = 64 // min(page or 64, 64)
        assert made["copies"] >= 1 + 2 * pieces * (1 if form is None else 2) + K // 64
        # Behind zeroed values or widened codes, behind log-sum-exp and each chunk of the result.
        assert made["fences"] >= 2 + K // 64 + (0 if form is None else 3)
        assert made["spills"] <= (0 if form is None else SPILLS[K]), (label, made)
        assert made["shared"] <= cuda_target.SHARED_BYTES
        # Scales are turned but those of eight heads with one each; blocks' of 32 are a quarter of their codes, of keys and of
        # values.
        one_layer = B * SLOTS * G * K * bits // 8
        assert made["temp"] < one_layer * (0.8 if form == "int4_g32" else 0.5), (label, made)


@pytest.mark.quick
def test_the_cases_take_every_row_of_the_table():
    taken = set()
    for _, _, _, K, _, form, _ in CASES.values():
        bits = BITS[form]
        taken.add(look_up(mosaic_gpu.TABLE, "NVIDIA H200", head_size=K, bits=bits))
    assert taken == {row.tiles for row in mosaic_gpu.TABLE}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(compiled()))
