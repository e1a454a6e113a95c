"""The bar and the plain lines: what they show, when, and the rates behind them."""

import fcntl
import io
import os
import pty
import struct
import sys
import termios
import types

import pytest

from jaxpar.report.progress import Progress, choose, duration, number, unit


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.mark.quick
def test_plain_lines_where_the_output_is_no_terminal():
    out, clock = io.StringIO(), Clock()
    with Progress(100, flops_per_token=2e6, every=10.0, stream=out, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 1.0
            progress.update(step, 500, {"loss": 4.25 - step / 100, "skipped": 1.0})
    lines = out.getvalue().splitlines()
    assert lines[0] == "step   1/100  loss 4.2400  skipped 1"  # the first step: no rate yet, it has compiled
    assert lines[1] == "step  11/100  loss 4.1400  skipped 1  500 tokens/s  1.0 GFLOP/s  1:29 left"
    assert lines[-1] == "step 100/100  loss 3.2500  skipped 1  500 tokens/s  1.0 GFLOP/s  0:00 left"
    assert len(lines) == 11  # every 10 s, and the last


def test_rates():
    clock = Clock()
    progress = Progress(10, flops_per_token=1e9, peak=2e12, mode="off", clock=clock)
    assert progress.update(1, 100, {}) == {}
    clock.now = 0.5
    rates = progress.update(2, 100, {})
    assert rates == {"tokens_per_second": 200.0, "flops_per_second": 2e11, "mfu": 0.1, "seconds_left": 4.0}
    progress.pause()  # a long evaluation
    clock.now = 100.0
    assert progress.update(3, 100, {}) == {}
    clock.now = 101.0
    assert progress.update(4, 100, {})["tokens_per_second"] == 100.0


def test_a_bar_in_a_terminal():
    out = Terminal()
    progress = Progress(4, start=2, flops_per_token=1.0, peak=1e9, stream=out)
    assert progress.mode == "bar"
    progress.update(3, 10, {"loss": 2.5})
    progress.say("saved a checkpoint")
    progress.update(4, 10, {"loss": 2.25})
    progress.close()
    text = out.getvalue()
    assert "4/4" in text
    assert "loss 2.2500" in text
    assert "MFU" in text
    assert "\nsaved a checkpoint\n" in text or "saved a checkpoint\n" in text


def test_what_auto_means(monkeypatch):
    assert choose("auto", io.StringIO()) == "lines"
    assert choose("auto", Terminal()) == "bar"
    assert choose("off", Terminal()) == "off"
    shell = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    assert choose("auto", io.StringIO()) == "notebook"


def test_a_terminal_of_no_size_gets_lines():
    """As `docker exec -t` gives; tqdm would draw nothing there."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs, "w") as stream:
        for size, mode in (((0, 0), "lines"), ((40, 100), "bar")):
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
            assert choose("auto", stream) == mode
    os.close(ours)


def test_a_notebook_with_and_without_widgets(monkeypatch):
    """Without ipywidgets the text bar is shown, and nothing is warned of."""
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    out = io.StringIO()
    with Progress(2, mode="notebook", stream=out) as progress:
        progress.update(1, 1, {"loss": 1.5})
        progress.update(2, 1, {"loss": 1.25})
    assert "loss 1.2500" in out.getvalue()


def test_off_is_silent(capsys):
    with Progress(2, mode="off") as progress:
        progress.update(1, 1, {"loss": 1.0})
        progress.say("hello")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(3.14159, "3.1416"), (12345.0, "12,345"), (1.2e-5, "1.2e-05"), (0, "0"), ("a", "a"), (float("nan"), "nan"),
     (float("inf"), "inf"), (1e20, "1e+20")],
)  # fmt: skip
def test_numbers(value, text):
    assert number(value) == text


def test_units_and_durations():
    assert [unit(x) for x in (5, 2.5e6, 1e9, 1.5e12, 3e15)] == ["5 ", "2.5 M", "1.0 G", "1.5 T", "3.0 P"]
    assert [duration(s) for s in (0, 59.6, 3599, 3600, 200_000)] == ["0:00", "1:00", "59:59", "1:00:00", "2 d 07:33:20"]
