"""The training loop: one screen. What it is made of stands in its own files.

A batch walks: source → tokenised cache → packer → sharded put → `step.update` → metrics of the step before → writers.
The same command again goes on at the next step, whatever ended the run: the state, the position in the data and every
random key are functions of the checkpoint alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxpar.config import RunConfig
from jaxpar.interrupts import Interrupts, resume_command
from jaxpar.report import finish
from jaxpar.run import Run, prepare
from jaxpar.samples import sample
from jaxpar.watchdog import Watchdog


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      step: updates done.
      finished: whether all were done; False after an interrupt.
      loss: held-out loss at the end, in nats per token. None where the run was interrupted.
      baseline: the bigram model's loss on the same held-out examples. None where it was not asked for.
      sample: the generated text. Empty where none was asked for.
      folder: where checkpoints, metrics and the plot are.
      exit_code: 0, or 128 + the signal that stopped the run.
    """

    step: int
    finished: bool
    loss: float | None
    baseline: float | None
    sample: str
    folder: Path
    exit_code: int


def train(config: RunConfig, *, say: Callable[[str], None] = print) -> Result:
    """Train, or go on training, until `config.steps` updates are done or a signal asks to stop.

    Raises:
      UserError: bad input, before anything is traced or written; its kind `NotFiniteError` from a step that was not
        finite, with the checkpoints from before it intact.
    """
    return go(prepare(config, say), say)


def go(run: Run, say: Callable[[str], None] = print) -> Result:
    """The rest of `train`, from a run that is prepared."""
    config = run.config
    with (
        run,
        Interrupts(run.say) as interrupts,
        Watchdog(config.watchdog.seconds, run.folder, abort=config.watchdog.abort) as watchdog,
    ):
        loop(run, interrupts, watchdog)
        if run.step < config.steps:
            run.save(wait=True)
            run.say(f"stopped after step {run.step} of {config.steps}; this goes on from there: {resume_command()}")
            return Result(run.step, False, None, run.baseline, "", run.folder, interrupts.exit_code)
        watchdog.beat(run.step, compiling=True)
        run.save()
        loss = run.evaluate()
        if config.inspect_every is not None:
            run.inspect()
        text = sample(run)
        run.checkpoints.wait()
    finish.tell(run, loss, text, say)
    return Result(run.step, True, loss, run.baseline, text, run.folder, 0)


def loop(run: Run, interrupts: Interrupts, watchdog: Watchdog) -> None:
    """Steps until the last one, or until a signal."""
    config, before = run.config, None
    for batch in run.batches():
        if run.lose(batch):  # the run went back, and other batches follow
            continue
        metrics = run.update(batch)
        # Step t is running on the device; read the metrics of t-1 meanwhile, so that the device does not wait for us.
        if before is not None:
            run.report(*before)
        before = (run.step, metrics)
        watchdog.beat(run.step)
        run.checkpoints.check()

        evaluate, save = run.due(config.evaluate_every), run.due(config.checkpoint_every)
        inspect = run.due(config.inspect_every)
        if evaluate or inspect or save:
            # What a checkpoint vouches for must have been read (a bad step raises here) and written first.
            run.report(*before)
            before = None
        if evaluate:
            watchdog.beat(run.step, compiling=True)
            run.evaluate()
        if inspect:
            watchdog.beat(run.step, compiling=True)
            run.inspect()
        if save:
            run.save()
        if run.step >= config.steps or interrupts.agreed(run.step):
            break
    if before is not None:
        run.report(*before)
