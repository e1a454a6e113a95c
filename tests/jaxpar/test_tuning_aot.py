"""Block sizes compiled for a chip that is not there. `.ci/aot` runs this where libtpu is installed."""

import pytest

from jaxpar.parallel.topology import installed
from tests.processes import start

needs_libtpu = pytest.mark.skipif(not installed(), reason="libtpu is not installed (extra tpu-aot)")


@needs_libtpu
@pytest.mark.parametrize(
    ("line", "rows"),
    [
        ("quant_matmul --rows 16 --inputs 512 --outputs 512", 7),
        ("attention --queries 512 --heads 1 --key-heads 1 --head-size 64", 8),
    ],
    ids=["product", "attention"],
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
    assert sum("*" in one for one in listed) == (2 if "attention" in line else 1)
    assert not file.exists()
