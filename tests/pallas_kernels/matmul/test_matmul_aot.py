"""The TPU kernels of quantised products compiled by the TPU compiler, on a machine without a TPU. `.ci/aot` runs this where
libtpu is."""

import json
import sys
from pathlib import Path

import pytest

from jaxpar.parallel.topology import installed
from tests.processes import start

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
ROWS = (16, 512)
"""One for each row of the block table."""
WEIGHTS = ("int8_row", "int4_g128", "int4_g32")
needs_libtpu = pytest.mark.skipif(not installed(), reason="libtpu is not installed (extra tpu-aot)")


def compiled(topology: str) -> list[dict]:
    """Products of each size and format for one chip: how many kernels the compiled program has."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxpar.pallas_kernels.formats import get, quantise
    from jaxpar.pallas_kernels.matmul import Operands, quant_matmul
    from jaxpar.parallel.topology import tpu_devices

    mesh = Mesh(np.array(tpu_devices(topology)[:1]), ("x",))
    there = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    found = []
    for rows in ROWS:
        for name in WEIGHTS:
            x = there(jax.ShapeDtypeStruct((rows, 2048), "bfloat16"))
            w = jax.eval_shape(lambda w, name=name: quantise(w, name, 0), jax.ShapeDtypeStruct((2048, 1024), "float32"))
            how = Operands(inputs=get("int8_row") if name == "int8_row" else None)
            # The mesh in scope says what the trace is for, and with it which blocks.
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                run = jax.jit(lambda x, w, how=how: quant_matmul(x, w, how, implementation="mosaic_tpu"))
                text = run.trace(x, jax.tree.map(there, w)).lower().compile().as_text()
            found.append({"rows": rows, "weights": name, "kernels": text.count("tpu_custom_call")})
    return found


@needs_libtpu
@pytest.mark.parametrize("chip", CHIPS)
def test_every_row_of_the_table_compiles(chip, tmp_path):
    """In a process of its own: JAX has started with CPU devices in this one."""
    file = tmp_path / "found.json"
    run = start(["-m", "tests.pallas_kernels.matmul.test_matmul_aot", CHIPS[chip], str(file)])
    assert run.wait(600) == 0, run.output
    found = json.loads(file.read_text())
    assert [(row["rows"], row["weights"]) for row in found] == [(rows, name) for rows in ROWS for name in WEIGHTS]
    assert all(row["kernels"] == 1 for row in found), found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(compiled(sys.argv[1])))
