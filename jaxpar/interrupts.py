"""Ctrl-C and SIGTERM: the first one asks the loop to finish its step and save, the second one ends the process at once.

with Interrupts(say) as interrupts:
    for step in ...:
        ...
        if interrupts.agreed(step):
            break
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interrupts:
    """Turns the first SIGINT or SIGTERM into a flag while it is entered; restores the handlers that were there.

    Outside the main thread, where Python takes no signal handlers, it does nothing.

    Args:
      say: prints the one sentence at the first signal.
      every: with several processes, how often they ask each other, in steps.

    Attributes:
      signal: the signal that came (an int), or None.
    """

    def __init__(self, say: Callable[[str], None] = print, *, every: int = 8):
        self.signal: int | None = None
        self._say = say
        self._every = every
        self._before: dict[int, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in NAMES}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before = {}

    def _handle(self, number: int, frame) -> None:
        if self.signal is None:
            self.signal = number
            self._say(f"{NAMES[number]}: finishing this step and saving; once more ends the run at once, unsaved")
            return
        if number == signal.SIGINT and "ipykernel" in sys.modules:
            raise KeyboardInterrupt  # killing a notebook's kernel would lose more than the run
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    @property
    def requested(self) -> bool:
        """Whether a signal came to this process."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """What the process should end with: 128 + the signal, as shells have it; 0 without a signal."""
        return 0 if self.signal is None else 128 + self.signal

    def agreed(self, step: int) -> bool:
        """Whether any process got a signal. All call it with the same step, and all get the same answer.

        One process: immediately. Several: a signal reaches one of them first, and if it stopped alone the others would
        hang in the next collective; they ask each other every few steps.
        """
        import jax

        if jax.process_count() == 1:
            return self.requested
        if step % self._every:
            return False
        import numpy as np
        from jax.experimental import multihost_utils

        numbers = np.asarray(multihost_utils.process_allgather(np.int32(self.signal or 0)))
        if self.signal is None and numbers.max() > 0:
            self.signal = int(numbers.max())
        return bool(numbers.max() > 0)


def resume_command() -> str:
    """The command that goes on with this run: the one that started it."""
    name = Path(sys.argv[0]).name
    if name == "__main__.py":
        return shlex.join(["python", "-m", "jaxpar", *sys.argv[1:]])
    program = [name] if name == "jaxpar" else ["python", sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])
