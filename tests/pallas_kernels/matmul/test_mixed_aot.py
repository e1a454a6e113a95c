"""The kernel that walks 4-bit and 8-bit blocks compiled by the TPU compiler, on a machine without a TPU. `.ci/aot` runs this
where libtpu is."""

import json
import sys
from pathlib import Path

from tests.pallas_kernels.matmul.test_matmul_aot import CHIPS, ROWS, needs_libtpu
from tests.processes import start


def compiled(topology: str) -> list[int]:
    """Kernels in the program of each row of the block table, for one chip."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxpar.pallas_kernels.formats import quantise
    from jaxpar.pallas_kernels.matmul.mixed import MIXED
    from jaxpar.parallel.topology import tpu_devices

    mesh = Mesh(np.array(tpu_devices(topology)[:1]), ("x",))
    there = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    w = jax.eval_shape(lambda w: quantise(w, "int4_g128", 0), jax.ShapeDtypeStruct((256, 1024), "float32"))
    found = []
    for rows in ROWS:
        shapes = ((rows, 256), "int8"), ((rows, 2), "float32"), ((2,), "bool")
        x, scales, eight = (there(jax.ShapeDtypeStruct(*shape)) for shape in shapes)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            run = jax.jit(lambda *arrays: MIXED.choose("mosaic_tpu", *arrays).default.run(*arrays))
            text = run.trace(x, scales, jax.tree.map(there, w), eight).lower().compile().as_text()
        found.append(text.count("tpu_custom_call"))
    return found


@needs_libtpu
def test_every_row_of_the_table_compiles_for_every_chip(tmp_path):
    """In a process of its own: JAX has started with CPU devices in this one."""
    file = tmp_path / "found.json"
    run = start(["-m", "tests.pallas_kernels.matmul.test_mixed_aot", file])
    assert run.wait(600) == 0, run.output
    assert json.loads(file.read_text()) == {chip: [1] * len(ROWS) for chip in CHIPS}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({chip: compiled(topology) for chip, topology in CHIPS.items()}))
