"""The Hopper kernels of quantised products compiled to sm_90a on a machine without a GPU. `.ci/aot` runs this where the
compilers are."""

import json
import sys
from pathlib import Path

from tests.pallas_kernels import cuda_target
from tests.processes import start

K, N = 2048, 4096
CASES = [
    # Rows of x, formats of x and w, dtype of the result, matrix instruction: every row of the block tables.
    (64, "int8_row", "int8_row", "bfloat16", "m64n128k32.s32.s8.s8"),
    (4096, "int8_row", "int8_row", "float32", "m64n256k32.s32.s8.s8"),
    (64, "fp8_e4m3_row", "fp8_e4m3_row", "bfloat16", "m64n128k32.f32.e4m3.e4m3"),
    (4096, "fp8_e4m3_row", "fp8_e4m3_row", "float32", "m64n128k32.f32.e4m3.e4m3"),
    (512, None, "int4_g128", "bfloat16", "m64n128k16.f32.bf16.bf16"),
    (512, None, "int8_row", "bfloat16", "m64n64k16.f32.bf16.bf16"),
]
FEW_ROWS = [
    (1, None, "int4_g128", "bfloat16", "m64n8k16.f32.bf16.bf16"),
    (16, None, "int4_row", "bfloat16", "m64n16k16.f32.bf16.bf16"),
    (64, None, "int4_g128", "bfloat16", "m64n64k16.f32.bf16.bf16"),
    (16, None, "int8_row", "bfloat16", "m64n16k16.f32.bf16.bf16"),
    (64, None, "int8_row", "bfloat16", "m64n64k16.f32.bf16.bf16"),
]
WIDE = 14336
"""Columns that leave no processor idle: K is in one part. Of `N` it is in four, in two clusters of two blocks."""


def compiled() -> list[dict]:
    """What the compiler says of each case."""
    import jax

    from jaxpar.pallas_kernels.formats import get, quantise
    from jaxpar.pallas_kernels.matmul import Operands, quant_matmul

    found = []
    cases = [("mosaic_gpu", N, case) for case in CASES]
    cases += [("mosaic_gpu_few_rows", columns, case) for columns in (N, WIDE) for case in FEW_ROWS]
    for name, columns, (rows, inputs, weights, dtype, _) in cases:
        x = jax.ShapeDtypeStruct((rows, K), dtype)
        w = jax.eval_shape(
            lambda w, weights=weights: quantise(w, weights, 0), jax.ShapeDtypeStruct((K, columns), "float32")
        )
        how = Operands(inputs and get(inputs))
        done = cuda_target.compiled(lambda x, w, how=how, name=name: quant_matmul(x, w, how, implementation=name), x, w)
        found.append(
            {
                "kernels": [
                    {
                        "target": kernel.target,
                        "products": sorted(kernel.products),
                        "registers": kernel.registers,
                        "spills": kernel.spills,
                        "shared": kernel.shared,
                        "to_several": "multicast::cluster" in kernel.ptx,
                    }
                    for kernel in done.kernels
                ],
                "temp": done.temp_bytes,
            }
        )
    return found


def laid() -> tuple[int, int]:
    """Bytes that a product of int8 takes beside its operands, w as JAX lays it, and along K."""
    import jax
    import jax.numpy as jnp
    from jax.experimental.layout import Format, Layout

    from jaxpar.pallas_kernels.formats import quantise
    from jaxpar.pallas_kernels.matmul.mosaic_gpu import product_mosaic_gpu

    there = jax.sharding.NamedSharding(cuda_target.mesh(), jax.sharding.PartitionSpec())
    coded = lambda shape, axis: jax.eval_shape(
        lambda w: quantise(w, "int8_row", axis), jax.ShapeDtypeStruct(shape, "float32")
    )
    put = lambda q, how: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how), q)
    a = put(coded((256, K), 1), there)
    found = []
    for how in (there, Format(Layout((1, 0)), there)):
        with jax.sharding.use_abstract_mesh(cuda_target.mesh().abstract_mesh):
            run = jax.jit(lambda a, b: product_mosaic_gpu(a, b, (-1, -2), jnp.bfloat16))
            done = run.trace(a, put(coded((K, N), 0), how)).lower(lowering_platforms=("cuda",)).compile()
        found.append(done.memory_analysis().temp_size_in_bytes)
    return tuple(found)


LAYERS = 3


def stacked() -> tuple[int, int]:
    """Bytes that a loop over layers of W8A8 takes beside its arguments, weights as JAX lays them, and as `laid_along` does."""
    import jax
    from jax.experimental.layout import Format

    from jaxpar.pallas_kernels.formats import get, quantise
    from jaxpar.pallas_kernels.formats.quantised import layout_along
    from jaxpar.pallas_kernels.matmul import Operands, quant_matmul

    there = jax.sharding.NamedSharding(cuda_target.mesh(), jax.sharding.PartitionSpec())
    w = jax.eval_shape(lambda w: quantise(w, "int8_row", 1, stacked=1), jax.ShapeDtypeStruct((LAYERS, K, K), "float32"))
    x = jax.ShapeDtypeStruct((16, K), "bfloat16", sharding=there)
    layer = lambda x, w: (quant_matmul(x, w, Operands(get("int8_row"))).astype(x.dtype), None)
    found = []
    for how in (there, Format(layout_along(w.ndim, w.axis, stacked=1), there)):
        put = jax.tree.map(lambda x, how=how: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=how), w)
        with jax.sharding.use_abstract_mesh(cuda_target.mesh().abstract_mesh):
            run = jax.jit(lambda x, w: jax.lax.scan(layer, x, w)[0]).trace(x, put)
            done = run.lower(lowering_platforms=("cuda",)).compile()
        found.append(done.memory_analysis().temp_size_in_bytes)
    return tuple(found)


@cuda_target.needs_compiler
def test_every_row_of_the_tables_compiles_without_spills(tmp_path):
    """In a process of its own: JAX has started with CPU devices in this one."""
    from jaxpar.pallas_kernels.matmul import mosaic_gpu

    assert len(CASES) == sum(map(len, (mosaic_gpu.INTEGERS, mosaic_gpu.FLOATS, mosaic_gpu.SIXTEEN)))
    assert len(FEW_ROWS) >= len(mosaic_gpu.FEW_ROWS)
    file = tmp_path / "found.json"
    run = start(["-m", "tests.pallas_kernels.matmul.test_matmul_cuda_aot", file], **cuda_target.environment())
    assert run.wait(600) == 0, run.output
    made = json.loads(file.read_text())
    # A byte a weight, for its transposition; nothing of weights that lie along K already.
    assert made["laid"] == [K * N, 0]
    # A copy of the whole stack, and none where it lies as XLA takes slices of it.
    copied, taken = made["stacked"]
    assert copied - taken > 0.9 * LAYERS * K * K
    assert taken < 2 * K * K
    for n, (case, found) in enumerate(zip(CASES + 2 * FEW_ROWS, made["cases"], strict=True)):
        rows, inputs, weights, _, product = case
        # Another one quantises x.
        (kernel,) = [one for one in found["kernels"] if one["products"]]
        assert kernel["target"] == "sm_90a"
        assert kernel["products"] == [product], case
        assert kernel["spills"] == 0, case
        if n >= len(CASES):
            # A block of up to four warpgroups; nothing is padded or split by another kernel, and sums of parts alone are added.
            assert kernel["registers"] <= (128 if rows <= 16 else 255)
            parts = 2 if n < len(CASES) + len(FEW_ROWS) else 0
            assert found["temp"] <= parts * rows * N * 4, (case, found)
        else:
            # One block: two warpgroups with 232 registers a thread and one with 40, which is 504 of 512.
            assert kernel["registers"] == 168
        assert kernel["shared"] <= cuda_target.SHARED_BYTES, case
        # Blocks of a cluster send their copies to each other.
        assert kernel["to_several"] == (inputs is not None and rows > 128), case
        # Weights with a 16-bit x are read as they are stored: there is no copy of them, widened or transposed.
        if inputs is None:
            assert found["temp"] < K * N // (2 if weights == "int4_g128" else 1), (case, found)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({"cases": compiled(), "laid": laid(), "stacked": stacked()}))
