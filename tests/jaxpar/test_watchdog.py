"""A step that hangs leaves the stacks of all threads behind; one that does not, nothing."""

import subprocess
import sys
import time

import pytest

from jaxpar.watchdog import EXIT_CODE, Watchdog


def a_function_that_hangs(watchdog, reports):
    while watchdog.reports < reports:
        time.sleep(0.01)


@pytest.mark.quick
def test_a_hang_is_reported_with_stacks(tmp_path, capsys):
    with Watchdog(0.2, tmp_path, grace=60, info=lambda: "epoch 3") as watchdog:
        watchdog.beat(7)
        start = time.monotonic()
        a_function_that_hangs(watchdog, 1)
        assert time.monotonic() - start > 0.2
        a_function_that_hangs(watchdog, 2)  # told again when it has lasted twice as long, not at every look
        assert time.monotonic() - start > 0.4
    report = (tmp_path / "watchdog.txt").read_text()
    assert report.count("has not ended") == 2
    assert "a step after step 7 has not ended for" in report
    assert "a_function_that_hangs" in report
    assert "cpu" in report
    assert "epoch 3" in report
    assert "a_function_that_hangs" in capsys.readouterr().err


def test_it_reports_again_for_a_new_hang(tmp_path):
    with Watchdog(0.1, tmp_path, grace=60) as watchdog:
        for step in (1, 2):
            watchdog.beat(step)
            a_function_that_hangs(watchdog, step)
    report = (tmp_path / "watchdog.txt").read_text()
    assert "after step 1 has" in report
    assert "after step 2 has" in report


def test_steps_in_time_are_not_reported(tmp_path):
    with Watchdog(2.0, tmp_path, grace=60) as watchdog:
        for step in range(30):
            watchdog.beat(step)
            time.sleep(0.1)
    assert watchdog.reports == 0
    assert list(tmp_path.iterdir()) == []


def test_compilation_has_its_own_limit(tmp_path):
    with Watchdog(0.05, tmp_path, grace=60) as watchdog:
        time.sleep(0.2)  # before the first step
        watchdog.beat(1)
        watchdog.beat(1, compiling=True)
        time.sleep(0.2)
        assert watchdog.reports == 0
        watchdog.beat(2)
        a_function_that_hangs(watchdog, 1)


def test_off():
    with Watchdog(None) as watchdog:
        watchdog.beat(1)
    assert watchdog.reports == 0


def test_a_beat_is_cheap():
    with Watchdog(60.0) as watchdog:
        start = time.perf_counter()
        for step in range(10_000):
            watchdog.beat(step)
        assert (time.perf_counter() - start) / 10_000 < 20e-6


HANG = """
import sys, time
from jaxpar.watchdog import Watchdog
def stuck():
    time.sleep(60)
with Watchdog(0.3, sys.argv[1], grace=0.3, abort=True):
    stuck()
"""


def test_abort_ends_the_process(tmp_path):
    run = subprocess.run([sys.executable, "-c", HANG, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert run.returncode == EXIT_CODE
    assert "in stuck" in run.stderr
    assert "the first step has not ended" in (tmp_path / "watchdog.txt").read_text()
