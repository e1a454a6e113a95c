"""Real processes for tests: started with a clean environment, waited for with a limit, killed with all they started."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.flags import QUICK

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass
class Process:
    """A started process. Standard output and error go to one file, which may be read at any time."""

    popen: subprocess.Popen
    file: tempfile._TemporaryFileWrapper = field(repr=False)

    def __del__(self):
        # Or the file's own warning comes in whatever test runs when it is collected.
        self.file.close()

    @property
    def output(self) -> str:
        return Path(self.file.name).read_text(errors="replace")

    def wait(self, timeout_s: float) -> int:
        """The exit code. Past the limit the process is killed, and the test fails with its output."""
        try:
            return self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not done after {timeout_s} s, so far:\n{self.output}") from None

    def wait_for(self, text: str, timeout_s: float) -> None:
        """Until `text` stands in the output. Fails where the process ends, or the time is up, before."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            ended = self.popen.poll() is not None
            if text in self.output:
                return
            if ended or time.monotonic() > deadline:
                self.kill()
                why = f"exit code {self.popen.returncode}" if ended else f"{timeout_s} s passed"
                raise AssertionError(f"{text!r} did not come ({why}):\n{self.output}")
            time.sleep(0.02)

    def kill(self, sign: int = signal.SIGKILL) -> None:
        """Send a signal to the process and everything it started, and, for SIGKILL, collect it."""
        if self.popen.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, sign)
        if sign == signal.SIGKILL:
            self.popen.wait(10)


def start(arguments: Sequence[str | Path], *, devices: int = 1, cwd: Path = ROOT, **environment: str) -> Process:
    """Start `python *arguments` with `devices` fake CPU devices, and further environment variables.

    What this process has set for its own JAX is not inherited, except the compile cache and that LLVM takes no pains.
    """
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("XLA_", "SLURM_", "OMPI_", "TPU_"))}
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    env = {**keep, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONUNBUFFERED": "1", **environment}
    # Removed when the Process is forgotten.
    file = tempfile.NamedTemporaryFile(prefix="process-", suffix=".log")
    popen = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    return Process(popen, file)


def together(commands: Sequence[Sequence[str | Path]], *, timeout_s: float, **options) -> list[Process]:
    """Start all, wait for all (one limit for them together), and leave none behind. See `start` for the options."""
    deadline = time.monotonic() + timeout_s
    processes = []
    try:
        processes += [start(command, **options) for command in commands]
        for process in processes:
            process.wait(max(deadline - time.monotonic(), 0.1))
    finally:
        for process in processes:
            process.kill()
    return processes


def joined(script: str | Path, count: int, *, timeout_s: float, arguments: Sequence[str] = (), **options):
    """Run a script as `count` processes that find their coordinator, count and id as the last three arguments."""
    address = f"127.0.0.1:{free_port()}"
    commands = [[script, *arguments, address, str(count), str(i)] for i in range(count)]
    return together(commands, timeout_s=timeout_s, **options)
