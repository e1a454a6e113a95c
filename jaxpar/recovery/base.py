"""What a recovery strategy is: a frozen dataclass with pure methods, which is its own configuration. Free of JAX at import.

The S stages are equal, contiguous groups of the stack's L layers. A strategy keeps a tree of arrays (`persistent`),
brings it up to date in each step (`begin`, `observe`), and mends a state of which some stages were destroyed
(`recover`). What it keeps lives on stages too, and is destroyed with them (`damage`); `settle` fills it in again.

What is outside the stack (embedding; final norm and output projection) lives with the first and the last stage.
Strategies that can bring it back lose it with them (`ends`); for all others it never fails, as in CheckFree's paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from jaxpar.errors import UserError
from jaxpar.models.lazy import jax, jnp
from jaxpar.models.spec import LAYERS, flatten
from jaxpar.parallel.rules import Rules
from jaxpar.recovery import lost

Tree = Any
Rollback = Literal["memory", "disk"]


class Report(NamedTuple):
    """What one recovery did. All arrays, so that it can leave a jitted program.

    Attributes:
      failed: bool [S], the stages that were lost.
      recovered: bool [S], those of them that hold finite numbers again.
      exact: bool [S], those of them that are bitwise what they were (on the trajectory, where the run went back).
      steps_lost: int32, steps that must be done again.
      bytes_moved: float32, between machines.
      relative_error: float32 [S], the distance of a stage's parameters from those that were destroyed, divided by their
        norm (Frobenius, over the stage). 0 for stages that were not lost, and where the run went back; NaN for those that
        are not recovered.
    """

    failed: Any
    recovered: Any
    exact: Any
    steps_lost: Any
    bytes_moved: Any
    relative_error: Any


class Recovered(NamedTuple):
    """What `Recovery.recover` gives.

    Attributes:
      state: the mended state; stages that could not be recovered stay destroyed.
      recovered, exact: bool [S], as in `Report`.
      steps_lost: int32.
      bytes_moved: float32.
      rolled: bool, whether the state went back.
    """

    state: Any
    recovered: Any
    exact: Any
    steps_lost: Any
    bytes_moved: Any
    rolled: Any


@dataclass(frozen=True)
class Stages:
    """The stages, and what a strategy must know of the model to mend them.

    Attributes:
      count: S.
      specs: every parameter's `ParamSpec`.
      mesh: where the state lives. None: one device.
      rules: how the state lies on the mesh.
      ema_decay: of the transform `ema`, where it is in the chain.
      init: params -> a fresh state, filled in by `recovering`.
    """

    count: int
    specs: Tree
    mesh: Any = None
    rules: Rules = Rules()
    ema_decay: float | None = None
    init: Callable[[Tree], Any] | None = None

    def __post_init__(self):
        if not 1 <= self.count <= self.layers or self.layers % self.count:
            near = min(
                (d for d in range(1, self.layers + 1) if self.layers % d == 0), key=lambda d: abs(d - self.count)
            )
            raise UserError(
                f"{self.layers} layers are not divisible into {self.count} equal stages, and stages that stand in for "
                f"each other must be equal; nearest that works: {near}"
            )

    @property
    def layers(self) -> int:
        """L."""
        return lost.layers_of(self.specs)

    @property
    def each(self) -> int:
        """Layers of a stage."""
        return self.layers // self.count

    def spread(self, x_S):
        """[S] -> [L]: each layer has its stage's."""
        return jnp.broadcast_to(x_S[:, None], (self.count, self.each)).reshape(self.layers)

    def shifted(self, tree: Tree, by: int) -> Tree:
        """Leaves [L, ...] moved up by so many stages, round the end: stage i has what stage i - `by` had."""
        return jax.tree.map(lambda x: jnp.roll(x, by * self.each, axis=0), tree)

    def where(self, mask_S, a: Tree, b: Tree) -> Tree:
        """Leaves [L, ...]: a's in the stages of the mask, else b's. A NaN in what is not chosen goes nowhere."""
        mask_L = self.spread(mask_S)
        return jax.tree.map(lambda x, y: jnp.where(lost.by_layer(mask_L, y), x, y), a, b)

    def norms(self, layers: Tree):
        """float32 [S]: the Frobenius norm of each stage's leaves [L, ...]."""
        squares_L = sum(
            jnp.sum(jnp.square(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(layers)
        )
        return jnp.sqrt(jnp.sum(squares_L.reshape(self.count, self.each), axis=1))

    def stage_bytes(self) -> int:
        """Bytes of one stage's parameters."""
        import numpy as np

        return sum(s.size * np.dtype(s.dtype).itemsize for s in flatten(self.specs).values() if s.stacked) // self.count


@dataclass(frozen=True)
class Recovery:
    """The protocol, with what holds for a strategy that keeps nothing and recovers nothing.

    Attributes:
      exact: a recovered stage is bitwise what it was.
      ends: it brings back embedding, final norm and output projection, so these are lost with their stages.
      needs_norms: `observe` is given the stages' gradient norms.
      copies: what it keeps a copy of: nothing, parts of stages, or the whole state.
      least: the fewest stages that it works with.
      swaps: it is meant for models half of whose microbatches run both ends in swapped order; a run sees to that.
    """

    exact: ClassVar[bool] = False
    ends: ClassVar[bool] = False
    needs_norms: ClassVar[bool] = False
    copies: ClassVar[Literal["", "parts", "state"]] = ""
    least: ClassVar[int] = 1
    swaps: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """As the command line has it."""
        from jaxpar.options import kebab

        return kebab(type(self).__name__)

    def check(self, stages: int) -> None:
        """Raises UserError where so many stages are too few."""
        if stages < self.least:
            raise UserError(f"{self.name} needs at least {self.least} stages, got {stages}; {self._why_least()}")

    def _why_least(self) -> str:
        return "choose more stages or another strategy"

    # -- what it can do -----------------------------------------------------------------------------------------------

    def recoverable(self, failed_S):
        """bool [S], the lost stages that it can bring back, for NumPy and for traced arrays."""
        return failed_S & False

    def can_recover(self, failed_S):
        """Whether it can bring all of them back: a bool scalar, for NumPy and for traced arrays."""
        return ~(failed_S & ~self.recoverable(failed_S)).any()

    def refuses(self, failed_S) -> str:
        """Why it cannot recover these losses (host, NumPy), or nothing."""
        return "" if self.can_recover(failed_S) else self._why_not()

    def _why_not(self) -> str:
        return "it recovers nothing"

    def rollback(self, failed_S) -> Rollback | None:
        """Where the run goes back to after these losses (host, NumPy). None: it goes on with the current batch."""
        return None

    def back_to(self, failed_S, step: int, saved: int | None) -> int:
        """The step that `rollback` goes to from `step` (host).

        Args:
          saved: steps between the checkpoints on disk. None: there is only the beginning.
        """
        return step

    def moved(self, stages: Stages, state) -> list[float]:
        """[S], bytes that recovering each stage moves between machines. Static: only shapes are read."""
        return [0.0] * stages.count

    # -- what it keeps ------------------------------------------------------------------------------------------------

    def persistent(self, state, stages: Stages) -> Tree:
        """What it keeps, for a new state. Must not share arrays with the state, which may be donated."""
        return {}

    def begin(self, rec: Tree, state, stages: Stages) -> Tree:
        """At the start of a step, before anything is lost."""
        return rec

    def observe(self, rec: Tree, state, norms_S, held, stages: Stages) -> Tree:
        """After a step.

        Args:
          state: the new state (without this transform's slot).
          norms_S: float32 [S], norms of the mean gradient, where `needs_norms`; else None.
          held: bool scalar, a guard left the state as it was.
        """
        return rec

    def rate_scale(self, rec: Tree):
        """float32 [S] that multiplies the stages' updates. None: nothing does."""
        return None

    # -- what happens -------------------------------------------------------------------------------------------------

    def damage(self, rec: Tree, failed_S, stages: Stages) -> Tree:
        """What is left of what it keeps."""
        return rec

    def destroy(self, state, failed_S, stages: Stages):
        """The state without the lost stages."""
        return inject(state, failed_S, stages, ends=self.ends)

    def recover(self, rec: Tree, state, failed_S, stages: Stages) -> Recovered:
        """Mend a state whose lost stages are destroyed."""
        return self.found(state, jnp.zeros(stages.count, bool), stages)

    def found(self, state, recovered_S, stages: Stages, *, steps_lost=0, rolled: bool = False) -> Recovered:
        """What `recover` gives, of a strategy that is either exact or not."""
        exact_S = recovered_S if self.exact else jnp.zeros(stages.count, bool)
        bytes_S = jnp.where(recovered_S, jnp.asarray(self.moved(stages, state), jnp.float32), 0.0)
        # Going back moves the whole state once, however many stages were lost.
        moved = jnp.max(bytes_S) if rolled else jnp.sum(bytes_S)
        return Recovered(state, recovered_S, exact_S, jnp.asarray(steps_lost, jnp.int32), moved, jnp.asarray(rolled))

    def settle(self, rec: Tree, state, failed_S, recovered_S, stages: Stages) -> Tree:
        """Fill in what was damaged, from the mended state.

        Args:
          recovered_S: bool [S], the stages that this strategy brought back.
        """
        return rec


def inject(state, failed_S, stages: Stages, *, ends: bool = False):
    """Destroy the lost stages of a state: NaN (the smallest number, where there is no NaN) in parameters, optimiser
    moments and counts, and in what other transforms keep of these layers.

    Args:
      failed_S: bool [S].
      ends: embedding and head are lost with the first and the last stage.
    """
    tree = lost.parts(state)
    first, last = (failed_S[0], failed_S[-1]) if ends else (False, False)
    return state.replace(**lost.destroy(tree, lost.labels(tree, stages.specs), stages.spread(failed_S), first, last))


def state_bytes(state, stages: Stages, *, labels: tuple[str, ...] = (LAYERS,)) -> int:
    """Bytes of all in a state that lives with the given parts: parameters, moments, averages. Static."""
    tree = lost.parts(state)
    kept = lost.keep_only(tree, lost.labels(tree, stages.specs), lambda label: label in labels)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept))


def copied(tree: Tree) -> Tree:
    """Arrays of its own, also outside `jit`: one that stands twice in a state could not be donated."""
    return jax.tree.map(jnp.copy, tree)


def array_module(x):
    """NumPy for what lies on the host, jax.numpy for what is traced."""
    import numpy as np

    return np if isinstance(x, np.ndarray) else jnp
