"""The Hopper kernel that quantises rows, compiled to sm_90a on a machine without a GPU. `.ci/aot` runs this where the compilers
are."""

import json
import sys
from pathlib import Path

from tests.pallas_kernels import cuda_target
from tests.processes import start

SIZES = 640, 4096, 14336, 16384


def compiled() -> list[dict]:
    import jax

    from jaxpar.pallas_kernels.formats import quantise

    found = []
    for size in SIZES:
        done = cuda_target.compiled(
            lambda x: quantise(x, "int8_row", implementation="mosaic_gpu"),
            jax.ShapeDtypeStruct((4096, size), "bfloat16"),
        )
        found.append([dict(target=k.target, registers=k.registers, spills=k.spills) for k in done.kernels])
    return found


@cuda_target.needs_compiler
def test_rows_of_every_size_compile_into_registers(tmp_path):
    """In a process of its own: JAX has started with CPU devices in this one."""
    file = tmp_path / "found.json"
    run = start(["-m", "tests.pallas_kernels.formats.test_quantise_cuda_aot", file], **cuda_target.environment())
    assert run.wait(600) == 0, run.output
    for size, kernels in zip(SIZES, json.loads(file.read_text()), strict=True):
        (kernel,) = kernels
        assert (kernel["target"], kernel["spills"]) == ("sm_90a", 0), (size, kernel)
        # Three blocks a processor at least.
        assert kernel["registers"] <= 168, (size, kernel)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(compiled()))
