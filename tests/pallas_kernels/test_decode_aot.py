"""The TPU decoding kernel compiled by the TPU compiler, on a machine without a TPU. `.ci/aot` runs this where libtpu is."""

import json
import sys
from pathlib import Path

import pytest

from jaxpar.pallas_kernels.decode import mosaic_tpu
from jaxpar.pallas_kernels.tiles import look_up
from jaxpar.parallel.topology import installed
from tests.pallas_kernels.test_attention_aot import CHIPS
from tests.processes import start

LAYERS, B, SLOTS = 4, 2, 8192
CASES = {
    # T, H, G, K, dtype of queries, format of the cache, tokens of a page
    "one query": (1, 32, 8, 128, "bfloat16", None, None),
    "KV8": (1, 32, 8, 128, "bfloat16", "int8_row", None),
    "KV4": (1, 8, 1, 256, "bfloat16", "int4_g32", None),
    "many queries": (16, 32, 8, 128, "bfloat16", None, None),
    "pages": (1, 32, 8, 128, "bfloat16", None, 16),
}
"""They take every row of the block table. On v5e there are more."""
MORE = {
    "wide": (8, 16, 8, 256, "float32", None, None),
    "narrow KV4 pages": (1, 8, 2, 64, "float32", "int4_g32", 64),
}
needs_libtpu = pytest.mark.skipif(not installed(), reason="libtpu is not installed (extra tpu-aot)")


def compiled(topology: str) -> dict:
    """Of each case: kernels in its program, and bytes that it holds besides arguments and results."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxpar.pallas_kernels.decode import decode_attention
    from jaxpar.pallas_kernels.formats.quantised import quantise
    from jaxpar.parallel.topology import tpu_devices

    mesh = Mesh(np.array(tpu_devices(topology)[:1]), ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    shapes = lambda tree: jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

    def program(q, k, v, lens, window, layer, table):
        call = dict(scale=0.1, window=window, cap=20.0, layer=layer, table_BxP=table, lse_out=True)
        return decode_attention(q, k, v, lens, implementation="mosaic_tpu", **call)

    found = {}
    for label, (T, H, G, K, dtype, form, page) in (CASES | (MORE if topology == CHIPS["v5e"] else {})).items():
        shape = (LAYERS, B, SLOTS, G, K) if page is None else (LAYERS, B * SLOTS // page, page, G, K)
        make = lambda s=shape, d=dtype, f=form: jnp.zeros(s, d) if f is None else quantise(jnp.zeros(s), f)
        numbers = jnp.zeros(B, jnp.int32), jnp.int32(0), jnp.int32(0)
        table = None if page is None else jnp.zeros((B, SLOTS // page), jnp.int32)
        cache = jax.eval_shape(make)
        given = shapes((jnp.zeros((B, T, H, K), dtype), cache, cache, *numbers, table))
        # The mesh in scope says what the trace is for, and with it which blocks.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            made = jax.jit(program).trace(*given).lower().compile()
        kernels, held = made.as_text().count("tpu_custom_call"), made.memory_analysis().temp_size_in_bytes
        found[label] = {"kernels": kernels, "held": held}
    return found


@pytest.fixture(scope="module", params=CHIPS)
def found(request, tmp_path_factory):
    """What one chip's compiler says, from a process of its own: JAX has started with CPU devices in this one."""
    file = tmp_path_factory.mktemp("aot") / "found.json"
    run = start(["-m", "tests.pallas_kernels.test_decode_aot", CHIPS[request.param], str(file)])
    assert run.wait(600) == 0, run.output
    return json.loads(file.read_text())


@needs_libtpu
def test_every_row_of_the_table_compiles_and_no_cache_is_copied(found):
    """Where a TPU keeps keys and values as they are written, [tokens, heads, head size]: heads of 128 or 256 numbers."""
    assert set(found) >= set(CASES)
    for label, (_, _, G, K, dtype, form, _) in (CASES | MORE).items():
        if label not in found:
            continue
        assert found[label]["kernels"] == 1, label
        bits = {"int8_row": 8, "int4_g32": 4}.get(form, 16 if dtype == "bfloat16" else 32)
        one_layer = B * SLOTS * G * K * bits // 8
        assert label == "narrow KV4 pages" or found[label]["held"] < one_layer, (label, found)


@pytest.mark.quick
def test_the_cases_take_every_row_of_the_table():
    taken = set()
    for kind in ("TPU v5", "TPU v6 lite"):
        for T, H, _, K, *_ in CASES.values():
            taken.add(look_up(mosaic_tpu.TABLE, kind, rows=mosaic_tpu.rows_of(T, H), head_size=K))
    assert taken == {row.tiles for row in mosaic_tpu.TABLE}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(compiled(sys.argv[1])))
