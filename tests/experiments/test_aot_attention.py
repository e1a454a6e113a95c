"""Training steps with attention's kernel compile for slices of several chips. `.ci/aot` runs this where libtpu is."""

import json
import re
import sys
from pathlib import Path

import pytest

from jaxpar.parallel.topology import installed
from tests.processes import start

STEPS = (
    # What None chooses for a TPU, and a name inside of a pipeline whose axes are all by hand; each with tokens on a ring too.
    ("v5e:2x2", "data=2,tensor=2", "whole", None),
    ("v5e:2x2", "fsdp=2,sequence=2", "whole", None),
    ("v5e:2x4", "data=2,stage=2,tensor=2", "gathered", "mosaic_tpu"),
    ("v5e:2x2", "stage=2,sequence=2", "whole", None),
)
LENGTH, HEADS, SIZE = 512, 8, 16


def compiled(topology: str, mesh: str, products: str, name: str | None) -> dict:
    """The attention kernels in a step, and the shapes that it gathers."""
    from dataclasses import replace

    from jaxpar.experiments.aot.tpu import Case, pipeline
    from jaxpar.explaining import lower_step

    how = pipeline("1f1b", 4, products) if "stage" in mesh else {}
    config = Case(topology, mesh, 8, LENGTH, how=how).config(tiny=True)
    model = config.model.replace(attention_implementation=name, layers=2, width=HEADS * SIZE)
    text = lower_step(replace(config, model=model), model, topology).compile().as_text()
    kernels = [line for line in text.splitlines() if "tpu_custom_call" in line]
    found = {kernel: sum(f"attention_{kernel}" in line for line in kernels) for kernel in KERNELS}
    return {"kernels": found, "gathered": re.findall(r"= \(?\w+\[([\d,]*)\]\S* all-gather", text)}


KERNELS = ("forward", "backward_q", "backward_k")


@pytest.mark.skipif(not installed(), reason="libtpu is not installed (extra tpu-aot)")
def test_steps_hold_the_kernel_and_gather_no_heads(tmp_path):
    file = tmp_path / "found.json"
    run = start(["-m", "tests.experiments.test_aot_attention", str(file)])
    assert run.wait(600) == 0, run.output
    for row in json.loads(file.read_text()):
        assert all(row["kernels"].values()), row
        # Of queries, keys and values [B, T, heads, size], flat or not, none comes from several devices.
        sizes = [shape.split(",") for shape in row["gathered"]]
        assert not [s for s in sizes if str(LENGTH) in s and s[-1] == str(SIZE)], row


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps([compiled(*step) for step in STEPS]))
