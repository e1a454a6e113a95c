"""A hang is worse than a crash: when no step ends for too long, say where every thread stands.

Two layers. A Python thread writes the stacks of all threads, then devices and memory, to stderr and to a file; it can
then end the process, so that a scheduler starts it again. If that thread cannot run because something holds the
interpreter's lock, `faulthandler`'s own C thread, which the Python thread keeps putting off, writes the stacks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

EXIT_CODE = 70
"""Exit code of a process that its watchdog ended (EX_SOFTWARE of sysexits.h)."""
FILE = "watchdog.txt"


class Watchdog:
    """Watches that `beat` is called; use as a context manager.

    Args:
      timeout: seconds without a beat after which a step counts as hanging. None: does nothing.
      folder: where `watchdog.txt` is appended to. None: stderr only.
      grace: seconds until the first beat, which waits for compilation; also after `beat(..., compiling=True)`.
      abort: end the process with exit code 70 after the dump. Otherwise each hang is reported once, and again each
        time that it has lasted twice as long.
      info: more lines for the report.
    """

    def __init__(
        self,
        timeout: float | None,
        folder: str | Path | None = None,
        *,
        grace: float = 1800.0,
        abort: bool = False,
        info: Callable[[], str] | None = None,
    ):
        self._timeout, self._grace, self._abort, self._info = timeout, grace, abort, info
        self._file = None if folder is None else Path(folder) / FILE
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._step: int | None = None
        # (time of the last beat, seconds allowed until the next): one tuple, so that the thread sees both or neither
        self._beat = (time.monotonic(), max(grace, timeout or 0.0))
        self.reports = 0

    def __enter__(self) -> Watchdog:
        if self._timeout is not None:
            self._beat = (time.monotonic(), max(self._grace, self._timeout))
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def beat(self, step: int | None = None, *, compiling: bool = False) -> None:
        """A step ended. `compiling`: what comes next compiles first, and has the grace period. Under a microsecond."""
        self._step = step
        self._beat = (time.monotonic(), max(self._grace, self._timeout or 0.0) if compiling else self._timeout)

    def _watch(self) -> None:
        poll = max(0.01, min(5.0, self._timeout / 4))
        reported: tuple | None = None
        limit = 0.0
        while not self._stop.wait(poll):
            beat = self._beat
            waited = time.monotonic() - beat[0]
            if reported is not beat:
                reported, limit = beat, beat[1]
            with contextlib.suppress(ValueError, OSError, AttributeError):  # no real stderr, as in some notebooks
                faulthandler.dump_traceback_later(limit + 60.0 + poll, file=sys.__stderr__)
            if waited > limit:
                self._report(waited)
                limit = 2 * waited
        with contextlib.suppress(ValueError, OSError, AttributeError):
            faulthandler.cancel_dump_traceback_later()

    def _report(self, waited: float) -> None:
        self.reports += 1
        step = "the first step" if self._step is None else f"a step after step {self._step}"
        head = (
            f"\n=== watchdog: {step} has not ended for {waited:.0f} s; {time.strftime('%Y-%m-%d %H:%M:%S')}, process "
            f"{os.getpid()} on {platform.node()}. Stacks of all threads:\n"
        )
        self._write(head + stacks())  # before anything that may hang itself
        self._write(self._describe())
        if self._abort:
            self._write(f"=== watchdog: ending the process with exit code {EXIT_CODE}\n")
            os._exit(EXIT_CODE)

    def _describe(self) -> str:
        lines = []
        try:
            import jax

            for device in jax.local_devices():
                memory = device.memory_stats() or {}
                used = f", {memory['bytes_in_use'] / 1e9:.2f} GB in use" if "bytes_in_use" in memory else ""
                lines.append(f"device {device.id} of process {jax.process_index()}: {device.device_kind}{used}")
            if self._info is not None:
                lines.append(self._info())
        except Exception as error:
            lines.append(f"no more is known: {error}")
        return "\n".join(lines) + "\n"

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)
            sys.stderr.flush()
        if self._file is not None:
            with contextlib.suppress(OSError), open(self._file, "a", encoding="utf-8") as file:
                file.write(text)


def stacks() -> str:
    """The Python stacks of all threads."""
    with tempfile.TemporaryFile("w+") as file:  # faulthandler needs a real file, which a notebook's stderr is not
        faulthandler.dump_traceback(file=file, all_threads=True)
        file.seek(0)
        return file.read()
