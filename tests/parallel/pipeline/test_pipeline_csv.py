"""Orders as CSV: there and back, PyTorch's files, and what is wrong with a file."""

import re

import pytest
from hypothesis import given, settings

from jaxpar.parallel.pipeline import orders
from jaxpar.parallel.pipeline.csv_format import from_csv, to_csv
from jaxpar.parallel.pipeline.tasks import Kind, Task
from tests.parallel.pipeline.strategies import any_order

pytestmark = pytest.mark.quick


@settings(max_examples=100, deadline=None)
@given(any_order())
def test_there_and_back(order):
    assert from_csv(to_csv(order), name=order.name) == order


def test_a_file(tmp_path):
    order = orders.zb_v(3, 5)
    file = tmp_path / "zb-v.csv"
    to_csv(order, file)
    assert from_csv(file) == order
    assert from_csv(str(file)).name == "zb-v"


def test_the_text():
    assert to_csv(orders.one_f_one_b(2, 2)) == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"
    assert to_csv(orders.checkfree_plus(4, 2)).startswith("# path,1,1 0 3 2\n")


def test_as_pytorch_writes_it():
    """Idle ticks are empty cells; I and W are the halves of the backward pass."""
    order = from_csv("0F0,0F1,,,0I0,0W0,0B1\n,1F0,1I0,1F1,1W0,1B1,\n\n")
    assert order.tasks[1] == (
        Task(Kind.F, 1, 0),
        Task(Kind.BI, 1, 0),
        Task(Kind.F, 1, 1),
        Task(Kind.BW, 1, 0),
        Task(Kind.B, 1, 1),
    )
    assert order.paths == ((0, 1), (0, 1))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("0F0,0B0\n1F0,1X0\n", "line 2: '1X0' is no task; write stage, F, B, I or W, microbatch, for instance 0F3"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1\n", "csv lacks B of microbatch 1 at stage 1; add it on device 1"),
        ("0F0,0B0,0F0\n", "csv has F of microbatch 0 at stage 0 twice on device 0; leave one out"),
        ("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", "tasks wait for each other in a circle"),
        (
            "0F0,0B0\n2F0,2B0\n",
            "devices run 1, 1 stages; give every device as many chunks, stages 0 to n-1 each on one",
        ),
        ("0F0,0F1,0B0,0B1,2F0,2B0\n1F0,1F1,1B0,1B1\n", "devices run 2, 1 stages; give every device as many chunks"),
        ("0F0,0F2,0B0,0B2\n\n", "microbatch 1 has no task, and microbatch 2 has; number them 0 to 1 without gaps"),
        ("\n\n", "csv holds no task; a line a device"),
        ("# stages,0,1,2\n0F0,0B0\n1F0,1B0\n", "'# stages' lists 3 devices, and there are 2 lines of tasks"),
        ("# stages,0,x\n0F0,0B0\n1F0,1B0\n", "line 1: 'x' is not a list of stages; write for instance 0 1 2 3"),
        ("# path,0\n0F0,0B0\n", "line 1: a path is '# path,MICROBATCH,STAGE STAGE ...', not '# path,0'"),
        ("# path,3,0\n0F0,0B0\n", "'# path' names microbatch 3; microbatches are 0 to 0"),
        ("# path,0,0 0\n0F0,0B0\n", "microbatch 0 visits stage 0 twice"),
        ("0F0,0B0\n1F0\r,1B0\n", "the file is no CSV: new-line character seen"),
    ],
)
def test_what_is_wrong_with_a_file(text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        from_csv(text)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        from_csv(tmp_path / "none.csv")
