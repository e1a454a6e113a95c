"""A schedule run from the host: every stage a jitted function of its own, on its own devices (multiple programs).

The devices at one place of a mesh's stage axis, with the mesh's other axes, are a *sub-mesh*. A stage's functions run on
its sub-mesh, where the partitioner spreads rows and weights; what passes between stages is copied from one sub-mesh to the
next. The host calls the tasks of an `Order` in an order that they can run in, without waiting for any; each sub-mesh works
off its own queue, so nothing runs in lock step.

Beside the one program of `execute` this needs no tables, buffers or slots: stages may have different numbers of layers and
states of different shapes, and what is held is a dictionary whose entries end with their last reader. It costs a call from
Python for every task, and all devices must belong to this process. It is not differentiated, nor part of a jitted step.
Its numbers check those of `execute`: an unsplit backward pass is `jax.vjp` itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpar.parallel.pipeline.execute import Parts
from jaxpar.parallel.pipeline.pullback import Pullback, pullback
from jaxpar.parallel.pipeline.table import Keep, assign_ticks
from jaxpar.parallel.pipeline.tasks import Kind, Order, Task
from jaxpar.parallel.pipeline.validate import validate_order

Tree = Any
Key = tuple[int, int]
"""A stage and a microbatch."""


@dataclass(frozen=True)
class Specs:
    """How a sub-mesh holds what it is given: `PartitionSpec`s over the mesh's axes but that of the stages, one for a whole
    tree or a tree of them. A microbatch's specs are without its leading dimension."""

    shared: Tree = PartitionSpec()
    layers: Tree = PartitionSpec()
    state: Tree = PartitionSpec()
    micro: Tree = PartitionSpec()


@dataclass(frozen=True)
class Found:
    """What a run gives.

    Attributes:
      loss: the summed loss of all microbatches, on the first sub-mesh, as are the gradients of the shared parameters.
      d_shared: those.
      d_layers: `d_layers[stage]`, on the stage's sub-mesh.
      activations: the most (stage, microbatch) that each sub-mesh held from F to B or BI: `Simulation.activations`.
      held: the same, but until BW where the backward pass is split: `Simulation.held`.
      bytes: the most bytes of all these, on all devices of a sub-mesh together. Weights that a backward pass reads are not
        among them.
    """

    loss: jax.Array
    d_shared: Tree
    d_layers: list[Tree]
    activations: tuple[int, ...]
    held: tuple[int, ...]
    bytes: tuple[int, ...]


@dataclass(frozen=True)
class Programs:
    """A schedule's functions, compiled when first called and kept for the next call.

    Attributes:
      order: the tasks of each device, whose dependencies alone decide when something runs.
      parts: the model. It must not name a mesh: its arrays lie on another one in each stage.
      mesh: all devices.
      axis: the axis of the stages.
      keep: what a stage keeps from F to its backward pass, all that it reads or its inputs only.
      specs: how the sub-meshes' devices share what they hold.

    Raises:
      ValueError: a mesh with another number of places on `axis` than the order has devices, or an order that cannot run.
    """

    order: Order
    parts: Parts
    mesh: Mesh
    axis: str = "stage"
    keep: Keep = "residuals"
    specs: Specs = Specs()
    _cut: dict = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self):
        sizes = dict(self.mesh.shape)
        if sizes.get(self.axis, 1) != self.order.devices:
            raise ValueError(
                f"{self.order.name} is an order for {self.order.devices} devices, and mesh axis {self.axis} has "
                f"{sizes.get(self.axis, 1)}; give a mesh with {self.axis}={self.order.devices}"
            )
        if self.keep not in ("inputs", "residuals"):
            raise ValueError(f"keep = {self.keep!r}; it is 'inputs' or 'residuals'")
        validate_order(self.order)

    @cached_property
    def meshes(self) -> tuple[Mesh, ...]:
        """The sub-mesh of each place on the stage axis, which keeps that axis, of size 1."""
        names, types = self.mesh.axis_names, self.mesh.axis_types
        groups = np.split(self.mesh.devices, self.order.devices, names.index(self.axis))
        return tuple(Mesh(group, names, axis_types=types) for group in groups)

    def gradients(self, shared: Tree, layers: Sequence[Tree], pieces: Sequence[Tree], micros: Tree) -> Found:
        """The summed loss of all microbatches and its gradients.

        Args:
          shared: parameters that the first and last stage of a path read.
          layers: `layers[stage]`, of any shapes that `parts.middle` takes.
          pieces: `pieces[stage]`, what `parts.middle` is told of it: integers.
          micros: leaves [m, ...]. Nothing in it is differentiated.

        Raises:
          ValueError: another number of stages or microbatches than the order has.
        """
        stages, m = self.order.placement.stages, jax.tree.leaves(micros)[0].shape[0]
        if (len(layers), len(pieces), m) != (stages, stages, self.order.microbatches):
            raise ValueError(
                f"{self.order.name} is an order for {stages} stages and {self.order.microbatches} microbatches; there "
                f"are layers for {len(layers)} stages, pieces for {len(pieces)}, and {m} microbatches"
            )
        run = _Run(self, shared, layers, pieces, micros)
        for row in assign_ticks(self.order):
            for task in filter(None, row):
                run.step(task)
        return run.found()

    def put(self, device: int, tree: Tree, specs: Tree) -> Tree:
        """The tree on a sub-mesh."""
        is_spec = lambda s: isinstance(s, PartitionSpec)
        return jax.device_put(
            tree, jax.tree.map(lambda s: NamedSharding(self.meshes[device], s), specs, is_leaf=is_spec)
        )

    # -- the functions of a stage; a jitted one compiles for each sub-mesh and for each shape that it meets ---------------

    @cached_property
    def first(self) -> Callable:
        """(shared, micro) -> state."""
        return jax.jit(self.parts.first)

    @cached_property
    def first_back(self) -> Callable:
        """(d_shared, shared, micro, dx) -> d_shared with the embedding's."""

        def back(total, shared, micro, dx):
            _, pull = jax.vjp(lambda shared: self.parts.first(shared, micro), shared)
            return _add(total, pull(dx)[0])

        return jax.jit(back, donate_argnums=0)

    @cached_property
    def last(self) -> Callable:
        """(loss, d_shared, shared, y, micro) -> loss and d_shared with this microbatch's, dy."""

        def ending(loss, total, shared, y, micro):
            found, (more, dy) = jax.value_and_grad(self.parts.last, argnums=(0, 1))(shared, y, micro)
            return loss + found.astype(loss.dtype), _add(total, more), dy

        return jax.jit(ending, donate_argnums=(0, 1))

    @cached_property
    def whole(self) -> Stage:
        """A stage whose backward pass is never split."""

        def pulled(layers, x, aux):
            return jax.vjp(lambda layers, x: self.parts.middle(layers, x, *aux), layers, x)

        if self.keep == "residuals":
            # The pulled-back function is a tree of what it reads: it leaves one program, and enters another.
            back = lambda total, layers, aux, pull, dy: _accumulated(total, *pull(dy))
            return Stage(jax.jit(pulled), jax.jit(back, donate_argnums=0))
        back = lambda total, layers, aux, x, dy: _accumulated(total, *pulled(layers, x, aux)[1](dy))
        return Stage(
            jax.jit(lambda layers, x, aux: (self.parts.middle(layers, x, *aux), x)), jax.jit(back, donate_argnums=0)
        )

    def split(self, layers: Tree, x: Tree, aux: Tree) -> Stage:
        """A stage whose backward pass is split for some microbatches. Cut once for all stages of the same shapes."""
        leaves, structure = jax.tree.flatten((layers, x, aux))
        key = structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
        if key not in self._cut:
            cut = pullback(lambda layers, x, aux: self.parts.middle(layers, x, *aux), layers, x, aux)
            self._cut[key] = self.stage(cut)
        return self._cut[key]

    def stage(self, cut: Pullback) -> Stage:
        forward = cut.forward
        kept = lambda layers, aux, held: held
        if self.keep == "inputs":
            forward = lambda layers, x, aux: (cut.forward(layers, x, aux)[0], x)
            kept = lambda layers, aux, x: cut.forward(layers, x, aux)[1]

        def back(total, layers, aux, held, dy):
            return _accumulated(total, *cut.pull(layers, aux, kept(layers, aux, held), dy))

        def back_input(layers, aux, held, dy):
            return cut.pull_input(layers, aux, kept(layers, aux, held), dy)

        def back_weights(total, layers, aux, held):
            return _add(total, cut.pull_weights(layers, aux, held))

        return Stage(
            jax.jit(forward),
            jax.jit(back, donate_argnums=0),
            jax.jit(back_input),
            jax.jit(back_weights, donate_argnums=0),
        )


@dataclass(frozen=True)
class Stage:
    """Jitted functions.

    Attributes:
      forward: (layers, x, aux) -> y, held.
      back: (total, layers, aux, held, dy) -> total with the weights' gradients, dx.
      back_input: (layers, aux, held, dy) -> dx, held for the weights' gradients.
      back_weights: (total, layers, aux, held) -> total with the weights' gradients.
    """

    forward: Callable
    back: Callable
    back_input: Callable | None = None
    back_weights: Callable | None = None


@dataclass(frozen=True)
class _Held:
    """What a task left for the stage's next one on the same microbatch."""

    stage: Stage
    aux: Tree
    values: Tree
    nbytes: int


class _Run:
    """What lies where while the tasks are called."""

    def __init__(self, programs: Programs, shared: Tree, layers: Sequence[Tree], pieces: Sequence[Tree], micros: Tree):
        self.programs, self.order, specs = programs, programs.order, programs.specs
        devices = range(self.order.devices)
        where = self.order.placement.device
        self.layers = [programs.put(where(s), tree, specs.layers) for s, tree in enumerate(layers)]
        self.pieces = [programs.put(where(s), piece, PartitionSpec()) for s, piece in enumerate(pieces)]
        self.micros = micros
        ends = {where(path[k]) for path in self.order.paths for k in (0, -1)}
        self.shared = {d: programs.put(d, shared, specs.shared) for d in sorted(ends | {0})}
        zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
        self.d_layers, self.d_shared = zeros(self.layers), zeros(self.shared)
        zero = jnp.zeros((), jnp.float32)
        self.loss = {d: programs.put(d, zero, PartitionSpec()) for d in self.shared}
        split = {task.stage for row in self.order.tasks for task in row if task.kind is Kind.BI}
        self.is_split = [s in split for s in range(len(layers))]
        self.inputs: dict[Key, Tree] = {}
        self.gradients: dict[Key, Tree] = {}
        self.activations: list[dict[Key, _Held]] = [{} for _ in devices]
        self.weights: list[dict[Key, _Held]] = [{} for _ in devices]
        self.peaks = [(0, 0, 0) for _ in devices]

    def step(self, task: Task) -> None:
        device, key = self.order.device(task), (task.stage, task.microbatch)
        {Kind.F: self.forward, Kind.B: self.backward, Kind.BI: self.backward, Kind.BW: self.weight}[task.kind](
            task, device, key
        )

    def forward(self, task: Task, device: int, key: Key) -> None:
        programs, layers = self.programs, self.layers[task.stage]
        micro = jax.tree.map(lambda x: x[task.microbatch], self.micros)
        micro = programs.put(device, micro, programs.specs.micro)
        aux = self.pieces[task.stage], micro
        if self.order.is_first(task):
            x = programs.put(device, programs.first(self.shared[device], micro), programs.specs.state)
        else:
            x = self.inputs.pop(key)
        stage = programs.split(layers, x, aux) if self.is_split[task.stage] else programs.whole
        y, values = stage.forward(layers, x, aux)
        self.activations[device][key] = _Held(stage, aux, values, _nbytes(values, layers))
        self.note(device)
        if self.order.is_last(task):
            self.loss[device], self.d_shared[device], self.gradients[key] = programs.last(
                self.loss[device], self.d_shared[device], self.shared[device], y, micro
            )
        self.send(task, y, self.inputs)

    def backward(self, task: Task, device: int, key: Key) -> None:
        programs, s = self.programs, task.stage
        held, dy = self.activations[device][key], self.gradients.pop(key)
        if task.kind is Kind.BI:
            dx, values = held.stage.back_input(self.layers[s], held.aux, held.values, dy)
            self.weights[device][key] = _Held(held.stage, held.aux, values, _nbytes(values, self.layers[s]))
        else:
            self.d_layers[s], dx = held.stage.back(self.d_layers[s], self.layers[s], held.aux, held.values, dy)
        self.note(device)
        del self.activations[device][key]
        if self.order.is_first(task):
            micro = held.aux[1]
            self.d_shared[device] = programs.first_back(self.d_shared[device], self.shared[device], micro, dx)
        self.send(task, dx, self.gradients)

    def weight(self, task: Task, device: int, key: Key) -> None:
        held, s = self.weights[device].pop(key), task.stage
        self.d_layers[s] = held.stage.back_weights(self.d_layers[s], self.layers[s], held.aux, held.values)

    def send(self, task: Task, message: Tree, to: dict[Key, Tree]) -> None:
        consumer = self.order.consumer(task)
        if consumer is not None:
            device = self.order.device(consumer)
            to[consumer.stage, consumer.microbatch] = self.programs.put(device, message, self.programs.specs.state)

    def note(self, device: int) -> None:
        """The most that has been held, the values that a running task reads and writes both among it."""
        activations, weights = self.activations[device], self.weights[device]
        held = [*activations.values(), *weights.values()]
        now = len(activations), len(activations | weights), sum(h.nbytes for h in held)
        self.peaks[device] = tuple(map(max, self.peaks[device], now))

    def found(self) -> Found:
        home = lambda tree, specs: self.programs.put(0, tree, specs)
        d_shared, loss = self.d_shared.pop(0), self.loss.pop(0)
        for device, more in self.d_shared.items():
            d_shared = _add(d_shared, home(more, self.programs.specs.shared))
            loss = loss + home(self.loss[device], PartitionSpec())
        return Found(loss, d_shared, self.d_layers, *zip(*self.peaks, strict=True))


def _nbytes(values: Tree, layers: Tree) -> int:
    """Bytes of arrays, each once, that are not the stage's parameters."""
    own = {id(leaf) for leaf in jax.tree.leaves(layers)}
    return sum({id(x): x.nbytes for x in jax.tree.leaves(values) if id(x) not in own}.values())


def _add(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def _accumulated(total: Tree, more: Tree, dx: Tree) -> tuple[Tree, Tree]:
    return _add(total, more), dx
