"""The study of SkipPipe's plans writes what it found."""

import json

import pytest

from jaxpar.experiments.skippipe import planner
from jaxpar.parallel.planner.problem import Workload

pytestmark = pytest.mark.quick


def test_plans_write_their_tables(tmp_path, capsys):
    line = ["--networks", "homogeneous12", "racks16", "--ratios", "0", "0.5", "--stages", "4", "--workers", "1"]
    found = planner.main([*line, "--steps", "5", "--arranging", "20", "--seeds", "2", "--out", str(tmp_path)])
    written = json.loads((tmp_path / "planner.json").read_text())
    assert written["runs"] == found
    assert [(r["network"], r["stages"], r["skipped"], r["seed"]) for r in found] == [
        ("homogeneous12", 6, 2, 0),
        ("homogeneous12", 6, 2, 1),
        ("racks16", 6, 2, 0),
        ("racks16", 6, 2, 1),
        ("homogeneous12", 4, 0, 0),
        ("homogeneous12", 4, 0, 1),
        ("homogeneous12", 4, 2, 0),
        ("homogeneous12", 4, 2, 1),
    ]
    for run in found:
        seconds = run["seconds"]
        assert tuple(seconds) == planner.METHODS
        assert seconds["SkipPipe"] <= seconds["SkipPipe without TC2"]
        assert run["history"][-1]["seconds"] == seconds["SkipPipe"]
        if run["skipped"] == 0:
            assert seconds["DT-FM, evenly"] == seconds["DT-FM"]  # the same arrangement, found twice
        else:
            assert seconds["SkipPipe"] < seconds["DT-FM, evenly"]
    text = (tmp_path / "planner.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert "\n| racks16 | " in text
    assert "\n| 4 | 2 (50 %) | " in text
    assert "published |" not in text  # that is cloud20's
    assert (tmp_path / "planner.png").stat().st_size > 1000


def test_the_model_is_the_same_in_any_number_of_stages():
    six, ten = (planner.Case("cloud20", stages, 0, 0, 1).problem for stages in (6, 10))
    assert six.workload == Workload()
    for what in (
        lambda w, s: s * w.forward,
        lambda w, s: s * w.weight_bytes,
        lambda w, s: w.forward * w.loss,
        lambda w, s: w.activation_bytes,
    ):
        assert what(ten.workload, 10) == pytest.approx(what(six.workload, 6))


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--networks cloud", "there is no such network file"),
        ("--ratios 0.9", "skip = 0.9 leaves out 5 of 6 stages"),
        ("--stages 40", "cloud20 has 20 nodes for 40 stages"),
        ("--seeds 0", "--seeds 0 must be at least 1"),
    ],
)
def test_what_is_refused(line, sentence, tmp_path, capsys):
    with pytest.raises(SystemExit):
        planner.main([*line.split(), "--out", str(tmp_path)])
    assert sentence in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
