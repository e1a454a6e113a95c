"""One SPMD program that runs any table: loss and gradients of a pipeline, without differentiating through its loop.

`gradients` is called inside a `shard_map` that is manual over the pipeline's axis, by every device; each follows its
column of the table. Three executors run the same actions:

    static    ticks of one kind, as a few loops over repeated patterns (`segments`). No branch but the loss's and the
              embedding gradient's, and a message's permute can overlap the next action.
    switch    any ticks: one loop whose body branches on the action. What a branch holds must not permute over another
              axis (see `branches`): that is refused.
    unroll    any ticks, one after the other in the program: for small tables and for looking at.

Buffers are as large as the table says, so memory does not grow with the number of microbatches. Inside a loop's body
writers stand before readers (`segments`), or XLA copies whole buffers in every turn.

What the table says of all devices and all turns of a loop is no data: a chunk's number, that no device idles, that each
is the path's last. Such columns are constants of the program (`constants`), and what hangs on them is neither sliced nor
chosen. A value that every device reads in the turn of the loop that made it has no buffer (`passed_on`).

A model may have losses inside of stages, at exits. As in EE-LLM (Chen et al. 2023, §3.1, eq. 2) a stage then differentiates

    its own exits' losses + <the gradient that came back, the state that went on>

and no message is larger for it (but where the loss at the end compares with an exit's state: that must travel with the
state, and its gradient comes back with the state's). An exit's loss and its gradient are computed where the stage's backward pass begins (§3.2,
"deferring"), so that from F to B only the state at the exit is held, and no gradient of the output projection.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxpar.pallas_kernels.varying import varying
from jaxpar.parallel.pipeline.branches import permutes
from jaxpar.parallel.pipeline.pullback import pullback
from jaxpar.parallel.pipeline.segments import Segment, constants, passed_on, segments
from jaxpar.parallel.pipeline.table import Table
from jaxpar.parallel.pipeline.tasks import Kind

Tree = Any
Executor = Literal["auto", "static", "switch", "unroll"]


@dataclass(frozen=True)
class Parts:
    """A model as a pipeline sees it. States, microbatches and parameters are trees.

    Attributes:
      first: (shared, micro) -> state, what enters the first stage.
      middle: (layers, state, piece, micro) -> state: the layers of one virtual stage. `piece` is what `pieces` says of
        it.
      last: (shared, state, micro) -> the microbatch's summed loss, a scalar; or a vector of sums whose first is the loss, and
        the others are only told.
      exits: for each place inside of a stage that may have an exit: functions as `last`, of which one or none is there.
        Where there are such places, `middle` gives (state, [what its exits read at each place]), which need not be all of a
        state.
      which: (piece) -> int32 [places]: 0 for no exit, k for the place's k-th.
    """

    first: Callable
    middle: Callable
    last: Callable
    exits: tuple[tuple[Callable, ...], ...] = ()
    which: Callable | None = None


@struct.dataclass
class Carry:
    """What goes from tick to tick on a device. Buffers are lists of arrays [slots + 1, ...]; of what is passed on within
    a turn of the loop, the values themselves, and nothing between turns."""

    input: list
    residual: list
    gradient: list
    weight: list
    d_layers: Tree
    d_shared: Tree
    loss: jax.Array


def executor_for(table: Table, executor: Executor = "auto") -> str:
    """The executor that runs this table.

    Raises:
      ValueError: an unknown one, or static for a table whose ticks are mixed.
    """
    if executor not in get_args(Executor):
        raise ValueError(f"executor = {executor!r}; choose one of {', '.join(get_args(Executor))}")
    static = table.row_kind is not None
    if executor == "static" and not static:
        raise ValueError(
            f"the static executor needs ticks of one kind, and {table.order.name} was compiled with mixed ticks; compile "
            "the table with ticks='one-kind', or take executor='switch'"
        )
    return ("static" if static else "switch") if executor == "auto" else executor


def gradients(
    table: Table,
    parts: Parts,
    shared: Tree,
    layers: Tree,
    pieces: Tree,
    micros: Tree,
    *,
    axis: str = "stage",
    axes: Iterable[str] = (),
    executor: Executor = "auto",
) -> tuple[jax.Array, Tree, Tree]:
    """The summed loss of all microbatches and its gradients, this device's part of them.

    Args:
      shared: parameters that first and last stage and exits read; the same on every device of `axis`.
      layers: this device's layers: leaves [chunks, ...].
      pieces: what `parts.middle` is told of each chunk: leaves [chunks, ...], integers.
      micros: all microbatches: leaves [m, ...]. Nothing in it is differentiated.
      axis: the mesh axis of the stages; the table has as many devices.
      axes: further manual axes, over which rows, tokens or gathered parameters may differ.

    Returns:
      loss (of `parts.last`'s shape), d_shared, d_layers: partial sums. Sum loss and d_shared over `axis`, and all three over
      those of `axes` that the batch is spread over: once, here at the end, not in every tick.

    Raises:
      ValueError: a table for another number of devices or microbatches, or an executor that cannot run it.
    """
    devices, m = jax.lax.axis_size(axis), jax.tree.leaves(micros)[0].shape[0]
    if (table.devices, table.order.microbatches) != (devices, m):
        raise ValueError(
            f"{table.order.name} is a table for {table.devices} devices and {table.order.microbatches} microbatches; "
            f"mesh axis {axis} has {devices}, and there are {m} microbatches"
        )
    program = _Program(table, parts, axis, frozenset((axis, *axes)))
    shared, layers, micros = program.everywhere((shared, layers, micros))
    return program.run(executor_for(table, executor), shared, layers, pieces, micros)


@dataclass
class _Program:
    table: Table
    parts: Parts
    axis: str
    axes: frozenset[str]
    fixed: dict = field(default_factory=dict)
    passed: frozenset[str] = frozenset()

    def everywhere(self, tree: Tree) -> Tree:
        """Cast to differ over every manual axis, so that no gradient is summed before the end."""
        return jax.tree.map(lambda x: varying(jnp.asarray(x), self.axes), tree)

    # -- what a device does ----------------------------------------------------------------------------------------------

    def run(self, executor: str, shared, layers, pieces, micros):
        table = self.table
        device = jax.lax.axis_index(self.axis)
        column = lambda x: jax.lax.dynamic_index_in_dim(jnp.asarray(x), device, x.ndim - 1, keepdims=False)
        rows = {name: column(x) for name, x in table.columns().items()}
        self.fixed = {"shared": shared, "layers": layers, "pieces": pieces, "micros": micros}
        loops = segments(table.row_kind) if executor == "static" else (Segment(0, (Kind.IDLE,), table.length),)
        self.passed = passed_on(table, loops) if executor == "static" else frozenset()
        carry = self.start()
        if executor == "unroll":
            for t in range(table.length):
                row = {k: x[t] for k, x in rows.items()} | constants(table, Segment(t, (Kind.IDLE,), 1))[0]
                if table.row_kind is None:
                    carry = self.mixed_tick(carry, row, table.shifts_at(t))
                else:
                    carry = self.static_tick(Kind(int(table.row_kind[t])), carry, row)
        else:
            for loop in loops:
                shape = (loop.repeats, len(loop.pattern))
                part = {k: x[loop.start : loop.stop].reshape(*shape, *x.shape[1:]) for k, x in rows.items()}
                turn = self.static_turn if executor == "static" else self.mixed_turn
                carry, _ = jax.lax.scan(partial(turn, loop.pattern, constants(table, loop)), carry, part)
        return carry.loss, carry.d_shared, carry.d_layers

    def start(self) -> Carry:
        """Empty buffers, and the stage traced once."""
        shared, micros = self.fixed["shared"], self.fixed["micros"]
        micro = jax.tree.map(lambda x: x[0], micros)
        x = self.everywhere(
            jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(self.parts.first, shared, micro))
        )
        self.x, self.state = x, jax.tree.structure(x)
        layers, piece = self.chunk(jnp.zeros((), jnp.int32))
        middle = lambda layers, x, aux: self.everywhere(self.parts.middle(layers, x, *aux))
        if self.table.row_kind is None and (over := permutes(jax.make_jaxpr(middle)(layers, x, (piece, micro)))):
            raise ValueError(
                f"{self.table.order.name} has mixed ticks, where devices take different branches, and its stages permute "
                f"over mesh axis {', '.join(sorted(over))}: the numbers would be wrong; compile the table with "
                "ticks='one-kind'"
            )
        splits = bool((self.table.kind == Kind.BI).any())
        # What lies in no buffer need not be small: it stays whole, as where JAX differentiates.
        kept_in_buffers = (self.table.keep == "residuals" and "residual" not in self.passed) or (
            splits and "weight" not in self.passed
        )
        self.stage = pullback(middle, layers, x, (piece, micro), thin=kept_in_buffers)

        def shapes(layers, x, aux):
            _, kept, at_exits = self.run_stage(layers, x, aux)
            dy = self.with_exits(x, at_exits)
            return kept + at_exits, self.stage.pull_input(layers, aux, kept, dy)[1] if splits else []

        kept, for_weights = jax.eval_shape(shapes, layers, x, (piece, micro))
        slots = self.table.slots

        def buffer(name, shapes):
            if name in self.passed:
                return []
            return [self.everywhere(jnp.zeros((slots[name] + 1, *s.shape), s.dtype)) for s in shapes]

        states = jax.tree.leaves(x)
        zeros = lambda tree: self.everywhere(jax.tree.map(jnp.zeros_like, tree))
        return Carry(
            input=buffer("input", states),
            residual=buffer("residual", kept) if self.table.keep == "residuals" else [],
            gradient=buffer("gradient", states),
            weight=buffer("weight", for_weights),
            d_layers=zeros(self.fixed["layers"]),
            d_shared=zeros(shared),
            loss=self.everywhere(jnp.zeros(jax.eval_shape(self.parts.last, shared, x, micro).shape, jnp.float32)),
        )

    def chunk(self, number):
        """A chunk's layers and what is said of it. Sliced here, outside of any gradient."""
        pick = lambda x: jax.lax.dynamic_index_in_dim(x, number, 0, keepdims=False)
        return jax.tree.map(pick, self.fixed["layers"]), jax.tree.map(pick, self.fixed["pieces"])

    def micro(self, row):
        return jax.tree.map(partial(_get, row["microbatch"]), self.fixed["micros"])

    def entering(self, carry: Carry, row, micro):
        """The state that the row's stage starts from."""
        begins = row["first"] > 0
        if _never(begins):
            return self.unflat(self.read(carry, "input", row))
        first = self.parts.first(self.fixed["shared"], micro)
        if _always(begins):
            return self.everywhere(first)
        held = self.unflat(self.read(carry, "input", row))
        return self.everywhere(jax.tree.map(lambda a, b: jnp.where(begins, a, b.astype(a.dtype)), first, held))

    def read(self, carry: Carry, name: str, row) -> list:
        """The row's slot of a buffer, or what was made in this turn."""
        held = getattr(carry, name)
        return held if name in self.passed else [_get(row[name], b) for b in held]

    def write(self, carry: Carry, name: str, slot, values: list) -> Carry:
        if name not in self.passed:
            values = [_put(slot, b, v) for b, v in zip(getattr(carry, name), values, strict=True)]
        return carry.replace(**{name: values})

    def unflat(self, leaves: list):
        return jax.tree.unflatten(self.state, leaves)

    # -- exits inside of a stage -----------------------------------------------------------------------------------------

    def run_stage(self, layers, x, aux) -> tuple[Any, list, list]:
        """The state behind the stage, what its backward pass keeps, and the arrays of the states at places of exits."""
        y, kept = self.stage.forward(layers, x, aux)
        if not self.parts.exits:
            return y, kept, []
        y, states = y
        self.places = jax.tree.structure(states)
        return y, kept, jax.tree.leaves(states)

    def with_exits(self, y, leaves: list):
        """y and what belongs to the places of exits, as `middle` gives them."""
        return (y, jax.tree.unflatten(self.places, leaves)) if self.parts.exits else y

    def at_exits(self, carry: Carry, active, aux, leaves: list, dy) -> tuple[Carry, Any]:
        """The losses at this stage's exits, and what the stage is to pull back: dy and their gradients."""
        if not self.parts.exits:
            return carry, dy
        piece, micro = aux
        d_states = []
        states = self.with_exits(dy, leaves)[1]
        for functions, there, x in zip(self.parts.exits, self.parts.which(piece), states, strict=True):
            none = lambda loss, d_shared, x: self.everywhere((loss, d_shared, jax.tree.map(jnp.zeros_like, x)))
            branches = [none, *(partial(self.with_loss, f, micro) for f in functions)]
            loss, d_shared, dx = jax.lax.switch(jnp.where(active, there, 0), branches, carry.loss, carry.d_shared, x)
            carry = carry.replace(loss=loss, d_shared=d_shared)
            d_states.append(dx)
        return carry, (dy, d_states)

    def with_loss(self, f: Callable, micro, loss, d_shared, x):
        """What f makes of x added to the sums so far, and the gradient of x."""
        found, (more, dx) = differentiated(f)(self.fixed["shared"], x, micro)
        return self.everywhere((loss + found.astype(loss.dtype), _add(d_shared, more), dx))

    # -- the actions: (carry, row, active) -> carry, message -----------------------------------------------------------

    def forward(self, carry: Carry, row, active):
        micro = self.micro(row)
        layers, piece = self.chunk(row["chunk"])
        x = self.entering(carry, row, micro)
        y, kept, at_exits = self.run_stage(layers, x, (piece, micro))
        if self.table.keep == "residuals":
            carry = self.write(carry, "residual", row["residual"], kept + at_exits)
        with_loss = partial(self.with_loss, self.parts.last, micro)

        def without(loss, d_shared, y):
            return self.everywhere((loss, d_shared, jax.tree.map(jnp.zeros_like, y)))

        ends = (row["last"] > 0) & active
        loss, d_shared, dy = _cond(ends, with_loss, without, carry.loss, carry.d_shared, y)
        # Anywhere but at the end of the path this slot is the dustbin.
        carry = self.write(carry, "gradient", row["gradient"], jax.tree.leaves(dy))
        return carry.replace(loss=loss, d_shared=d_shared), y

    def kept(self, carry: Carry, row, micro, layers, piece) -> tuple[list, list]:
        """What the backward pass reads, and the states at exits: held since F, or made again from the stage's input."""
        if self.table.keep == "residuals":
            held = self.read(carry, "residual", row)
            n = len(held) - self.places.num_leaves if self.parts.exits else len(held)
            return held[:n], held[n:]
        return self.run_stage(layers, self.entering(carry, row, micro), (piece, micro))[1:]

    def backward(self, split: bool, carry: Carry, row, active):
        micro = self.micro(row)
        layers, piece = self.chunk(row["chunk"])
        kept, at_exits = self.kept(carry, row, micro, layers, piece)
        dy = self.unflat(self.read(carry, "gradient", row))
        carry, dy = self.at_exits(carry, active, (piece, micro), at_exits, dy)
        if split:
            dx, for_weights = self.stage.pull_input(layers, (piece, micro), kept, dy)
            carry = self.write(carry, "weight", row["weight"], for_weights)
        else:
            d_layers, dx = self.stage.pull(layers, (piece, micro), kept, dy)
            carry = self.accumulate(carry, row, active, d_layers)
        dx = self.everywhere(dx)

        def embedding(d_shared):
            _, pull = jax.vjp(lambda shared: self.everywhere(self.parts.first(shared, micro)), self.fixed["shared"])
            return self.everywhere(_add(d_shared, pull(dx)[0]))

        begins = (row["first"] > 0) & active
        return carry.replace(d_shared=_cond(begins, embedding, self.everywhere, carry.d_shared)), dx

    def weights(self, carry: Carry, row, active):
        layers, piece = self.chunk(row["chunk"])
        d_layers = self.stage.pull_weights(layers, (piece, self.micro(row)), self.read(carry, "weight", row))
        return self.accumulate(carry, row, active, d_layers), self.x

    def accumulate(self, carry: Carry, row, active, d_layers) -> Carry:
        def add(total, more):
            # A device that idles has computed nonsense: chosen away, not multiplied by zero, which would keep a NaN.
            more = (more if _always(active) else jnp.where(active, more, 0)).astype(total.dtype)
            return _put(row["chunk"], total, _get(row["chunk"], total) + more)

        return carry.replace(d_layers=jax.tree.map(add, carry.d_layers, d_layers))

    def action(self, kind: Kind):
        return {
            Kind.F: self.forward,
            Kind.B: partial(self.backward, False),
            Kind.BI: partial(self.backward, True),
            Kind.BW: self.weights,
        }[kind]

    # -- ticks -----------------------------------------------------------------------------------------------------------

    def static_turn(self, pattern, known, carry: Carry, rows):
        for i, kind in enumerate(pattern):
            carry = self.static_tick(kind, carry, {name: x[i] for name, x in rows.items()} | known[i])
        return carry.replace(**{name: [] for name in self.passed}), None

    def mixed_turn(self, pattern, known, carry: Carry, rows):
        return self.mixed_tick(carry, {name: x[0] for name, x in rows.items()} | known[0], self.table.shifts), None

    def static_tick(self, kind: Kind, carry: Carry, row) -> Carry:
        carry, message = self.action(kind)(carry, row, row["kind"] == kind)
        return self.deliver(carry, row, message, self.table.shifts_of(kind), kind is Kind.F, kind in (Kind.B, Kind.BI))

    def mixed_tick(self, carry: Carry, row, shifts) -> Carry:
        kinds = sorted(set(self.table.kind.ravel().tolist()))
        idle = lambda carry: self.everywhere((carry, self.x))
        branches = [
            idle if kind == Kind.IDLE else lambda c, act=self.action(Kind(kind)): self.everywhere(act(c, row, True))
            for kind in kinds
        ]
        place = [kinds.index(kind) if kind in kinds else 0 for kind in Kind]
        which = _get(row["kind"], jnp.asarray(place, jnp.int32))
        carry, message = jax.lax.switch(which, branches, carry)
        return self.deliver(carry, row, message, shifts, True, True)

    def deliver(self, carry: Carry, row, message, shifts, inputs: bool, gradients: bool) -> Carry:
        """Send by each route, and put what comes into its slot (or the dustbin)."""
        if not (inputs or gradients):
            return carry
        size = self.table.devices
        for shift in shifts:
            route = [(d, (d + shift) % size) for d in range(size)]
            pass_on = (lambda x: x) if shift == 0 else (lambda x, route=route: jax.lax.ppermute(x, self.axis, route))
            got = [pass_on(x) for x in jax.tree.leaves(message)]
            at = self.table.shifts.index(shift)
            if inputs:
                carry = self.write(carry, "input", row["receive_input"][at], got)
            if gradients:
                carry = self.write(carry, "gradient", row["receive_gradient"][at], got)
        return carry


def differentiated(f: Callable) -> Callable:
    """(shared, state, micro) -> f's sums, and the gradients of the first of them by shared and state."""

    def first(*args):
        sums = f(*args)
        return sums.ravel()[0], sums

    def run(*args):
        (_, sums), grads = jax.value_and_grad(first, argnums=(0, 1), has_aux=True)(*args)
        return sums, grads

    return run


def _get(i, x):
    return jax.lax.dynamic_index_in_dim(x, i, 0, keepdims=False)


def _put(i, x, value):
    return jax.lax.dynamic_update_index_in_dim(x, value.astype(x.dtype), i, 0)


def _always(x) -> bool:
    """Known to be true while tracing."""
    return isinstance(x, (bool, np.bool_)) and bool(x)


def _never(x) -> bool:
    return isinstance(x, (bool, np.bool_)) and not x


def _cond(choice, then: Callable, otherwise: Callable, *operands):
    """`jax.lax.cond`, without a branch where the choice is known."""
    if _always(choice) or _never(choice):
        return (then if choice else otherwise)(*operands)
    return jax.lax.cond(choice, then, otherwise, *operands)


def _add(total: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)
