"""The Hopper kernel for few rows of x whose warps widen codes for themselves, compiled for an H200 on a machine without one: which
instructions come out. `.ci/aot` runs this where the compiler is."""

import json
import re
import sys
from pathlib import Path

from jaxpar.pallas_kernels.matmul import gpu_codes, mosaic_gpu_codes
from jaxpar.pallas_kernels.tiles import look_up
from tests.pallas_kernels import cuda_target
from tests.processes import start

CASES = {
    # Rows, K, N, format, blocks that a multiprocessor has room for at least
    "up, 1": (1, 4096, 14336, "int4_g128", 4),
    "down, 1": (1, 14336, 4096, "int4_g128", 4),
    "up, 16": (16, 4096, 14336, "int4_g128", 3),
    "up, 8 bits": (1, 4096, 14336, "int8_row", 4),
    "no cluster, 11": (11, 2048, 40960, "int4_row", 3),
}
REGISTERS, SHARED, RESERVED = 65536, 233472, 1024
"""Of a multiprocessor; and what each block has of shared memory besides its own."""


def compiled() -> dict:
    """What the compiler says of each case."""
    import jax
    import jax.numpy as jnp

    from jaxpar.pallas_kernels.formats import quantise
    from jaxpar.pallas_kernels.matmul import quant_matmul

    found = {}
    for label, (rows, K, N, form, _) in CASES.items():
        x = jax.ShapeDtypeStruct((rows, K), jnp.bfloat16)
        w = jax.eval_shape(lambda K=K, N=N, form=form: quantise(jnp.zeros((K, N)), form, 0))
        made = cuda_target.compiled(lambda x, w: quant_matmul(x, w, implementation="mosaic_gpu_codes"), x, w)
        (one,) = made.kernels
        count = lambda text, ptx=one.ptx: len(re.findall(text, ptx))
        found[label] = {
            "target": one.target,
            "products": count(r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32"),
            "loads": count(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\.shared\.b16"),
            "widened": count(r"fma\.rn\.bf16x2"),
            "sent": count(r"st\.shared::cluster\.v2\.f32"),
            "mapped": count(r"mapa\.shared::cluster"),
            "copies": count(r"cp\.async\.bulk\.tensor"),
            "registers": one.registers,
            "spills": one.spills,
            "shared": one.shared,
            "temp": made.temp_bytes,
            "calls": made.text.count(" fusion(") + made.text.count(" copy("),
        }
    return found


@cuda_target.needs_compiler
def test_every_row_of_the_table_compiles_into_registers_and_is_one_kernel(tmp_path):
    file = tmp_path / "found.json"
    run = start(
        ["-m", "tests.pallas_kernels.matmul.test_matmul_codes_cuda_aot", str(file)], **cuda_target.environment()
    )
    assert run.wait(600) == 0, run.output
    found, taken = json.loads(file.read_text()), set()
    assert set(found) == set(CASES)
    for label, (rows, K, N, form, blocks) in CASES.items():
        made, bits = found[label], 8 if form.startswith("int8") else 4
        tiles = look_up(mosaic_gpu_codes.TABLE, "NVIDIA H200", bits=bits, rows=rows)
        taken.add(tiles)
        columns, splits = (
            -(-rows // 8),
            gpu_codes.splits_of(-(-K // gpu_codes.depth_of(bits)), N // tiles.columns, tiles.blocks),
        )
        assert made["target"] == "sm_90a"
        # Of a warp and a step: tiles of 16 columns, of 64 rows of codes.
        assert made["loads"] == tiles.columns // 16 * 2, label
        assert made["products"] == tiles.columns // 16 * (8 * 4 // bits) * columns, label
        # A word of a load is one of four codes of 8 bits or eight of 4, two a fused multiplication.
        assert made["widened"] == made["loads"] * 4 * (16 // bits), label
        assert made["sent"] == tiles.columns // 16 * columns * 2
        assert made["mapped"] == (made["sent"] if splits > 1 else 0), (label, splits)
        # Codes and scales, of the steps ahead and of each next one.
        assert made["copies"] == 2 * (tiles.stages + 1)
        assert made["spills"] == 0, (label, made)
        assert blocks * 128 * -(-made["registers"] // 8) * 8 <= REGISTERS, (label, made)
        assert blocks * (made["shared"] + RESERVED) <= SHARED, (label, made)
        # Scales of columns may be broadcast; nothing else is done to an operand, or to the result.
        assert made["temp"] <= 4 * N, (label, made)
        assert made["calls"] == 0, label
    assert taken == {row.tiles for row in mosaic_gpu_codes.TABLE}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(compiled()))
