"""Training steps compile for a TPU slice on a machine without one. `.ci/aot` runs this where libtpu is installed."""

import json

import pytest

from jaxpar.experiments.aot import tpu
from jaxpar.parallel.topology import installed
from tests.processes import start

PIPELINE, RING = "v5e:2x4: PP × TP × DP", "v5e:2x4: ring × DP"
MEMORY = [f"{schedule}, {m} microbatches" for schedule in ("1f1b", "gpipe") for m in (8, 32)]
needs_libtpu = pytest.mark.skipif(not installed(), reason="libtpu is not installed (extra tpu-aot)")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Steps of a tiny model, in a process of its own: JAX has started with CPU devices in this one."""
    folder = tmp_path_factory.mktemp("aot")
    names = [PIPELINE, RING, *MEMORY]
    run = start(["-m", "jaxpar.experiments.aot.tpu", "--tiny", "--out", str(folder), "--only", *names])
    assert run.wait(900) == 0, run.output
    parts = json.loads((folder / "tpu.json").read_text())["results"]
    rows = parts["steps"] | parts["memory"]
    assert sorted(rows) == sorted(names)
    assert not any("refused" in row for row in rows.values()), run.output
    return rows


def of(row, op, axis):
    return [c for c in row["collectives"] if c["op"] == op and c["axes"] == [axis]]


@needs_libtpu
def test_a_pipeline_with_tensor_and_data_axes_compiles(found):
    row = found[PIPELINE]
    assert row["devices"] == 8
    assert row["kind"] == "TPU v5 lite"
    assert row["temporary_bytes"] > 0
    # Activations and their gradients go to the neighbour, and the gradient is summed over data once.
    assert of(row, "collective-permute", "stage")
    assert sum(c["times"] for c in of(row, "all-reduce", "data")) <= 3
    assert not of(row, "all-gather", "stage")


@needs_libtpu
def test_a_ring_permutes_and_hides_it(found):
    """No device gathers keys or values; products run beside most of what goes round."""
    permutes = of(found[RING], "collective-permute", "sequence")
    assert permutes
    assert not of(found[RING], "all-gather", "sequence")
    moved = lambda some: sum(c["bytes"] * c["times"] for c in some)
    assert moved([c for c in permutes if c["products"] > 0]) > moved(permutes) / 2


@needs_libtpu
def test_memory_of_1f1b_does_not_grow_with_the_microbatches(found):
    """Four times the microbatches: 1F1B has as much at once, GPipe all of them."""
    few, many, gpipe_few, gpipe_many = (found[name]["temporary_bytes"] for name in MEMORY)
    assert many < 1.05 * few
    assert gpipe_many > 2 * gpipe_few
    assert many < gpipe_many / 2


def test_the_table_says_what_is_hidden_and_what_is_not():
    collective = {"op": "all-reduce", "axes": ["data"], "group": 2, "bytes": 2**20, "times": 3, "where": ""}
    alone = {**collective, "how": "alone", "products": 0, "cycles": 0}
    pair = {**collective, "op": "collective-permute", "axes": ["stage"], "how": "pair", "products": 2, "cycles": 5000}
    row = {
        "mesh": "data=2",
        "compile_s": 1.0,
        "temporary_bytes": 2**20,
        "collectives": [alone, pair, pair | {"bytes": 8}],
    }
    text = tpu.table({"steps": {"one": row, "two": {"refused": "too large"}}})
    assert "| one | data=2; 1 s, 1.0 MiB | all-reduce | data | 3 | 3.1 | alone | - |" in text
    assert "| collective-permute | stage | 3 | 3.1 | pair, 2 | 5 |" in text
    assert "| two | too large |" in text


def test_every_case_is_a_run_that_fits_its_mesh():
    for part in tpu.PARTS.values():
        for name, case in part.items():
            config = case.config(tiny=True)
            assert config.mesh.fit(_devices(case.topology)) == config.mesh, name


def _devices(topology: str) -> int:
    sides = topology.partition(":")[2].split("x")
    count = 1
    for side in sides:
        count *= int(side)
    return count
