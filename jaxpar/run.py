"""A run: everything that the loop needs, joined, checked and restored."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxpar import flops, serialise
from jaxpar.ahead import compile_beside, lower, lower_init
from jaxpar.checkpoint import Checkpoints
from jaxpar.config import RunConfig
from jaxpar.data.pipeline import Pipeline
from jaxpar.errors import UserError
from jaxpar.generation import check_prompts
from jaxpar.inspecting import findings, scalars
from jaxpar.parallel.mesh import make_mesh, mesh_sizes
from jaxpar.program import Program, build
from jaxpar.recovery.loop import Losses, lower_repair, replayed
from jaxpar.report import depth
from jaxpar.report.plots import loss_plot
from jaxpar.report.progress import Progress
from jaxpar.report.writers import JsonLines, TensorBoard, WeightsAndBiases, Writers
from jaxpar.start import start
from jaxpar.state import abstract_state
from jaxpar.step import Batch, TrainState
from jaxpar.steps.ema import averaged
from jaxpar.whole_step import whole_step

METRICS = "metrics.jsonl"
AT_THE_END = ("held_out/loss", "sample", "inspect/lens_loss/00")
"""What is written after the last checkpoint."""
PLOT = "loss.png"
LOOK = "inspect.png"
PROFILE = "profile"
CHECKPOINTS = "checkpoints"


class NotFiniteError(UserError):
    """A loss or gradient was not finite, and the run was told to stop there."""


@dataclasses.dataclass
class Run:
    """What `prepare` joined. The loop calls `batches`, `update`, `report`, `evaluate` and `save`.

    Attributes:
      config: as it was given, with the vocabulary filled in.
      pipeline: the data.
      program: the model on its mesh.
      update_fn: the compiled `Step.update`: (state, batch) -> (state, metrics). The state is donated.
      state: the training state; replaced (its buffers donated) by each `update`.
      step: updates done.
      losses: what the run loses of its model. None: nothing.
      baseline: the bigram model's held-out loss, in nats per token, or None.
    """

    config: RunConfig
    folder: Path
    say: Callable[[str], None]
    pipeline: Pipeline
    program: Program
    update_fn: Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]
    state: TrainState
    checkpoints: Checkpoints
    step: int
    losses: Losses | None = None
    baseline: float | None = None

    def __post_init__(self):
        main = jax.process_index() == 0
        config, cfg = self.config, self.program.cfg
        self.tokens_per_step = config.data.batch * config.data.length
        self._evaluate = jax.jit(self.program.eval_fn)
        ema = config.step.ema
        self._averaged = None if ema is None else jax.jit(partial(averaged, decay=ema.decay))
        kind = jax.devices()[0].device_kind
        self.progress = Progress(
            config.steps,
            start=self.step,
            flops_per_token=flops.training(cfg, config.data.length),
            peak=flops.peak(kind, self.program.mesh.size),
            mode=config.progress if main else "off",
        )
        self.say = self.progress.say
        writers = []
        if main:
            # The last checkpoint is older than what the end writes: a run that was over, or killed there, ends once more.
            again = AT_THE_END if self.step >= config.steps else ()
            writers.append(JsonLines(self.folder / METRICS, start=self.step, again=again))
            writers.append(TensorBoard(self.folder, start=self.step))
            if config.wandb is not None:
                json = serialise.to_json(config)
                writers.append(WeightsAndBiases(config.wandb, self.folder, name=self.folder.name, config=json))
        self.writers = Writers(writers)
        self._finite = True
        # The furthest step so far: a run that goes back does some again, which were evaluated and saved before.
        self._furthest, self._new, self._went_back = self.step, True, False
        self._recoveries: list[tuple[int, np.ndarray, dict]] = []

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error) -> None:
        """Ends the background work. An error on the way out must not hide the one that ended the run."""
        self.progress.close()
        self.writers.close()
        with contextlib.suppress(Exception) if error[0] is not None else contextlib.nullcontext():
            self.checkpoints.close()

    def batches(self) -> Iterator[Batch]:
        """The batches from the state's position on, made ahead in the background; those from where it went back to, once
        `lose` has said so. Endless."""
        if self.step >= self.config.steps:
            return
        while True:
            position = int(self.state.data_position)
            for batch in self.pipeline.batches(position, self.config.data.batch, self.program.batch_sharding):
                yield batch
                if self._went_back:
                    break
            self._went_back = False

    def lose(self, batch: Batch) -> bool:
        """Lose what fails before the next step, and mend the state. Whether the run went back: `batch` is not its next one."""
        if self.losses is None or not (failed_S := self.losses.before(self.step)).any():
            return False
        now = self.step + 1
        self._went_back = self.losses.strategy.rollback(failed_S) is not None
        self.state, self.step, metrics = self.losses.mend(self.state, batch, self.step, failed_S)
        self._recoveries.append((now, failed_S, metrics))
        if self._went_back:
            self.progress.pause()
        return self._went_back

    def update(self, batch: Batch) -> dict[str, jax.Array]:
        """One step. Returns its metrics, still on the device."""
        first, count = self.config.profile.start, self.config.profile.steps
        if first == self.step + 1 > self._furthest:
            jax.profiler.start_trace(str(self.folder / PROFILE))
        self.state, metrics = self.update_fn(self.state, batch)
        self.step += 1
        self._new, self._furthest = self.step > self._furthest, max(self.step, self._furthest)
        if first is not None and self.step == first + count - 1 and self._new:
            jax.block_until_ready(self.state)
            jax.profiler.stop_trace()
            self.say(f"profile of steps {first} to {self.step}: {self.folder / PROFILE}")
        return metrics

    def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Read a step's metrics (this waits for it), show and write them.

        Raises:
          NotFiniteError: the step asked to stop; the state is the one before it.
        """
        self._tell_recoveries()
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        columns = {"loss": values["loss"]}
        shown = ("/skipped", "/total", "/failures", "/replayed")
        columns |= {n.partition("/")[2]: v for n, v in values.items() if n.endswith(shown) and v}
        rates = self.progress.update(step, self.tokens_per_step, columns)
        # A step that was skipped left the state before it, which was fine.
        skipped = any(value for name, value in values.items() if name.endswith("/skipped"))
        self._finite = skipped or (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]))
        self.writers.write(step, values | {f"speed/{k}": v for k, v in rates.items()})
        if stopped := [name for name, value in values.items() if name.endswith("/stopped") and value]:
            raise NotFiniteError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: {stopped[0].split('/')[0]} "
                f"stopped the run before the update; the checkpoints in {self.checkpoints.folder} are from before it; "
                "lower the learning rate, look at the data of this step, or choose --step.nonfinite skip-nonfinite"
            )

    def _tell_recoveries(self) -> None:
        """Read what recoveries told, show and write it: a mark at the step before whose gradients the stage was lost."""
        for step, failed_S, metrics in self._recoveries:
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            self.writers.write(step, values)
            self.say(self.losses.tell(step, failed_S, values))
        self._recoveries.clear()

    def best_params(self) -> Any:
        """The parameters to judge the model by: their average where the run keeps one, else the last ones."""
        return self.state.params if self._averaged is None else self._averaged(self.state)

    def evaluate(self) -> float:
        """The mean loss on the held-out batches, in nats per token: always the same ones, in the same order."""
        self.progress.pause()
        params = self.best_params()
        sums = [
            self._evaluate(params, batch)
            for batch in self.pipeline.validation(
                self.config.evaluate_batches, self.config.data.batch, self.program.batch_sharding
            )
        ]
        total, weight = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        loss = float(total / max(weight, 1e-30))
        self.writers.write(self.step, {"held_out/loss": loss})
        self.plot()
        self.say(f"step {self.step}: held-out loss {loss:.4f} nats per token")
        return loss

    def inspect(self) -> None:
        """Look into the model on the first held-out rows: one for each device that takes rows of its own."""
        self.progress.pause()
        sizes = mesh_sizes(self.program.mesh)
        [batch] = self.pipeline.validation(1, sizes["data"] * sizes["fsdp"], self.program.batch_sharding)
        found = findings(self.program.cfg, self.best_params(), batch)
        self.writers.write(self.step, scalars(found))
        if jax.process_index() == 0:
            png = depth.picture(found, f"{self.folder}, step {self.step}")
            self.writers.image(self.step, "inspect", png)
            depth.write(self.folder / LOOK, png)

    def plot(self) -> None:
        if jax.process_index() == 0:
            self.writers.flush()
            loss_plot(
                self.folder / METRICS,
                self.folder / PLOT,
                baseline=self.baseline,
                tokens_per_step=self.tokens_per_step,
                title=str(self.folder),
            )

    def save(self, *, wait: bool = False) -> None:
        """Start a checkpoint of the state (and wait for it). Its step's metrics must have been reported."""
        if self.step < self._furthest and (self.checkpoints.latest() or 0) > self.step:
            return  # stopped while steps are done again: what goes on from the newer one does them again likewise
        # Lines up to this step must be on disk before the checkpoint that a resumed run goes on from.
        self.writers.flush()
        self.checkpoints.save(self.state, finite=self._finite)
        if wait:
            self.checkpoints.wait()

    def due(self, every: int | None) -> bool:
        """Whether something that is done every so many steps is due; the end of the run sees to itself."""
        return every is not None and self.step % every == 0 and self.step < self.config.steps and self._new


def first_ids(tokenizer: Any, prompt: str) -> Sequence[int]:
    """The ids that a text begins with: the prompt's, or the end of the document before."""
    ids = tokenizer.encode(prompt).tolist()
    if tokenizer.bos is not None:
        return [tokenizer.bos, *ids]
    return ids or [tokenizer.eod]


def prepare(config: RunConfig, say: Callable[[str], None] = print) -> Run:
    """Check everything, build the data, the mesh, the program and the step, and restore the newest checkpoint.

    Raises:
      UserError, ValueError: bad input; nothing has been traced then, and nothing written but the tokenised cache.
    """
    start(
        fake_devices=config.fake_devices,
        compile_cache=config.compile_cache,
        coordinator=config.distributed.coordinator,
        processes=config.distributed.processes,
        process=config.distributed.process,
        say=say,
    )
    main = jax.process_index() == 0
    say = say if main else (lambda text: None)
    mesh = make_mesh(config.mesh)
    config.check(mesh_sizes(mesh))
    pipeline = Pipeline(config.data, say)
    config = config.replace(model=config.model.replace(vocabulary=pipeline.vocabulary))
    settled = config.settled(mesh_sizes(mesh))
    if settled != config:
        say(
            f"{config.recovery.name}: each second microbatch runs the first two and the last two stages in swapped order"
        )
    program = build(
        config.model,
        mesh,
        rows=config.rows,
        length=config.data.length,
        pipeline=settled.pipeline,
        sequence=config.sequence,
        tensor=config.tensor,
        quantise=config.quantise,
        staged=settled.staged(mesh_sizes(mesh)),
    )
    for note in program.notes:
        say(note)
    step = whole_step(settled, program)
    if config.sample.tokens:
        check_prompts(config.model, [first_ids(pipeline.tokenizer, config.sample.prompt)], config.sample.tokens)

    folder = Path(config.folder)
    checkpoints = Checkpoints(
        folder / CHECKPOINTS,
        config=serialise.to_json(config),
        fingerprint=pipeline.fingerprint,
        keep=config.checkpoint_keep,
        say=say,
    )
    fresh = lambda state: step.init(state.params, state.key)
    key = jax.random.key(config.seed)
    target = abstract_state(step, program, key)
    restored = checkpoints.restore(target, fresh=fresh)
    # Compiling is the longest wait of a run's start, so whatever else there is to do is done beside it. What is needed
    # first goes first: XLA compiles in the order of asking.
    begins = cache(lambda: tuple(map(compile_beside, lower_init(step, program, target, key))))
    if restored is None:
        begins()
    update = compile_beside(lower(step, program, target, config.data.batch, config.data.length))

    def begin() -> TrainState:
        init, init_rest = begins()
        return init_rest(init(jax.random.fold_in(key, 0)), jax.random.fold_in(key, 1))

    if restored is None:
        state = begin()
    else:
        state, meta = restored
        for note in meta.notes:
            say(note)
        say(f"going on from step {meta.step} of {config.steps}, example {int(state.data_position)}")
    losses = None
    if not config.failures.none:
        trace = config.trace(mesh_sizes(mesh))
        repair = lower_repair(step, program, target, config.data.batch, config.data.length, trace.stages)

        def again() -> TrainState:
            found = checkpoints.restore(target, fresh=fresh)
            return begin() if found is None else found[0]

        losses = Losses(config.recovery, trace, compile_beside(repair), again, mesh, replayed(state))
    run = Run(config, folder, say, pipeline, program, update, state, checkpoints, int(state.step), losses)
    if config.baseline:
        run.baseline = pipeline.bigram_loss(config.evaluate_batches, config.data.batch)
        say(f"bigram model: held-out loss {run.baseline:.4f} nats per token")
    return run
