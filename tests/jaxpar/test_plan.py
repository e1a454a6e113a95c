"""`jaxpar plan`: what it prints, what it writes for training and for `jaxpar schedule`, and what it refuses."""

import re

import numpy as np
import pytest

from jaxpar.cli import main
from jaxpar.parallel.pipeline.csv_format import from_csv, paths_from_csv
from jaxpar.parallel.planner.progress import Bar
from jaxpar.parallel.planner.search import Progress
from jaxpar.skipping.paths import SkipPaths
from tests.processes import start

pytestmark = pytest.mark.quick

SMALL = "--network homogeneous12 --stages 4 --skip 0.25 --microbatches 8 --steps 50 --quiet"


def run(capsys, line: str) -> str:
    assert main(["plan", *line.split()]) == 0
    return capsys.readouterr().out


def test_a_plan(capsys):
    out = run(capsys, SMALL)
    assert "homogeneous12: 12 nodes, 4 stages, 8 microbatch(es), 1 stage(s) skipped by each (25 %)" in out
    assert re.search(r"stage +visits +nodes\n0 +8 +here-\d+, ", out)
    assert "8 path(s), each for 1 microbatch(es) one after another; a swap is marked *" in out
    assert re.search(r"\n  7  0 here-\d+ → \d\*? here-\d+ → \d\*? here-\d+\n", out)
    seconds = [
        float(s) for s in re.findall(r"\n(?:DT-FM|DT-FM with skip|SkipPipe without TC2|SkipPipe) +(\d+\.\d+)", out)
    ]
    assert len(seconds) == 4
    assert seconds[2] >= seconds[3]
    assert (
        "On this arrangement DT-FM has 2 pipeline(s), 8 of 12 nodes; with --skip 0 it has" in out
    )  # 4, 3, 3 and 2 nodes
    assert run(capsys, SMALL) == out


def test_what_it_writes_is_read_by_the_others(capsys, tmp_path, monkeypatch):
    """The order of tasks by `jaxpar schedule`, and the paths in it by training, as the output says."""
    monkeypatch.chdir(tmp_path)
    out = run(capsys, f"{SMALL} --csv paths.csv --plot times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    assert "jaxpar schedule paths.csv" in out
    assert main(["schedule", "paths.csv"]) == 0
    assert "paths: 4 stage(s) × 1 chunk(s), 8 microbatch(es)" in capsys.readouterr().out
    paths = paths_from_csv("paths.csv")
    assert from_csv("paths.csv").paths == paths
    printed = re.findall(r"^ +\d+  (0 .*)$", out, re.MULTILINE)
    assert [tuple(int(s) for s in re.findall(r"(\d)\*? here", line)) for line in printed] == list(paths)
    strategy = SkipPaths(8, stages=4, paths_file="paths.csv")
    strategy.check(layers=8, rows=16)
    layers = strategy.route(0, None, 8).layers
    np.testing.assert_array_equal(layers[:, ::2] // 2, paths)
    np.testing.assert_array_equal(layers[:, 1::2], layers[:, ::2] + 1)
    options = re.search(r"jaxpar train (.*)", out)[1]
    assert (
        options == "--skipping skip-paths --skipping.stages 4 --skipping.microbatches 8 --skipping.paths-file paths.csv"
    )


def test_a_network_of_ones_own(capsys, tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("node,a\nnode,b\nnode,c,,0.5,2\nlink,a,b,5,100\nlink,a,c,5,100\nlink,b,c,5,1000\n")
    out = run(capsys, f"--network {file} --stages 2 --skip 0 --microbatches 4 --steps 20 --quiet")
    assert "mine: 3 nodes, 2 stages, 4 microbatch(es), 0 stage(s) skipped" in out
    assert "--skip 0" not in out
    roomy = run(capsys, f"--network {file} --stages 2 --skip 0 --microbatches 4 --steps 20 --quiet --memory 4")
    assert "4 path(s), each for 1 microbatch(es)" in roomy


def test_the_bar_shows_the_best_so_far(capsys):
    assert main(["plan", *SMALL.replace("--quiet", "").split()]) == 0
    assert re.search(r"\d+/50 steps, best \d+\.\d\d s an iteration", capsys.readouterr().err)
    with Bar(60.0) as bar:
        bar(Progress("arranging", 0, 1.0, None))
        bar(Progress("improving", 900, 61.0, 31.5))
    assert "improving" in (shown := capsys.readouterr().err)
    assert "60/60 s, best 31.50 s an iteration" in shown


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--network cloud", "cloud: there is no such network file; shipped are cloud20, "),
        ("--network bad.csv", "bad.csv: the link from 'a' to 'c' is missing; give its latency and bandwidth"),
        ("--network negative.csv", "negative.csv: line 3: the link from 'a' to 'b' has a bandwidth of -1 Mbit/s"),
        ("--stages 30", "cloud20 has 20 nodes for 30 stages; a stage needs a node"),
        ("--stages 6 --skip 0.9", "skip = 0.9 leaves out 5 of 6 stages, and a path needs its first and another"),
        ("--skip 1", "skip = 1.0; give the part of the stages that a path leaves out, 0 or more, below 1"),
        ("--skip 0.67", "so that stage 5 would never be trained; skip fewer"),
        ("--microbatches 0", "microbatches = 0; give a whole number of at least 1"),
        ("--microbatches 1", "would never be trained; have more microbatches, or skip fewer stages"),
        ("--memory 0", "has memory for 0 microbatches; give a whole number of at least 1"),
        ("--forward -1", "forward = -1.0; give a number above 0"),
        ("--steps -5", "steps = -5; give a number of at least 0"),
        ("--seconds nan", "seconds = nan; give a number of at least 0"),
        ("--stage 6", "unknown option --stage; did you mean --stages?"),
        ("--plot missing/x.png", "missing/x.png: there is no folder"),
        ("--plot times.word", "times.word: a picture ends in .png, .svg, .pdf"),
        ("--csv missing/x.csv", "missing/x.csv: there is no folder"),
    ],
)
def test_what_is_refused(line, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nodes = "node,a\nnode,b\n"
    (tmp_path / "bad.csv").write_text(nodes + "node,c\nlink,a,b,5,100\nlink,b,c,5,100\n")
    (tmp_path / "negative.csv").write_text(nodes + "link,a,b,5,-1\n")
    assert main(["plan", *line.split(), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxpar: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert {file.name for file in tmp_path.iterdir()} == {"bad.csv", "negative.csv"}


def test_nothing_slow_is_imported():
    program = (
        "import sys; from jaxpar.cli import main; code = main(['plan', *sys.argv[1:]]); "
        "print('slow modules:', sorted({'jax', 'matplotlib'} & set(sys.modules))); sys.exit(code)"
    )
    process = start(["-c", program, *SMALL.split()])
    assert process.wait(60) == 0, process.output
    assert process.output.endswith("slow modules: []\n"), process.output
