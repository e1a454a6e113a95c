"""A progress bar for the planner: how much of its budget is used, and the best iteration time so far."""

from __future__ import annotations

from typing import TextIO

from jaxpar.parallel.planner.search import Progress


class Bar:
    """A callback for `search.plan`. Use as a context manager.

    Args:
      seconds: the budget; None where `steps` is it.
      steps: the budget; None where `seconds` is it.
      stream: where to; None is stderr.
      quiet: show nothing.
    """

    def __init__(
        self, seconds: float | None, steps: int | None = None, stream: TextIO | None = None, *, quiet: bool = False
    ):
        from tqdm import tqdm

        self._by_time = seconds is not None
        self._bar = tqdm(
            total=seconds if self._by_time else steps,
            file=stream,
            disable=quiet,
            bar_format="{desc} {bar}| {n:.0f}/{total:.0f}" + (" s" if self._by_time else " steps") + "{postfix}",
            mininterval=0.2,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()

    def __call__(self, progress: Progress) -> None:
        done = progress.elapsed if self._by_time else progress.step
        if self._bar.total is not None:
            done = min(done, self._bar.total)
        self._bar.set_description_str(progress.phase, refresh=False)
        best = "" if progress.best is None else f"best {progress.best:.2f} s an iteration"
        self._bar.set_postfix_str(best, refresh=False)
        self._bar.update(done - self._bar.n)
