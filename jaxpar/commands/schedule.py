"""`jaxpar schedule [NAME | FILE.csv] [OPTIONS]`: a pipeline schedule, and what it costs. Nothing runs, and no JAX."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxpar.commands.base import checking, read
from jaxpar.errors import UserError

DESCRIPTION = (
    "Show a pipeline schedule: its table of actions, its bubble and its memory, for given costs. The first word is gpipe, "
    "1f1b (also without a word), interleaved, zb-h1, zb-v, dualpipe-v, checkfree+, skippipe, or a .csv file of tasks, "
    "which has its own stages, microbatches and chunks."
)


@dataclass(frozen=True)
class ScheduleConfig:
    """The numbers of a pipeline, and what its parts cost.

    Attributes:
      stages: devices along the pipeline.
      microbatches: parts of the batch that pass through it.
      chunks: pieces of the model on a device; None is the schedule's own number. 1f1b with more than 1 is interleaved.
      ticks: one kind of action in all devices at a time, any mixture of kinds, or what is cheapest.
      keep: what a stage keeps for its backward pass: everything it needs, or its inputs, to compute the rest again.
      forward: seconds of a microbatch's forward pass through a stage (all chunks of it).
      backward_input: seconds of its backward pass for the gradient of the input.
      backward_weight: seconds of its backward pass for the gradient of the weights.
      latency: seconds that a message takes, whatever its size.
      message_bytes: bytes of a message between stages.
      bandwidth: bytes a second of a link between stages.
      activation_bytes: bytes that a stage keeps of a microbatch.
      parameter_bytes: bytes of the whole model, for the comparison with FSDP.
      compare: all schedules instead of one, and FSDP.
      plot: a picture to write (.png, .svg, .pdf).
      csv: a file to write the order of tasks to, as torch.distributed.pipelining reads it.
    """

    stages: int = 4
    microbatches: int = 8
    chunks: int | None = None
    ticks: Literal["cheapest", "mixed", "one-kind"] = "cheapest"
    keep: Literal["residuals", "inputs"] = "residuals"
    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    latency: float = 0.0
    message_bytes: float = 0.0
    bandwidth: float = math.inf
    activation_bytes: float = 1.0
    parameter_bytes: float = 0.0
    compare: bool = False
    plot: str | None = None
    csv: str | None = None


def main(argv: list[str]) -> int | None:
    name, rest = ("1f1b", argv) if not argv or argv[0].startswith("-") else (argv[0], argv[1:])
    config = read(ScheduleConfig(), rest, prog="jaxpar schedule", description=DESCRIPTION)
    if config.compare and (config.plot or config.csv):
        raise UserError("--compare writes no picture and no CSV; leave out --plot and --csv, or --compare")
    with checking():
        print(show(name, config))


def show(name: str, config: ScheduleConfig) -> str:
    """What the command prints; writes the picture and the CSV file that are asked for.

    Raises:
      ValueError: a schedule that cannot be made, with the numbers and the nearest that can.
      FileNotFoundError: no such CSV file.
    """
    from jaxpar.parallel.pipeline.choose import candidates, forms
    from jaxpar.parallel.pipeline.csv_format import from_csv, to_csv
    from jaxpar.parallel.pipeline.draw import plot
    from jaxpar.parallel.pipeline.report import comparison, report
    from jaxpar.parallel.pipeline.simulate import Costs, simulate

    costs = Costs(
        forward=config.forward,
        backward_input=config.backward_input,
        backward_weight=config.backward_weight,
        latency=config.latency,
        message=config.message_bytes,
        bandwidth=config.bandwidth,
        activation=config.activation_bytes,
        weight=config.activation_bytes,
    )
    if config.compare:
        chunks = 2 if config.chunks is None else config.chunks
        return comparison(config.stages, config.microbatches, chunks, costs, config.parameter_bytes)
    if name.endswith(".csv"):
        order = from_csv(Path(name).expanduser())
        costs = costs.per_chunk(order.chunks)
        found = forms({"least": order}, costs, config.keep)
    else:
        chunks = config.chunks
        costs = costs.per_chunk(chunks_of(name, chunks))
        found = candidates(name, config.stages, config.microbatches, chunks, costs=costs, keep=config.keep)
    choice = next(c for c in found if config.ticks in ("cheapest", c.ticks))
    text = report(choice, costs)
    for file in (config.plot, config.csv):
        if file and not Path(file).expanduser().resolve().parent.is_dir():
            raise FileNotFoundError(f"{file}: there is no folder {Path(file).expanduser().resolve().parent}")
    if config.plot:
        plot(simulate(choice.table.order, costs), Path(config.plot).expanduser())
        text += f"\n\n{config.plot}: the picture"
    if config.csv:
        to_csv(choice.table.order, Path(config.csv).expanduser())
        text += f"\n\n{config.csv}: the order of tasks; again with: jaxpar schedule {config.csv}"
    return text


def chunks_of(name: str, chunks: int | None) -> int:
    """How many chunks a schedule of this name gets; what it does not allow, `orders.make` refuses."""
    from jaxpar.parallel.pipeline.orders import CHUNKS
    from jaxpar.parallel.pipeline.tasks import positive

    if chunks is not None:
        positive(chunks=chunks)
        return chunks
    return CHUNKS.get(name, 1) or 2
