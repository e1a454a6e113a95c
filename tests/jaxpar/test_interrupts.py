"""The first signal asks to stop, the second one stops; afterwards the handlers are as before."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from jaxpar.interrupts import Interrupts, resume_command


@pytest.mark.quick
@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")])
def test_the_first_signal_is_a_flag(number, name):
    said, before = [], signal.getsignal(number)
    with Interrupts(said.append) as interrupts:
        assert not interrupts.agreed(1)
        assert interrupts.exit_code == 0
        os.kill(os.getpid(), number)
        assert interrupts.requested
        assert interrupts.agreed(2)
        assert interrupts.exit_code == 128 + number
    assert len(said) == 1
    assert said[0].startswith(name)
    assert signal.getsignal(number) is before


def test_outside_the_main_thread_it_does_nothing():
    seen = []

    def run():
        with Interrupts() as interrupts:
            seen.append(interrupts.agreed(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [False]


LOOP = """
import sys, time
from jaxpar.interrupts import Interrupts
with Interrupts() as interrupts:
    print("ready", flush=True)
    while not interrupts.requested or sys.argv[1] == "stubborn":
        time.sleep(0.01)
    print("saved", flush=True)
sys.exit(interrupts.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_to_a_real_process(number):
    process = subprocess.Popen([sys.executable, "-c", LOOP, "polite"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert "saved" in out
    assert process.returncode == 128 + number


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_end_a_real_process_at_once(number):
    process = subprocess.Popen([sys.executable, "-c", LOOP, "stubborn"], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert "finishing this step" in process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(number)
    out, _ = process.communicate(timeout=30)
    assert "saved" not in out
    assert process.returncode == -number


def test_the_command_that_goes_on(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/jaxpar", "train", "--out", "my run"])
    assert resume_command() == "jaxpar train --out 'my run'"
    monkeypatch.setattr(sys, "argv", ["/somewhere/jaxpar/__main__.py", "train"])
    assert resume_command() == "python -m jaxpar train"
