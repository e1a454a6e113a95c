"""The progress of a run: a bar in a terminal or notebook, plain lines where the output is neither."""

from __future__ import annotations

import collections
import os
import sys
import time
from collections.abc import Mapping
from typing import Literal, TextIO

Mode = Literal["auto", "bar", "notebook", "lines", "off"]


def choose(mode: Mode, stream: TextIO) -> Mode:
    """What "auto" means here."""
    if mode != "auto":
        return mode
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if type(shell).__name__ in ("ZMQInteractiveShell", "Shell"):  # Jupyter; Colab
        return "notebook"
    if not getattr(stream, "isatty", lambda: False)():
        return "lines"
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):
        return "bar"
    # Containers and CI give terminals of no size, in which tqdm draws nothing at all.
    return "bar" if size.columns > 0 and size.lines > 1 else "lines"


class Progress:
    """Loss, tokens a second, MFU or FLOP/s, and the time left. Use as a context manager.

    Args:
      total: the last step.
      start: steps done before this run began (on resuming).
      flops_per_token: training FLOPs (`jaxpar.flops.training`). None: no FLOP/s are shown.
      peak: FLOP/s that all devices together could do (`jaxpar.flops.peak`). None: FLOP/s are shown instead of MFU.
      mode: "auto", or a fixed form; "off" prints nothing (processes other than the first).
      every: seconds between plain lines.
      stream: where to. None: stderr.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        flops_per_token: float | None = None,
        peak: float | None = None,
        mode: Mode = "auto",
        every: float = 10.0,
        stream: TextIO | None = None,
        clock=time.monotonic,
    ):
        self.total, self.step = total, start
        self._flops, self._peak, self._every, self._clock = flops_per_token, peak, every, clock
        self._stream = sys.stderr if stream is None else stream
        self.mode = choose(mode, self._stream)
        # (time, step, tokens so far); the first entry is the end of the first step, which has compiled.
        self._window: collections.deque = collections.deque(maxlen=50)
        self._tokens = 0
        self._printed: float | None = None
        self._bar = self._make_bar() if self.mode in ("bar", "notebook") else None

    def _make_bar(self):
        from tqdm import tqdm

        kind, options = tqdm, {"file": self._stream, "dynamic_ncols": True}
        if self.mode == "notebook":
            try:
                import ipywidgets  # noqa: F401
                from tqdm.notebook import tqdm as kind

                options = {}
            except ImportError:  # the text bar works in a notebook too
                options = {"file": self._stream, "ncols": 100}
        return kind(
            total=self.total,
            initial=self.step,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt}{postfix}",
            mininterval=0.2,
            **options,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def pause(self) -> None:
        """What follows (evaluation, a sample) is no training: it does not count in the rates. Call it before."""
        self._window.clear()

    def update(self, step: int, tokens: int, columns: Mapping[str, float | str]) -> dict[str, float]:
        """A step's metrics were read.

        Args:
          step: updates done.
          tokens: tokens of this step, over all devices.
          columns: what to show, in this order: {"loss": 3.2, "skipped": 1}.

        Returns:
          The rates, for the writers: "tokens_per_second", "flops_per_second", "mfu", "seconds_left" (those known).
        """
        now = self._clock()
        self._tokens += tokens
        self._window.append((now, step, self._tokens))
        rates = self.rates()
        last = step >= self.total
        if self._bar is not None:
            self._bar.set_postfix_str(" ".join(self._fields(columns, rates)), refresh=False)
            self._bar.update(step - self.step)
            if last:
                self._bar.refresh()
        elif self.mode == "lines" and (self._printed is None or last or now - self._printed >= self._every):
            self._printed = now
            width = len(str(self.total))
            self._print(f"step {step:>{width}}/{self.total}  " + "  ".join(self._fields(columns, rates)))
        self.step = step
        return rates

    def rates(self) -> dict[str, float]:
        """Over the last 50 steps; empty until two steps were seen."""
        if len(self._window) < 2:
            return {}
        (then, first, before), (now, step, tokens) = self._window[0], self._window[-1]
        seconds = max(now - then, 1e-9)
        rate = (tokens - before) / seconds
        found = {"tokens_per_second": rate}
        if self._flops is not None:
            found["flops_per_second"] = rate * self._flops
            if self._peak is not None:
                found["mfu"] = rate * self._flops / self._peak
        if step > first:
            found["seconds_left"] = (self.total - step) * seconds / (step - first)
        return found

    def say(self, text: str) -> None:
        """A line of its own that does not break the bar."""
        if self.mode == "off":
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._print(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def _fields(self, columns: Mapping[str, float | str], rates: Mapping[str, float]) -> list[str]:
        fields = [f"{name} {number(value)}" for name, value in columns.items()]
        if "tokens_per_second" in rates:
            fields.append(f"{rates['tokens_per_second']:,.0f} tokens/s")
        if "mfu" in rates:
            fields.append(f"MFU {100 * rates['mfu']:.1f} %")
        elif "flops_per_second" in rates:
            fields.append(f"{unit(rates['flops_per_second'])}FLOP/s")
        if "seconds_left" in rates and self.step < self.total:
            fields.append(f"{duration(rates['seconds_left'])} left")
        return fields


def number(value: float | str) -> str:
    """`3.2141`, `12,345`, `1.2e-05`."""
    if isinstance(value, str):
        return value
    value = float(value)
    if value.is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e5 else f"{value:.2g}"


def unit(value: float) -> str:
    """`12.3 G` for 12.3e9."""
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if value >= scale:
            return f"{value / scale:.1f} {prefix}"
    return f"{value:.0f} "


def duration(seconds: float) -> str:
    """`0:42`, `12:05`, `3:10:00`, `2 d 04:00:00`."""
    minutes, s = divmod(round(max(0.0, seconds)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02}:{m:02}:{s:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
