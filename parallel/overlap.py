"""What the compiler lets run beside each collective of a compiled program: read from its schedule, nothing runs.

`overlaps(hlo, sizes)` reads the same text as `jaxpar.parallel.collectives.count`. A compiled module is scheduled: a
collective that can run beside other work is begun on one line and waited for on a later one, and what stands between
them is what hides it. Counted there are the matrix products (a `dot` or `convolution`, alone or in a fusion, loops
multiplied out; a Pallas kernel is one, for XLA does not look inside) and, where XLA:TPU wrote them down, its own
estimates of the cycles of everything that computes. Copies between memories are not counted. What is *not* said is
whether that is long enough: it needs a machine, or its bandwidths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from jaxpar.parallel.collectives import Collective, places, read
from jaxpar.parallel.hlo import Instruction, Module, parse

PRODUCTS, KERNEL = ("dot", "convolution"), "tpu_custom_call"


@dataclass(frozen=True)
class Overlap:
    """A collective and what runs beside it.

    Attributes:
      collective: which one, and how often.
      how: "pair", begun and waited for on two lines; "fused", carried on inside the products between; "alone", on one
        line, so that every device waits for it.
      products: matrix products between beginning and end (those that carry it included), in one execution.
      cycles: XLA's estimate of what computes there, in cycles of the device; 0 where it wrote none.
    """

    collective: Collective
    how: Literal["pair", "fused", "alone"]
    products: int
    cycles: int

    @property
    def hidden(self) -> bool:
        """At least one product runs beside it."""
        return self.products > 0

    def record(self) -> dict:
        """JSON-able."""
        return {**self.collective.record(), "how": self.how, "products": self.products, "cycles": self.cycles}


def overlaps(hlo: str, sizes: Mapping[str, int]) -> tuple[Overlap, ...]:
    """The collectives of a compiled program, in the order of its schedule, with what runs beside each.

    Args:
      hlo: `compiled.as_text()`.
      sizes: `{axis: size}` of the mesh in its order, to name the axes that groups run over.

    Raises:
      ValueError: a module that is not scheduled.
    """
    if "is_scheduled=true" not in hlo.partition("\n")[0]:
        raise ValueError("the module is not scheduled, so its order says nothing; give the text of a compiled program")
    module = parse(hlo)
    found = []
    for run in module.runs()[0]:
        for one in places(module, run.body):
            collective = read(one.instruction, run.times, sizes, one.scatters)
            begins = run.body[one.first]
            if one.first == one.last:
                found.append(Overlap(collective, "alone", 0, 0))
                continue
            between = run.body[one.first + 1 : one.last]
            products = sum(work(module, i)[0] for i in between)
            cycles = sum(work(module, i)[1] for i in between)
            how = "fused" if begins.opcode == "fusion" else "pair"
            found.append(Overlap(collective, how, products, cycles))
    return tuple(found)


def work(module: Module, one: Instruction) -> tuple[int, int]:
    """(products, estimated cycles) of one line of a schedule: of a loop all its turns, of a conditional the branch with
    the most."""
    match one.opcode:
        case "while":
            turns = module.trips(one) or 1
            products, cycles = within(module, one.attribute("body"))
            return turns * products, turns * cycles
        case "conditional":
            branches = [within(module, name) for name in module.branches(one)]
            return max(p for p, _ in branches), max(c for _, c in branches)
        case "call":
            return within(module, one.attribute("to_apply"))
    multiplies = lambda inside: inside.opcode in PRODUCTS or inside.attribute("custom_call_target") == KERNEL
    products = any(map(multiplies, module.fused(one)))
    estimate = re.search(r'"estimated_cycles":"(\d+)"', one.rest)
    return int(products), int(estimate[1]) if estimate else 0


def within(module: Module, computation: str) -> tuple[int, int]:
    each = [work(module, one) for one in module.computations.get(computation, [])]
    return sum(p for p, _ in each), sum(c for _, c in each)
