"""The search for block sizes: what compiles is found ahead of time, for any chip, and what is fastest where the chip is."""

from __future__ import annotations

import dataclasses
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.errors import JaxRuntimeError
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.pallas_kernels.tuning.timing import Sampler, sets_for

REFUSALS = (JaxRuntimeError, NotImplementedError, ValueError)
"""What compilers raise where block sizes are not for a chip."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One program of an op, and the fields of its tiles that it alone depends on.

    Attributes:
      name: "forward", "backward".
      candidates: block sizes, a dict of some of the tiles' fields each.
      run: `(tiles) -> (function of arrays)`.
      make: `(key) -> (arrays of the function)`, a tuple.
    """

    name: str
    candidates: tuple[dict[str, int], ...]
    run: Callable[[Any], Callable]
    make: Callable[[jax.Array], tuple]


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is tuned: an implementation of an op at one shape.

    Attributes:
      dtype, sizes: as the implementation looks its block sizes up.
      table: the tiles that it takes without a cache.
    """

    op: str
    implementation: str
    dtype: str
    sizes: dict[str, int]
    table: Any
    parts: tuple[Part, ...]


@dataclasses.dataclass
class Candidate:
    """One candidate and what became of it.

    Attributes:
      sizes: its block sizes.
      in_table: whether they are those that the table has.
      compile_s: seconds to trace, lower and compile.
      temporary_bytes: of the compiled program.
      vmem_bytes: VMEM of its largest kernel, where the compiler says so (TPUs).
      refused: why it does not compile.
      seconds: of one call, a sample a round; empty where nothing was timed.
    """

    part: str
    sizes: dict[str, int]
    in_table: bool = False
    compile_s: float = 0.0
    temporary_bytes: int = 0
    vmem_bytes: int | None = None
    refused: str | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def compiled_for(device, function: Callable, shapes: tuple) -> tuple[int, int | None]:
    """Compile for a device, which need not be there. Temporary bytes, and VMEM bytes of the largest kernel or None.

    Args:
      shapes: of the function's arrays: trees of `jax.ShapeDtypeStruct`.
    """
    mesh = Mesh(np.array([device]), ("x",))
    place = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    # The mesh in scope says what the trace is for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(function).trace(*shapes).lower().compile()
    return compiled.memory_analysis().temp_size_in_bytes, vmem(compiled.as_text())


def vmem(text: str) -> int | None:
    """VMEM bytes (memory space 1) of the largest kernel in a program compiled for a TPU; None where it has none."""
    found = []
    for line in text.splitlines():
        if "tpu_custom_call" in line:
            used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line)
            sizes = re.findall(r'"memory_space":"1"[^}]*"size":"(\d+)"', used[1]) if used else []
            found.append(sum(map(int, sizes)))
    return max(found, default=0) or None


def why(error: Exception) -> str:
    """The sentence of a compiler's message that has the numbers where it is known, else the first line."""
    text = str(error).strip()
    if found := re.search(r"Scoped allocation with size \S+ and limit \S+ exceeded", text):
        return found[0]
    return text.partition("\n")[0][:200] or type(error).__name__


def tried(
    subject: Subject, device, *, compiler: Callable = compiled_for, say: Callable[[Candidate], None]
) -> list[Candidate]:
    """Every candidate of every part compiled, those of the table first.

    Args:
      compiler: as `compiled_for`.
      say: gets each candidate when it is compiled or refused.
    """
    found = []
    for part in subject.parts:
        shapes = jax.eval_shape(part.make, jax.random.key(0))
        for candidate in _ordered(subject, part):
            start = time.perf_counter()
            try:
                tiles = dataclasses.replace(subject.table, **candidate.sizes)
                candidate.temporary_bytes, candidate.vmem_bytes = compiler(device, part.run(tiles), shapes)
            except REFUSALS as error:
                candidate.refused = why(error)
            candidate.compile_s = time.perf_counter() - start
            say(candidate)
            found.append(candidate)
    return found


def _ordered(subject: Subject, part: Part) -> list[Candidate]:
    first = {name: getattr(subject.table, name) for name in part.candidates[0]}
    rest = [sizes for sizes in part.candidates if sizes != first]
    return [Candidate(part.name, first, in_table=True), *(Candidate(part.name, sizes) for sizes in rest)]


def timed(subject: Subject, candidates: list[Candidate], *, rounds: int, sampler: Callable = Sampler) -> None:
    """Samples of all candidates that compile, one a round of each, every other round in the other direction.

    Args:
      sampler: `(function, sets of arrays)` with `sample() -> seconds`.
    """
    for part in subject.parts:
        make = jax.jit(part.make)
        count = sets_for(jax.eval_shape(part.make, jax.random.key(0)))
        sets = [make(jax.random.key(i)) for i in range(count)]
        ready = []
        for one in candidates:
            if one.part == part.name and one.refused is None:
                ready.append((one, sampler(part.run(dataclasses.replace(subject.table, **one.sizes)), sets)))
        for i in range(rounds):
            for one, samples in ready if i % 2 else reversed(ready):
                one.seconds.append(samples.sample())


def best(subject: Subject, candidates: list[Candidate]):
    """The tiles made of each part's fastest candidate by median.

    Raises:
      ValueError: a part of which no candidate compiles.
    """
    tiles = subject.table
    for part in subject.parts:
        mine = [one for one in candidates if one.part == part.name]
        some = [one for one in mine if one.seconds]
        if not some:
            raise ValueError(
                f"{subject.op} at {subject.sizes}: none of {len(mine)} block sizes of its {part.name} compiles for this chip; "
                f"the first: {mine[0].refused}"
            )
        tiles = dataclasses.replace(tiles, **min(some, key=lambda one: one.median).sizes)
    return tiles
