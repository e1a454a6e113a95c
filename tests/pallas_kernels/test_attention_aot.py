"""The TPU attention kernels compiled by the TPU compiler, on a machine without a TPU. `.ci/aot` runs this where libtpu is."""

import json
import math
import re
import sys
from pathlib import Path

import pytest

from jaxpar.parallel.topology import installed
from tests.processes import start

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
SHAPES = ((128, "bfloat16"), (256, "float32"))
"""Head size and dtype that take most of each row of the block table; on v5e the other head sizes that models have too."""
MORE = ((64, "bfloat16"), (96, "float32"))
QUERIES = 1024
needs_libtpu = pytest.mark.skipif(not installed(), reason="libtpu is not installed (extra tpu-aot)")


def compiled(topology: str) -> list[dict]:
    """Forward and backward with everything that a mask has, for one chip: kernels in each program, and elements of the
    largest array that it holds."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxpar.pallas_kernels.attention import MaskSpec, attention
    from jaxpar.parallel.topology import tpu_devices

    mesh = Mesh(np.array(tpu_devices(topology)[:1]), ("x",))
    shape = lambda sizes, dtype: jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def both(name, q, k, v, d_out, d_lse, segments, window):
        mask = MaskSpec(window=window, q_segments=segments, k_segments=segments)
        call = lambda q, k, v: attention(q, k, v, mask=mask, scale=0.1, cap=20.0, lse_out=True, implementation=name)
        outs, back = jax.vjp(call, q, k, v)
        return *outs, *back((d_out, d_lse))

    found = []
    for size, dtype in SHAPES + (MORE if topology == CHIPS["v5e"] else ()):
        q, k = (shape((1, QUERIES, heads, size), dtype) for heads in (8, 2))
        more = shape((1, 8, QUERIES), "float32"), shape((1, QUERIES), "int32"), shape((), "int32")
        row = {"size": size, "dtype": dtype}
        for name in ("mosaic_tpu", "xla") if size == 128 else ("mosaic_tpu",):
            # The mesh in scope says what the trace is for, and with it which kernels and which blocks.
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                traced = jax.jit(both, static_argnums=0).trace(name, q, k, k, q, *more)
            text = traced.lower().compile().as_text()
            arrays = [math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"\bb?f\d+\[([\d,]+)\]", text)]
            row[name] = {"kernels": text.count("tpu_custom_call"), "largest": max(arrays)}
        found.append(row)
    return found


@pytest.fixture(scope="module", params=CHIPS)
def found(request, tmp_path_factory):
    """What one chip's compiler says, from a process of its own: JAX has started with CPU devices in this one."""
    file = tmp_path_factory.mktemp("aot") / "found.json"
    run = start(["-m", "tests.pallas_kernels.test_attention_aot", CHIPS[request.param], str(file)])
    assert run.wait(600) == 0, run.output
    return json.loads(file.read_text())


@needs_libtpu
def test_every_row_of_the_table_compiles_and_holds_no_logits(found):
    assert tuple((row["size"], row["dtype"]) for row in found)[: len(SHAPES)] == SHAPES
    for row in found:
        # Forward, dq, and dk with dv.
        assert row["mosaic_tpu"]["kernels"] == 3, row
        # Nothing is larger than the queries, whose heads may be padded to the next 128.
        assert row["mosaic_tpu"]["largest"] <= 8 * QUERIES * max(row["size"], 128), row
    plain = next(row["xla"] for row in found if "xla" in row)
    assert plain["kernels"] == 0
    assert plain["largest"] >= 8 * QUERIES**2 / 4


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(compiled(sys.argv[1])))
