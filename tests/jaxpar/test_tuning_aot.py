"""Block sizes compiled for a chip that is not there. `.ci/aot` runs this where the compilers are installed."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from jaxpar.parallel.topology import installed
from tests.pallas_kernels import cuda_target
from tests.processes import start

needs_libtpu = pytest.mark.skipif(not installed(), reason="libtpu is not installed (extra tpu-aot)")


@needs_libtpu
@pytest.mark.parametrize(
    ("line", "rows"),
    [
        ("quant_matmul --rows 16 --inputs 512 --outputs 512", 7),
        ("decode_attention --batch 1 --slots 256 --heads 4 --key-heads 2 --cache int8_row", 12),
        ("attention --queries 512 --heads 1 --key-heads 1 --head-size 64", 8),
    ],
    ids=["product", "decode", "attention"],
)
def test_what_compiles_is_listed(line, rows, tmp_path):
    """With VMEM; nothing is timed, nothing written."""
    file = tmp_path / "tiles.json"
    run = start(["-m", "jaxpar", "tune", *line.split(), "--topology", "v5e:2x2", "--cache", str(file)])
    assert run.wait(600) == 0, run.output
    lines = run.output.splitlines()
    # libtpu says things of its own around it.
    head = next(i for i, one in enumerate(lines) if " for a v5e, " in one)
    listed = [one for one in lines[head + 2 :] if one.startswith(("forward ", "backward "))]
    assert len(listed) == rows
    assert "compiled only: nothing was timed, and nothing is written" in lines
    for one in listed:
        *_, seconds, vmem, temporary, time = one.split()
        assert float(seconds) > 0
        # A kernel whose one block is everything needs none of its own.
        assert vmem == "-" or 0 < float(vmem) < 16.8
        assert (float(temporary) >= 0, time) == (True, "-")
    assert sum(" - " not in one for one in listed) > rows / 2
    assert sum("*" in one for one in listed) == (2 if line.startswith("attention") else 1)
    assert not file.exists()


def for_a_gpu() -> dict[str, list[list[str]]]:
    """By part of an op, of the table's tiles and of other ones: the kernels of the program."""
    import jax

    from jaxpar.tuning import Attention, DecodeAttention, QuantMatmul

    found = {}
    decode = DecodeAttention(batch=1, slots=256, heads=4, key_heads=2, head_size=64)
    for op in (
        Attention(queries=256, heads=2, key_heads=1, head_size=64),
        QuantMatmul(inputs=512, outputs=256),
        decode,
        QuantMatmul(inputs=512, outputs=256, kernel="mosaic_gpu_codes"),
        dataclasses.replace(decode, head_size=128, cache="int4_row", kernel="mosaic_gpu_codes"),
    ):
        subject = op.subject("NVIDIA H200", "mosaic_gpu")
        for part in subject.parts:
            shapes = jax.eval_shape(part.make, jax.random.key(0))
            compiled = []
            # Of few sums the first ones may be the same program as the table's.
            for sizes in ({}, part.candidates[-1 if getattr(op, "kernel", None) else 0]):
                tiles = dataclasses.replace(subject.table, **sizes)
                compiled.append([kernel.name for kernel in cuda_target.compiled(part.run(tiles), *shapes).kernels])
            name = subject.op if getattr(op, "kernel", None) is None else f"{subject.op} by {subject.implementation}"
            found[f"{name}, {part.name}"] = compiled
    return found


@cuda_target.needs_compiler
def test_each_part_is_one_kernel_on_a_gpu(tmp_path):
    """The backward pass may have two, of which a part keeps its own; how many it is to have is a part by itself."""
    file = tmp_path / "found.json"
    run = start(["-m", "tests.jaxpar.test_tuning_aot", str(file)], **cuda_target.environment())
    assert run.wait(600) == 0, run.output
    found = json.loads(file.read_text())
    parts = ["forward", "dq", "dk, dv", "backward"]
    assert list(found) == [
        *(f"attention, {part}" for part in parts),
        "quant_matmul, forward",
        "decode_attention, forward",
        "quant_matmul by mosaic_gpu_codes, forward",
        "decode_attention by mosaic_gpu_codes, forward",
    ]
    # Its kernels are those of the parts before it, or one more: what a process has compiled it does not compile again.
    del found["attention, backward"]
    for kernels in found.values():
        assert [len(names) for names in kernels] == [1, 1]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(for_a_gpu()))
