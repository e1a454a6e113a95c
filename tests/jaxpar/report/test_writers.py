"""Metrics files: complete after a kill, and after a resume those of one uninterrupted run."""

import contextlib
import json
import signal
import subprocess
import sys
import types

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jaxpar.errors import UserError
from jaxpar.report.writers import JsonLines, TensorBoard, WeightsAndBiases, Writers, read_lines


def write(writer, first, last):
    for step in range(first, last + 1):
        writer.write(step, {"loss": 10.0 / step, "tokens": 64 * step})
    writer.close()


@pytest.mark.quick
@pytest.mark.parametrize("torn", ["", '{"step": 7, "lo', '{"step": 9}', "\x00\x00\n", "[]\n", '{"loss": 1}\n'])
def test_a_resumed_file_is_that_of_an_uninterrupted_run(tmp_path, torn):
    write(JsonLines(tmp_path / "whole.jsonl"), 1, 10)
    write(JsonLines(tmp_path / "killed.jsonl"), 1, 6)
    with open(tmp_path / "killed.jsonl", "a") as file:
        file.write(torn)
    write(JsonLines(tmp_path / "killed.jsonl", start=4), 5, 10)  # the last checkpoint was at step 4
    assert (tmp_path / "killed.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.jsonl", "whole.jsonl"]


def test_what_the_end_of_a_run_writes_is_there_once(tmp_path):
    path = tmp_path / "m.jsonl"
    for start in (0, 6):  # the run, and the same command once more
        writer = JsonLines(path, start=start, again=("held_out/loss", "sample") if start else ())
        for step in range(start + 1, 7):
            writer.write(step, {"loss": 1.0 / step})
        if not start:
            writer.write(3, {"held_out/loss": 3.0})
        writer.write(6, {"held_out/loss": 2.0})
        writer.text(6, "sample", "def")
        writer.close()
        told = [(r["step"], *sorted(r.keys() - {"step"})) for r in read_lines(path)]
        assert told == [(step, "loss") for step in range(1, 7)] + [
            (3, "held_out/loss"),
            (6, "held_out/loss"),
            (6, "sample"),
        ]


def test_a_new_run_starts_a_new_file(tmp_path):
    write(JsonLines(tmp_path / "m.jsonl"), 1, 6)
    write(JsonLines(tmp_path / "m.jsonl", start=0), 1, 2)
    assert [r["step"] for r in read_lines(tmp_path / "m.jsonl")] == [1, 2]


def test_what_is_no_number(tmp_path):
    writer = JsonLines(tmp_path / "m.jsonl")
    writer.write(1, {"loss": float("nan"), "norm": float("inf"), "n": 3})
    writer.text(1, "sample", 'def f():\n\treturn "ü"')
    writer.close()
    reject = lambda name: pytest.fail(f"{name} is not JSON")
    lines = [json.loads(x, parse_constant=reject) for x in (tmp_path / "m.jsonl").read_text("utf-8").splitlines()]
    assert lines == [{"step": 1, "loss": None, "norm": None, "n": 3}, {"step": 1, "sample": 'def f():\n\treturn "ü"'}]


KILLED = """
import os, signal, sys
from jaxpar.report.writers import JsonLines, TensorBoard
writers = [JsonLines(sys.argv[1] + "/m.jsonl"), TensorBoard(sys.argv[1] + "/tb")]
for step in range(1, 6):
    for w in writers:
        w.write(step, {"loss": 1.0 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""


def scalars(folder, tag):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(e.step, pytest.approx(e.value)) for e in accumulator.Scalars(tag)]


def test_a_killed_process_leaves_every_line(tmp_path):
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60)
    assert run.returncode == -signal.SIGKILL
    expected = [(s, 1.0 / s) for s in range(1, 6)]
    assert [(r["step"], r["loss"]) for r in read_lines(tmp_path / "m.jsonl")] == expected
    assert scalars(tmp_path / "tb", "loss") == expected


def test_tensorboard_forgets_what_is_done_again(tmp_path):
    write(TensorBoard(tmp_path), 1, 6)
    second = TensorBoard(tmp_path, start=4)
    for step in (5, 6, 7):
        second.write(step, {"loss": float(step)})
    second.text(7, "sample", "once upon\na time")
    second.close()
    assert scalars(tmp_path, "loss") == [(1, 10), (2, 5), (3, 10 / 3), (4, 2.5), (5, 5), (6, 6), (7, 7)]
    accumulator = EventAccumulator(str(tmp_path))
    accumulator.Reload()
    (event,) = accumulator.Tensors("sample/text_summary")
    assert event.tensor_proto.string_val[0] == b"    once upon\n    a time"
    assert accumulator.SummaryMetadata("sample/text_summary").plugin_data.plugin_name == "text"


def test_a_full_disk_is_a_sentence(tmp_path):
    writer = JsonLines(tmp_path / "m.jsonl")
    writer._file.close()
    writer._file = open("/dev/full", "w")
    with pytest.raises(UserError, match=r"metrics cannot be written to .*m\.jsonl: No space left on device"):
        writer.write(1, {"loss": 1.0})
    with pytest.raises(UserError, match="metrics cannot be written to"):
        JsonLines(tmp_path / "m.jsonl" / "x")
    with pytest.raises(UserError, match="TensorBoard files cannot be written to"):
        TensorBoard(tmp_path / "m.jsonl" / "x")
    with contextlib.suppress(OSError):
        writer.close()


def test_wandb(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'jaxpar\[wandb\]'"):
        WeightsAndBiases("p", tmp_path, name="run", config={})
    calls = []
    run = types.SimpleNamespace(log=lambda v, step: calls.append((step, v)), finish=lambda: calls.append("end"))
    wandb = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writer = WeightsAndBiases("p", tmp_path, name="run", config={"a": 1})
    writer.write(3, {"loss": 1.0})
    writer.close()
    assert calls[0]["id"] == "run"
    assert calls[0]["resume"] == "allow"
    assert calls[1:] == [(3, {"loss": 1.0}), "end"]


def test_several_as_one(tmp_path):
    writers = Writers([JsonLines(tmp_path / "a.jsonl"), JsonLines(tmp_path / "b.jsonl")])
    writers.write(1, {"loss": 2.0})
    writers.text(1, "sample", "hello")
    writers.flush()
    writers.close()
    assert read_lines(tmp_path / "a.jsonl") == read_lines(tmp_path / "b.jsonl")
    assert read_lines(tmp_path / "a.jsonl") == [{"step": 1, "loss": 2.0}, {"step": 1, "sample": "hello"}]
    Writers().write(1, {"loss": 1.0})  # a process other than the first
