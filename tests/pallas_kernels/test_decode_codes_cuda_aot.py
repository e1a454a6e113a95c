"""The Hopper decoding kernel that widens codes in registers, compiled for an H200 on a machine without one: what interpreting it
does not show is which instructions come out. `.ci/aot` runs this where the compiler is."""

import json
import re
import sys
from pathlib import Path

import pytest

from jaxpar.pallas_kernels.decode import mosaic_gpu_codes
from jaxpar.pallas_kernels.tiles import look_up
from tests.pallas_kernels import cuda_target
from tests.pallas_kernels.test_decode_cuda_aot import SLOTS, B, given
from tests.processes import start

CASES = {
    # T, H, G, K, format of the cache, tokens of a page, window and cap
    "KV4": (1, 32, 8, 128, "int4_row", None, False),
    "KV8": (1, 32, 8, 128, "int8_row", None, False),
    "KV4 blocks, window": (1, 32, 8, 128, "int4_g32", None, True),
    "wide KV8": (1, 4, 1, 256, "int8_row", None, False),
    "wide KV8, four heads": (1, 8, 4, 256, "int8_row", None, True),
    "wide KV4 pages": (2, 4, 1, 256, "int4_g32", 32, True),
    "narrow KV4": (1, 8, 1, 64, "int4_row", None, False),
    "narrow KV8 pages, two heads": (3, 8, 2, 64, "int8_row", 64, True),
}
"""They take every row of the block table."""
BITS = {"int8_row": 8, "int4_row": 4, "int4_g32": 4}
BLOCKS = {"KV4": 3, "KV8": 3, "KV4 blocks, window": 2, "wide KV8": 2, "narrow KV4": 3, "wide KV4 pages": 2}
"""That a multiprocessor has room for at least, in registers and shared memory, of those that the bandwidth is wanted from."""
REGISTERS, SHARED, RESERVED = 65536, 233472, 1024
"""Of a multiprocessor; and what each block has of shared memory besides its own."""


def compiled() -> dict:
    """Of each case: what the compiler says of its kernel, and the bytes that the program holds besides arguments and results."""
    from jaxpar.pallas_kernels.decode import decode_attention

    found = {}
    for label, (T, H, G, K, form, page, more) in CASES.items():

        def program(q, k, v, lens, window, layer, table, more=more):
            call = dict(
                scale=0.1, window=window if more else None, cap=20.0 if more else None, layer=layer, lse_out=True
            )
            return decode_attention(q, k, v, lens, **call, table_BxP=table, implementation="mosaic_gpu_codes")

        made = cuda_target.compiled(program, *given(T, H, G, K, "bfloat16", form, page))
        (one,) = made.kernels
        count = lambda text, ptx=one.ptx: len(re.findall(text, ptx))
        found[label] = {
            "target": one.target,
            "products": count(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32"),
            "loads": count(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared\.b16"),
            "turned loads": count(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16"),
            "turns": count(r"movmatrix\.sync\.aligned\.m8n8\.trans\.b16"),
            "widened": count(r"fma\.rn\.bf16x2"),
            "copies": count(r"cp\.async\.bulk\.tensor"),
            "registers": one.registers,
            "spills": one.spills,
            "shared": one.shared,
            "temp": made.temp_bytes,
        }
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    file = tmp_path_factory.mktemp("aot") / "found.json"
    run = start(["-m", "tests.pallas_kernels.test_decode_codes_cuda_aot", str(file)], **cuda_target.environment())
    assert run.wait(600) == 0, run.output
    return json.loads(file.read_text())


@cuda_target.needs_compiler
def test_every_row_of_the_table_compiles_into_registers_and_no_cache_is_copied(found):
    assert set(found) == set(CASES)
    for label, (T, H, G, K, form, page, _) in CASES.items():
        made, bits = found[label], BITS[form]
        assert made["target"] == "sm_90a"
        tiles = tiles_of(label)
        abreast = mosaic_gpu_codes.abreast(G)
        tokens = max(tiles.tokens, 16 * 4 // abreast)
        # Of a warp: tiles of 16 tokens, products of each, and the columns of 8 queries.
        many, columns = tokens * abreast // 4 // 16, -(-T * H // G // 8)
        each, pieces = K * bits // 8 // 32, tokens // min(tokens, page or tokens)
        assert made["loads"] == made["turned loads"] == many * each, label
        assert made["products"] == 2 * many * (K // 16) * columns, label
        blocks = K // 32 if form.endswith("g32") else 1
        assert made["turns"] == 2 * many * columns * blocks, label
        # A word of a load is one of four codes of 8 bits or eight of 4, two a fused multiplication.
        assert made["widened"] == 2 * many * each * 4 * (16 // bits), label
        # Keys and values, with their scales, of the steps ahead and of each next one.
        assert made["copies"] == 4 * pieces * (tiles.stages + 1), label
        assert made["spills"] == 0, (label, made)
        least = BLOCKS.get(label, 1)
        assert least * 128 * -(-made["registers"] // 8) * 8 <= REGISTERS, (label, made)
        assert least * (made["shared"] + RESERVED) <= SHARED, (label, made)
        # Scales are turned but those of four heads with one each; blocks' of 32 are a quarter of their codes, of keys and of
        # values.
        one_layer = B * SLOTS * G * K * bits // 8
        # Beside them there are the results of splits, of which a row has as many as leave each four steps.
        parts = B * H * T * 4 * (K + 1) * (SLOTS // tokens // 4)
        assert made["temp"] < one_layer * (0.8 if form == "int4_g32" else 0.3) + parts, (label, made)


def tiles_of(label):
    _, _, G, K, form, *_ = CASES[label]
    heads = mosaic_gpu_codes.abreast(G)
    row = heads * K * BITS[form] // 8
    return look_up(mosaic_gpu_codes.TABLE, "NVIDIA H200", bits=BITS[form], abreast=heads, row_bytes=row)


@pytest.mark.quick
def test_the_cases_take_every_row_of_the_table():
    assert {tiles_of(label) for label in CASES} == {row.tiles for row in mosaic_gpu_codes.TABLE}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(compiled()))
