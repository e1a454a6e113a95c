"""Paths as CSV: from files of paths and from files of tasks, into training, and what is wrong with a file."""

import re

import numpy as np
import pytest
from hypothesis import given, settings

from jaxpar.errors import UserError
from jaxpar.parallel.pipeline import orders
from jaxpar.parallel.pipeline.csv_format import paths_from_csv, to_csv
from jaxpar.skipping.paths import SkipPaths
from tests.parallel.pipeline.strategies import any_order

pytestmark = pytest.mark.quick


@pytest.fixture
def file(tmp_path):
    """Writes a text to a file of its own."""

    def write(text: str | bytes) -> str:
        name = tmp_path / f"paths-{len(list(tmp_path.iterdir()))}.csv"
        name.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(name)

    return write


def test_a_line_is_a_microbatch(file):
    text = "# SkipPipe's\n0,2,3\n\n 0, 1 ,3  # swaps nothing\r\n0,3,2"
    assert paths_from_csv(file(text)) == ((0, 2, 3), (0, 1, 3), (0, 3, 2))
    assert paths_from_csv(file("0\n")) == ((0,),)


@settings(max_examples=50, deadline=None)
@given(order=any_order())
def test_the_paths_of_any_order(tmp_path_factory, order):
    name = tmp_path_factory.mktemp("orders") / "order.csv"
    to_csv(order, name)
    assert paths_from_csv(name) == order.paths
    name.write_text("".join(",".join(map(str, path)) + "\n" for path in order.paths))
    assert paths_from_csv(str(name)) == order.paths


def test_training_takes_the_paths_of_both(file):
    paths = ((0, 2, 1, 3), (0, 1, 2, 4), (0, 2, 3, 4), (0, 1, 3, 4), (0, 1, 2, 3))
    order = orders.skippipe(5, paths)
    for name in (file(to_csv(order)), file("\n".join(",".join(map(str, path)) for path in paths))):
        strategy = SkipPaths(5, stages=5, paths_file=name)
        strategy.check(layers=5, rows=10)
        np.testing.assert_array_equal(strategy.route(0, None, 5).layers, paths)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "there is no path; give a line for each microbatch, its stages in order, for instance 0,2,3"),
        ("\n# nothing\n\n", "there is no path"),
        ("0,1,2\n0,2,\n", "line 2: '0,2,' has an empty cell; write the stages of a path one after another"),
        ("0,1\n\n0,,1\n", "line 3: '0,,1' has an empty cell"),
        ("0,1\n0,x\n", "line 2: 'x' is no stage; write whole numbers of at least 0"),
        ("0,-1\n", "line 1: '-1' is no stage"),
        ("0,1.0\n", "line 1: '1.0' is no stage"),
        ("0,²\n", "line 1: '²' is no stage"),
        ("0 1 2\n", "line 1: '0 1 2' is no stage"),
        ("0,1,2\n0,2,1,2\n", "line 2: the path visits stage 2 twice (0,2,1,2); once is the most"),
        ("0F0,0B0\n1F0,1X0\n", "line 2: '1X0' is no task; write stage, F, B, I or W, microbatch"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1\n", "lacks B of microbatch 1 at stage 1"),
        (b"0,1\xff\xfe\n", "the file is not text in UTF-8; tasks and paths are written as CSV"),
    ],
)
def test_what_is_wrong_with_a_file(text, sentence, file):
    name = file(text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        paths_from_csv(name)
    assert str(error.value).startswith(name)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=re.escape(sentence)):
        SkipPaths(2, stages=4, paths_file=name).check(layers=4, rows=2)


@pytest.mark.parametrize("end", ["", "/none.csv"])
def test_a_missing_file(tmp_path, end):
    with pytest.raises(FileNotFoundError, match="there is no such file of paths"):
        paths_from_csv(f"{tmp_path}{end}")


@pytest.mark.parametrize(
    ("text", "stages", "sentence"),
    [
        ("0,1,2\n0,1\n", 3, "has paths of 2, 3 stages; training runs them in one program"),
        (
            "0,1,2\n",
            3,
            "has 1 paths over 3 stages, but skip-paths has microbatches = 2 and stages = 3; set them to 1 and 3",
        ),
        (
            "0,1,4\n0,2,3\n",
            4,
            "has 2 paths over 5 stages, but skip-paths has microbatches = 2 and stages = 4; set them to 2 and 5",
        ),
        ("0,1,2\n1,0,2\n", 3, "microbatch 1 starts at stage 1; stage 0, which embeds, comes first"),
        ("0,1,2,3\n0,3,1,2\n", 4, "microbatch 1 swaps over a distance of 2 ([0, 3, 1, 2]), and 1 is the most"),
        (
            "0,1,2,3,4,5,6,7\n0,2,1,4,3,6,5,7\n",
            8,
            "microbatch 1 swaps over 3 stages in all ([0, 2, 1, 4, 3, 6, 5, 7]), and 2 is the most",
        ),
        ("0,1,2,3\n0,1,6,7\n", 8, "microbatch 1 jumps 5 stages ahead ([0, 1, 6, 7]), and 4 is the most"),
        ("0,1,2\n0,1,2\n", 4, "no microbatch visits stage 3; every stage must be trained"),
        ("0,1\n0,5\n", 6, "reach stage 4, so that stage 5 would never be trained; skip fewer"),
    ],
)
def test_paths_that_break_a_rule(text, stages, sentence, file):
    """Before a run starts: `check` is what the configuration asks."""
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        SkipPaths(2, stages=stages, paths_file=(name := file(text))).check(layers=stages, rows=2)
    assert str(error.value).startswith(name)
