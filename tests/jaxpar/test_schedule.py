"""`jaxpar schedule`: what it prints, what it writes, and what it refuses."""

import re

import pytest

from jaxpar.cli import main
from jaxpar.parallel.pipeline import orders
from jaxpar.parallel.pipeline.csv_format import from_csv
from tests.processes import start

pytestmark = pytest.mark.quick


def run(capsys, line: str) -> str:
    assert main(["schedule", *line.split()]) == 0
    return capsys.readouterr().out


def test_a_schedule(capsys):
    out = run(capsys, "1f1b --stages 4 --microbatches 8")
    assert "1f1b: 4 stage(s) × 1 chunk(s), 8 microbatch(es); 22 ticks, one kind of action a tick, double warm-up" in out
    assert "device 3  .  .  . F0 B0 F1 B1" in out
    assert re.search(r"one program in lock step +33 +37\.5 % +27\.3 %", out)
    assert re.search(r"\n0 +24 +7 +7 +7\n1 +24 +5 ", out)
    assert "Loops: F×3, (F B)×8, B×3. Messages go by F +1, B -1 stage(s)." in out
    assert run(capsys, "--stages 4 --microbatches 8") == out


def test_ticks_and_chunks(capsys):
    out = run(capsys, "1f1b --ticks mixed --keep inputs")
    assert "mixed ticks" in out
    assert "residual" not in out
    assert "One loop of" in out
    out = run(capsys, "1f1b --stages 2 --microbatches 4 --chunks 2")
    assert "interleaved: 2 stage(s) × 2 chunk(s)" in out
    assert "F0'" in out
    # The costs are of a stage, so its chunks take half of them each: (p-1)/(v·m).
    assert re.search(r"a program for each stage +13\.5 +12\.5 %", out)


def test_a_long_table_is_wrapped_or_left_out(capsys):
    out = run(capsys, "gpipe --microbatches 40")
    assert max(map(len, out.splitlines())) <= 130
    assert out.count("device 0") > 1
    assert "ticks: too many to print" in run(capsys, "gpipe --stages 2 --microbatches 160")


def test_a_picture_and_a_file(capsys, tmp_path):
    csv, png = tmp_path / "order.csv", tmp_path / "order.png"
    out = run(capsys, f"zb-v --stages 3 --microbatches 5 --csv {csv} --plot {png}")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert from_csv(csv).tasks == orders.zb_v(3, 5).tasks
    again = run(capsys, str(csv))
    assert again.replace("order:", "zb-v:") == out[: out.index(f"\n\n{png}")] + "\n"


def test_the_comparison(capsys):
    out = run(capsys, "--compare --stages 4 --microbatches 8")
    for name in orders.SCHEDULES:
        assert re.search(rf"^{re.escape(name)} +\d", out, re.MULTILINE), name
    assert "Pipelining is not worth it: zb-v takes 25.5 s" in out
    assert "Links or weights are free here" in out
    out = run(capsys, "--compare --stages 3 --microbatches 4 --bandwidth 10 --parameter-bytes 1000")
    assert "interleaved: interleaved 1F1B runs its chunks in groups of 3" in out
    assert "FSDP over the same 3 device(s): 200 s (work 18 s, weights 200 s, overlapped). Pipelining is worth it" in out


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("1f2b", "unknown schedule '1f2b' (did you mean '1f1b'?)"),
        ("interleaved --microbatches 10", "10 is no multiple of 4; nearest: 8 or 12 microbatches"),
        ("zb-v --chunks 3", "zb-v has 2 chunk(s) on a device, not 3"),
        ("1f1b --chunks 0", "chunks = 0; give a whole number of at least 1"),
        ("1f1b --stages 0", "devices = 0; give a whole number of at least 1"),
        ("1f1b --forward -1", "forward = -1.0; a cost is a number of at least 0"),
        ("1f1b --stage 4", "unknown option --stage; did you mean --stages?"),
        ("none.csv", "none.csv: there is no such file of tasks"),
        ("--compare --plot x.png", "--compare writes no picture and no CSV"),
        ("--plot missing/x.png", "there is no folder"),
        ("--plot x.word", "not supported"),
    ],
)
def test_what_is_refused(line, sentence, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["schedule", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxpar: ")
    assert error.count("\n") == 1
    assert sentence in error
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_a_cycle(capsys, tmp_path):
    file = tmp_path / "bad.csv"
    file.write_text("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    assert main(["schedule", str(file)]) == 2
    assert "bad cannot run, because tasks wait for each other in a circle" in capsys.readouterr().err


@pytest.mark.parametrize("line", [["--help"], ["--compare"]], ids=" ".join)
def test_nothing_slow_is_imported(line):
    program = (
        "import sys; from jaxpar.cli import main; code = main(['schedule', *sys.argv[1:]]); "
        "print('slow modules:', sorted({'jax', 'matplotlib'} & set(sys.modules))); sys.exit(code)"
    )
    process = start(["-c", program, *line])
    assert process.wait(60) == 0, process.output
    assert process.output.endswith("slow modules: []\n"), process.output
