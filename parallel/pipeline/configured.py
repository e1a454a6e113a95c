"""The table that follows from a configuration: by name or from a file, in the cheapest form that can run."""

from __future__ import annotations

from functools import lru_cache

from jaxpar.parallel.pipeline.choose import Candidate, candidates, forms
from jaxpar.parallel.pipeline.config import PipelineConfig
from jaxpar.parallel.pipeline.csv_format import from_csv
from jaxpar.parallel.pipeline.simulate import Costs
from jaxpar.parallel.pipeline.table import Table
from jaxpar.parallel.pipeline.tasks import Order


@lru_cache(maxsize=32)
def table(config: PipelineConfig, stages: int, microbatches: int, mixed: bool) -> Table:
    found = [c for c in _candidates(config, stages, microbatches) if config.ticks in ("auto", c.ticks)]
    if config.executor == "static":
        found = [c for c in found if c.ticks == "one-kind"]
    fitting = [c for c in found if mixed or c.ticks == "one-kind"]
    if not fitting:
        raise ValueError(
            "pipeline.ticks = 'mixed' cannot run with what permutes inside a stage (attention over the sequence axis, "
            "products in rings over the tensor axis): devices would take different branches around a permute; set "
            "pipeline.ticks to one-kind"
        )
    return fitting[0].table


def _candidates(config: PipelineConfig, stages: int, microbatches: int) -> tuple[Candidate, ...]:
    # Rematerialised backward passes run the forward pass again.
    costs = Costs(backward_input=2.0) if config.keep == "inputs" else Costs()
    if not config.schedule.endswith(".csv"):
        return candidates(config.schedule, stages, microbatches, config.chunks, costs=costs, keep=config.keep)
    order = from_csv(config.schedule)
    _matches(order, config.schedule, stages, microbatches)
    return forms({"least": order}, costs, config.keep)


def _matches(order: Order, file: str, stages: int, microbatches: int) -> None:
    if (order.devices, order.microbatches) != (stages, microbatches):
        raise ValueError(
            f"{file} is for {order.devices} stages and {order.microbatches} microbatches; the mesh has {stages} stages and "
            f"the rows make {microbatches} microbatches; set --mesh stage={order.devices} and "
            f"--pipeline.microbatches {order.microbatches}"
        )
