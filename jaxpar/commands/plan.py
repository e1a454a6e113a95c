"""`jaxpar plan [OPTIONS]`: SkipPipe's paths for a network, against DT-FM's pipelines. Nothing is trained, and no JAX."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxpar.commands.base import checking, read

DESCRIPTION = (
    "Plan a pipeline over machines with unlike links: which machine holds which stage, and the path of each microbatch, "
    "which leaves stages out (SkipPipe). Prints the iteration time by simulation beside DT-FM's whole pipelines, and "
    "DT-FM's with stages left out. The network is cloud20, volunteers20, racks16, homogeneous12, or a .toml or .csv file."
)


@dataclass(frozen=True)
class PlanConfig:
    """A network, a pipeline on it, and how long to search.

    Attributes:
      network: a shipped network's name, or a .toml or .csv file.
      stages: pieces of the model.
      skip: the part of the stages that a microbatch leaves out (the nearest whole number of stages is taken).
      microbatches: of an iteration, all replicas together.
      seconds: to search for; None where --steps is given.
      steps: of the search, which always give the same plan; None for as many as fit in --seconds.
      seed: of the random moves.
      forward: seconds of a microbatch's forward pass through a stage, on a machine of speed 1.
      backward: the backward pass, in forward passes.
      loss: the head and loss at the first stage, in forward passes.
      activation_mb: megabytes of a message between two stages.
      weight_mb: megabytes of a stage's gradients, which its machines exchange at the end of an iteration.
      memory: microbatches that every machine holds; None for the network's own numbers.
      plot: a picture of the timelines to write (.png, .svg, .pdf).
      csv: a file to write the order of tasks to, for `jaxpar schedule` and for training.
      quiet: no progress bar.
    """

    network: str = "cloud20"
    stages: int = 6
    skip: float = 1 / 3
    microbatches: int = 30
    seconds: float | None = None
    steps: int | None = None
    seed: int = 0
    forward: float = 0.44
    backward: float = 1.5
    loss: float = 0.25
    activation_mb: float = 33.55
    weight_mb: float = 268.5
    memory: int | None = None
    plot: str | None = None
    csv: str | None = None
    quiet: bool = False


DEFAULT_SECONDS = 60.0
PICTURES = (".png", ".svg", ".pdf")


def main(argv: list[str]) -> int | None:
    config = read(PlanConfig(), argv, prog="jaxpar plan", description=DESCRIPTION)
    with checking():
        print(show(config))


def show(config: PlanConfig) -> str:
    """What the command prints; writes the picture and the CSV file that are asked for.

    Raises:
      ValueError: a network, or numbers, that no plan can be made for, with what to change.
      FileNotFoundError: no such network, or no folder for what is written.
    """
    from jaxpar.parallel.pipeline.csv_format import to_csv
    from jaxpar.parallel.planner.draw import plot
    from jaxpar.parallel.planner.plan import executor_order
    from jaxpar.parallel.planner.progress import Bar
    from jaxpar.parallel.planner.report import report
    from jaxpar.parallel.planner.search import plan

    for file in (config.plot, config.csv):
        if file and not Path(file).expanduser().resolve().parent.is_dir():
            raise FileNotFoundError(f"{file}: there is no folder {Path(file).expanduser().resolve().parent}")
    if config.plot and Path(config.plot).suffix not in PICTURES:
        raise ValueError(f"{config.plot}: a picture ends in {', '.join(PICTURES)}")
    made = problem(config)
    seconds = DEFAULT_SECONDS if config.seconds is None and config.steps is None else config.seconds
    with Bar(seconds, config.steps, quiet=config.quiet) as bar:
        outcome = plan(made, seed=config.seed, steps=config.steps, seconds=seconds, tell=bar)
    text = report(outcome)
    if config.plot:
        plot((outcome.dtfm, outcome.dtfm_skip, outcome.skippipe), Path(config.plot).expanduser())
        text += f"\n\n{config.plot}: the picture"
    if config.csv:
        to_csv(executor_order(outcome.skippipe), Path(config.csv).expanduser())
        text += (
            f"\n\n{config.csv}: the order of tasks; look at it with: jaxpar schedule {config.csv}\n"
            f"train with its paths: jaxpar train --skipping skip-paths --skipping.stages {config.stages} "
            f"--skipping.microbatches {config.microbatches} --skipping.paths-file {config.csv}"
        )
    return text


def problem(config: PlanConfig) -> Any:
    """The planner's problem (`jaxpar.parallel.planner.problem.Problem`). Raises ValueError and FileNotFoundError."""
    from jaxpar.parallel.planner.files import load
    from jaxpar.parallel.planner.problem import Problem, Rules, Workload

    network = load(config.network)
    if config.memory is not None:
        network = replace(network, nodes=tuple(replace(node, memory=config.memory) for node in network.nodes))
    workload = Workload(
        config.forward, config.backward, config.loss, config.activation_mb * 1e6, config.weight_mb * 1e6
    )
    return Problem(network, workload, Rules.skipping(config.stages, config.skip), config.microbatches)
