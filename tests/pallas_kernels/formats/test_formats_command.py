"""`jaxpar formats`: what it prints, what it writes, and what it refuses."""

import re

import pytest

from jaxpar.cli import main
from tests.processes import start

pytestmark = pytest.mark.quick


def run(capsys, line: str) -> str:
    assert main(["formats", *line.split()]) == 0
    return capsys.readouterr().out


def test_the_table_and_the_picture(capsys, tmp_path):
    png = tmp_path / "formats.png"
    out = run(capsys, f"nvint4 nvfp4 mxfp8-ocp int8_row --values 8192 --crests 2 5 --plot {png}")
    number = r"\d\d\.\d\d"
    assert re.search(
        rf"^nvint4 +4\.5  16 +E4M3 +7  +2\.1\d +{number} +{number} +21\.95 +2[12]\.\d\d +- +-$", out, re.MULTILINE
    )
    # Another rule for the power of two is measured, and the formula is not of it.
    assert re.search(
        rf"^mxfp8_e4m3-ocp +8\.25  32 +E8M0 +448 +2\.\d\d +- +{number} +- +{number} +- +{number}$", out, re.MULTILINE
    )
    assert re.search(r"^int8_row +8\.062  row +float32 +127 ", out, re.MULTILINE)
    assert re.search(r"^nvint4 and nvfp4 +2\.39 +2\.29 +2\.2\d$", out, re.MULTILINE)
    assert "crest factor 5" in out
    assert "Data: 8,192 values, seed 0" in out
    assert max(map(len, out.splitlines())) <= 150
    assert png.read_bytes().startswith(b"\x89PNG")
    assert f"{png}: the picture" in out


def test_crossovers_need_both(capsys):
    assert "crest factor\n" not in run(capsys, "nvint4 --values 4096 --crests 2")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("mxint9", "unknown number format 'mxint9'; did you mean mxint8 or mxint6?"),
        ("mxfp4-sideways", "mxfp4 has nothing that 'sideways' changes; it takes ceil, floor, round, ocp"),
        ("--values 10", "values = 10; give at least 4096"),
        ("--crests 1", "crests: 1 is no crest factor"),
        ("nvint4 --crests 2 --values 4096 --plot x.word", "not supported"),
        ("--plot missing/x.png", "there is no folder"),
        ("--crest 2", "unknown option --crest; did you mean --crests?"),
    ],
)
def test_what_is_refused(line, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["formats", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxpar: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("line", [["--help"], ["mxint9"]], ids=" ".join)
def test_nothing_slow_is_imported(line):
    program = (
        "import sys; from jaxpar.cli import main; code = main(['formats', *sys.argv[1:]]); "
        "print('slow modules:', sorted({'jax', 'matplotlib'} & set(sys.modules))); sys.exit(code)"
    )
    process = start(["-c", program, *line])
    assert process.wait(60) == (2 if line == ["mxint9"] else 0), process.output
    assert process.output.endswith("slow modules: []\n"), process.output
