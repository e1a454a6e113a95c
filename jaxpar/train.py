"""The training loop: one screen. What it is made of stands in its own files.

A batch walks: source → tokenised cache → packer → sharded put → `step.update` → metrics of the step before → writers.
The same command again goes on at the next step, whatever ended the run: the state, the position in the data and every
random key are functions of the checkpoint alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jaxpar import report, samples
from jaxpar.config import RunConfig
from jaxpar.errors import UserError
from jaxpar.interrupts import Interrupts
from jaxpar.run import Run, prepare
from jaxpar.watchdog import Watchdog


class NotFiniteError(UserError):
    """A loss or gradient was not finite, and the run was told to stop there."""


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: updates done.
      finished: whether all were done; False after an interrupt.
      loss: held-out loss at the end, in nats per token. None where the run was interrupted.
      baseline: the bigram model's loss on the same held-out examples. None where it was not asked for.
      sample: the generated text. Empty where none was asked for.
      folder: where checkpoints, metrics and the plot are.
    """

    step: int
    finished: bool
    loss: float | None
    baseline: float | None
    sample: str
    folder: Path


def train(config: RunConfig, *, say: Callable[[str], None] = print) -> Result:
    """Train, or go on training, until `config.steps` updates are done or a signal asks to stop.

    Raises:
      UserError: bad input, before anything is traced or written; NotFiniteError from the step that was not finite.
    """
    run = prepare(config, say)
    with run, Interrupts(say) as interrupts, Watchdog(config.watchdog, run.folder) as watchdog:
        loop(run, interrupts, watchdog)
        if run.step < config.steps:
            run.save(wait=True)
            say(f"stopped after step {run.step} of {config.steps}; the same command goes on from there")
            return Result(run.step, False, None, run.baseline, "", run.folder)
        loss = run.evaluate()
        run.save(wait=True)
        text = samples.sample(run)
    report.finish(run, loss, text, say)
    return Result(run.step, True, loss, run.baseline, text, run.folder)


def loop(run: Run, interrupts: Interrupts, watchdog: Watchdog) -> None:
    """Steps until the last one, or until a signal."""
    config = run.config
    before = None
    for batch in run.batches():
        with run.profile():
            metrics = run.update(batch)
        # Step t is running on the device; read step t-1 meanwhile, so that the device never waits for the host.
        if before is not None:
            run.report(*before)
        before = (run.step, metrics, time.perf_counter())
        watchdog.beat(run.step)
        run.checkpoints.check()

        due = lambda every: every is not None and run.step % every == 0
        if due(config.evaluate_every) and run.step < config.steps:
            run.report(*before)
            before = None
            run.evaluate()
        if due(config.checkpoint_every):
            run.save()
        if run.step >= config.steps or interrupts.agreed(run.step):
            break
    if before is not None:
        run.report(*before)


def finite(metrics: dict) -> bool:
    return bool(np.isfinite(jax.device_get(metrics["loss"])))
