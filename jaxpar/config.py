"""One run as one frozen dataclass: the command line, the checkpoint and the presets are made from it. Free of JAX."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from jaxpar.data.config import DataConfig
from jaxpar.errors import UserError
from jaxpar.models.config import ModelConfig
from jaxpar.models.positions import Learned
from jaxpar.optimisers_config import AdamW, AnyOptimiser
from jaxpar.parallel.mesh import MeshConfig
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.sequence.config import SequenceConfig
from jaxpar.parallel.tensor.config import TensorConfig
from jaxpar.quantise.training import Quantise
from jaxpar.recovery.config import AnyRecovery, FailureConfig
from jaxpar.recovery.no_failure import NoFailure
from jaxpar.sampling import Sampler
from jaxpar.skipping.config import AnySkipping
from jaxpar.steps.config import ClipPerStage, StepConfig

if TYPE_CHECKING:
    from jaxpar.recovery.failures import FailureTrace


@dataclass(frozen=True)
class SampleConfig:
    """The text that a run generates at its end.

    Attributes:
      prompt: the text to continue.
      tokens: how many tokens to add. 0: no sample.
      sampler: how tokens are chosen.
    """

    prompt: str = "def "
    tokens: int = 200
    sampler: Sampler = Sampler(temperature=0.7, top_p=0.95)


@dataclass(frozen=True)
class DistributedConfig:
    """Several processes. Under Slurm, Kubernetes and on TPU pods nothing need be given.

    Attributes:
      coordinator: host:port of process 0. None: found from the environment, or a single process.
      processes: how many processes there are. None: found from the environment.
      process: this one's number, from 0. None: found from the environment.
    """

    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None


@dataclass(frozen=True)
class WatchdogConfig:
    """What happens when a step hangs.

    Attributes:
      seconds: without a finished step for this long, the stacks of all threads are written. None: never.
      abort: then end the process with exit code 70, so that a scheduler starts it again.
    """

    seconds: float | None = 600.0
    abort: bool = False


@dataclass(frozen=True)
class ProfileConfig:
    """A `jax.profiler` trace of a few steps.

    Attributes:
      start: the first step of the trace. None: no trace.
      steps: how many steps.
    """

    start: int | None = None
    steps: int = 3


@dataclass(frozen=True)
class RunConfig:
    """Train a language model. The same command again goes on where the run was interrupted.

    Attributes:
      folder: where checkpoints, metrics, TensorBoard files, the plot and the sample go.
      steps: updates in all.
      seed: of parameters and dropout (the data's order has its own).
      model: the decoder. `vocabulary` follows from the tokenizer.
      data: text and batches.
      optimiser: the optimiser and its schedule.
      step: what is wrapped around a step: accumulation, clipping, what happens to bad steps, averaging.
      mesh: how many devices lie along each axis, also as data=2,fsdp=2,tensor=2; together all devices there are. One
        axis may take the rest; without this option, data does.
      pipeline: how microbatches pass through the stages of a mesh with stage > 1.
      sequence: how attention works on a mesh with sequence > 1.
      skipping: which layers a microbatch leaves out. None: it runs them all. On a mesh with stage > 1 stages then run one
        after the other, without a pipeline.
      tensor: how products work on a mesh with tensor > 1.
      quantise: the number format of layers' products, forwards and backwards: for instance mxfp8, see `jaxpar formats`.
        None: the compute dtype.
      recovery: how stages of the model that are lost come back. A run whose failures it cannot recover does not start.
        With checkfree_plus each second microbatch runs both ends in swapped order.
      failures: which stages are lost when.
      fake_devices: pretend that the CPU is this many devices. None: the real ones.
      distributed: several processes.
      evaluate_every: steps between evaluations; there is always one at the end. None: only that one.
      evaluate_batches: held-out batches in an evaluation.
      inspect_every: steps between looks into the model on held-out rows, as `jaxpar inspect` has them: depth weights, norms,
        cosines, the loss behind each layer and how deep tokens would go, as metrics and as a picture. None: none.
      checkpoint_every: steps between checkpoints; there is always one at the end. None: only that one.
      checkpoint_keep: how many checkpoints stay.
      baseline: compute the loss of a bigram model on the same held-out examples.
      sample: the text generated at the end.
      progress: a bar in a terminal or notebook, plain lines elsewhere ("auto"), or one of these, or nothing.
      compile_cache: keep compiled programs on disk for the next start.
      watchdog: what happens when a step hangs.
      profile: a trace of some steps for `tensorboard` or Perfetto.
      wandb: a Weights & Biases project to log to as well. None: none.
    """

    folder: str = "runs/first"
    steps: int = 400
    seed: int = 0
    model: ModelConfig = field(default_factory=lambda: ModelConfig().as_given())
    data: DataConfig = DataConfig()
    optimiser: AnyOptimiser = AdamW()
    step: StepConfig = StepConfig()
    mesh: MeshConfig = field(default=MeshConfig(data="rest"), metadata={"parse": MeshConfig.parse})
    pipeline: PipelineConfig = PipelineConfig()
    sequence: SequenceConfig = SequenceConfig()
    tensor: TensorConfig = TensorConfig()
    quantise: Quantise | None = field(default=None, metadata={"parse": Quantise.parse})
    skipping: AnySkipping | None = None
    recovery: AnyRecovery = NoFailure()
    failures: FailureConfig = FailureConfig()
    fake_devices: int | None = None
    distributed: DistributedConfig = DistributedConfig()
    evaluate_every: int | None = 100
    evaluate_batches: int = 8
    inspect_every: int | None = None
    checkpoint_every: int | None = 100
    checkpoint_keep: int = 3
    baseline: bool = True
    sample: SampleConfig = SampleConfig()
    progress: Literal["auto", "bar", "notebook", "lines", "off"] = "auto"
    compile_cache: bool = True
    watchdog: WatchdogConfig = WatchdogConfig()
    profile: ProfileConfig = ProfileConfig()
    wandb: str | None = None

    def __post_init__(self):
        for name in ("steps", "evaluate_batches", "checkpoint_keep"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("evaluate_every", "inspect_every", "checkpoint_every", "fake_devices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, got {value}; leave it out for none")
        if not self.folder:
            raise UserError("folder is empty; name the folder that the run writes to, for example runs/first")
        if isinstance(self.model.positions, Learned) and self.data.length > self.model.context:
            raise UserError(
                f"data.length = {self.data.length} tokens is longer than model.context = {self.model.context}, and "
                "learned positions end there; shorten the rows or lengthen the context"
            )
        if self.data.batch % self.step.accumulate:
            raise UserError(
                f"data.batch = {self.data.batch} rows are not divisible into step.accumulate = {self.step.accumulate} "
                f"microbatches; choose a batch of {-(-self.data.batch // self.step.accumulate) * self.step.accumulate}"
            )
        clip = self.step.clip
        if isinstance(clip, ClipPerStage) and clip.stages > self.model.layers:
            raise UserError(
                f"step.clip.stages = {clip.stages} stages are more than model.layers = {self.model.layers} layers; "
                f"choose at most {self.model.layers}"
            )
        if self.profile.start is not None and self.profile.start < 1:
            raise UserError(f"profile.start = {self.profile.start} must be at least 1, the first step")
        if self.profile.steps < 1:
            raise UserError(f"profile.steps = {self.profile.steps} must be at least 1")
        if self.sample.tokens < 0:
            raise UserError(f"sample.tokens must be at least 0, got {self.sample.tokens}")
        if self.watchdog.seconds is not None and self.watchdog.seconds <= 0:
            raise UserError(f"watchdog.seconds must be above 0, got {self.watchdog.seconds}; None turns it off")

    def replace(self, **changes: Any) -> RunConfig:
        return replace(self, **changes)

    @property
    def rows(self) -> int:
        """Rows whose gradients are made at once: a batch over the parts of an accumulation."""
        return self.data.batch // self.step.accumulate

    def staged(self, sizes: Mapping[str, int]) -> bool:
        """Whether a mesh of these sizes runs a pipeline: where it has stages, unless microbatches take routes."""
        return sizes["stage"] > 1 and self.skipping is None

    def check(self, sizes: Mapping[str, int]) -> None:
        """What only the mesh's sizes tell.

        Raises:
          UserError: skipping that does not suit the model or the batch; failures that do not suit the model or that the
            strategy cannot recover.
        """
        if self.recovers or not self.failures.none:
            from jaxpar.recovery.plan import walk

            walk(self.recovery, self.trace(sizes), self.steps, saved=self.checkpoint_every)
        skipping = self.settled(sizes).skipping
        if skipping is not None:
            try:
                self.model.residual.check_route(skipping)
                self.model.exits.check_route(skipping)
            except ValueError as error:
                raise UserError(str(error)) from None
            try:
                skipping.check(self.model.layers, self.rows, sizes["data"] * sizes["fsdp"])
            except UserError as error:
                if skipping == self.skipping:
                    raise
                raise UserError(f"{error}; {self.recovery.name} swaps them; without: --recovery.no-swaps") from None

    def settled(self, sizes: Mapping[str, int]) -> RunConfig:
        """With the order of stages that the recovery strategy is meant for: where it swaps, 1F1B becomes the schedule
        checkfree+, and without a pipeline each second microbatch takes a route with both ends swapped.

        Raises:
          UserError: a schedule or paths with an order of their own, or other stages than the pipeline's.
        """
        if not self.recovery.swaps:
            return self
        stages, given = self.failures.count(self.model.layers, sizes["stage"]), self.pipeline.schedule
        instead = "or train without the swapped order: --recovery.no-swaps"
        if not self.staged(sizes):
            from jaxpar.skipping.together import with_swaps

            return self.replace(skipping=with_swaps(self.skipping, stages, instead))
        if given not in ("1f1b", "checkfree+"):
            raise UserError(
                f"pipeline.schedule = {given!r} does not swap the stages at both ends, for which {self.recovery.name} is "
                f"meant; take checkfree+, {instead}"
            )
        if stages != sizes["stage"]:
            raise UserError(
                f"failures.stages = {stages}, but the pipeline, which swaps the stages at both ends for {self.recovery.name}, "
                f"has {sizes['stage']}; leave failures.stages out, {instead}"
            )
        return self.replace(pipeline=replace(self.pipeline, schedule="checkfree+"))

    @property
    def recovers(self) -> bool:
        """Whether there is a recovery strategy."""
        return not isinstance(self.recovery, NoFailure)

    def trace(self, sizes: Mapping[str, int]) -> FailureTrace:
        """Which stages are lost when, on a mesh of these sizes."""
        return self.failures.trace(self.failures.count(self.model.layers, sizes["stage"]), self.steps)

    def transforms(self) -> tuple:
        """What is wrapped around the step (of a config that is `settled`), innermost first: routes are outside of accumulation, whose parts take the same
        ones, and inside of what judges gradients."""
        accumulation, *rest = self.step.transforms()
        routes, model = (), self.model
        if model.exits.at and model.exits.loss.changes:
            from jaxpar.adaptive.curriculum import exit_weights

            routes = (exit_weights(model.exits, model.layers),)
        if self.skipping is not None:
            from jaxpar.skipping.transform import skipping

            routes = (*routes, skipping(self.skipping, model.layers))
        return (accumulation, *routes, *rest)


def same_run(config: RunConfig) -> dict[str, Any]:
    """The fields that make two runs the same one, as a checkpoint compares them."""
    return {f.name: getattr(config, f.name) for f in fields(config) if f.name in ("model", "data", "optimiser", "seed")}
