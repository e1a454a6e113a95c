"""One op, many implementations: which of them a call gets, and why not another.

An op's public function keeps its implementations in an `Op`, in order of preference, and asks it to choose:

    choice = MATMUL.choose(implementation, x, w, **options)
    return choice.call(lambda one: one.run, x, w)

The choice looks at shapes, dtypes and the platform, never at values. Where a process may lower the same trace for several
platforms (a GPU and its host), the choice is made when it is lowered (`jax.lax.platform_dependent`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax

from jaxpar.pallas_kernels import versions

NAMES = {"cpu": "CPUs", "cuda": "NVIDIA GPUs", "tpu": "TPUs"}


def fits(*arrays, **options) -> None:
    """No call is a misfit: of an implementation that does all that its op does."""


def unmeasured(*arrays, **options) -> str:
    """An `unwise` of what has not been seen to be faster than others, on any chip: None leaves all calls to those."""
    return "has not been measured on a chip, so that only its name chooses it"


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
      name: as callers write it.
      run: `(*arrays, **options) -> result`.
      misfit: why it cannot do a call, as the end of a sentence ("takes bfloat16, got float32"), or None where it can. It
        gets the call's arrays (or `jax.ShapeDtypeStruct`s) and options.
      absent: what else is missing in this process (a library), as the end of a sentence, or None.
      unwise: why `None` leaves a call to others that it could do, as the end of a sentence, or None.
      platform: "cuda" or "tpu", the only one that it can be lowered for. None: every one.
      kernel: whether it is a Pallas kernel, which the interpreter can run on any platform, and which the compiler cannot
        split over devices.
    """

    name: str
    run: Callable
    misfit: Callable[..., str | None] = fits
    absent: Callable[[], str | None] = fits
    unwise: Callable[..., str | None] = fits
    platform: str | None = None
    kernel: bool = False

    def refusal(self, arrays, options, *, interpret=False) -> str | None:
        """Why this process cannot do the call with it, as the end of a sentence, or None."""
        if reason := self.misfit(*arrays, **options):
            return reason
        if interpret:
            return None if self.kernel else "is no kernel that an interpreter could run"
        here = versions.platforms()
        if self.platform is not None and self.platform not in here:
            return f"runs on {NAMES[self.platform]}, and here are {' and '.join(NAMES.get(p, p) for p in here)} only"
        return self.absent()

    def reserve(self, arrays, options) -> str | None:
        """Why it is not chosen though it could do the call, as the end of a sentence, or None."""
        if self.kernel and versions.split_by_compiler():
            return "cannot be split over devices by the compiler; call it inside a shard_map over all axes of the mesh"
        return self.unwise(*arrays, **options)


class Verdict(NamedTuple):
    """What is to be said of one implementation and one call.

    Attributes:
      name: the implementation.
      chosen: the platforms that it is chosen for, of those in reach.
      reason: why it is not chosen, or for which platforms it is; a clause.
    """

    name: str
    chosen: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Choice:
    """The implementation of each platform that a trace may be lowered for.

    Attributes:
      default: of every platform that is not in `special`.
      special: pairs of a platform and its implementation, where it is another one.
    """

    default: Implementation
    special: tuple[tuple[str, Implementation], ...] = ()

    @property
    def all(self) -> tuple[Implementation, ...]:
        """The default first."""
        return (self.default, *(one for _, one in self.special))

    def call(self, function: Callable[[Implementation], Callable], *arrays):
        """`function(implementation)(*arrays)`, of whichever implementation the platform has; arrays may be trees."""
        if not self.special:
            return function(self.default)(*arrays)
        branches = {platform: function(one) for platform, one in self.special}
        return jax.lax.platform_dependent(*arrays, default=function(self.default), **branches)


@dataclass(frozen=True)
class Op:
    """An op by its implementations, best first; the last does every call on every platform.

    Attributes:
      name: as in messages.
    """

    name: str
    implementations: tuple[Implementation, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What `implementation` may name, the one that always works first."""
        return tuple(one.name for one in reversed(self.implementations))

    def choose(self, implementation: str | None, *arrays, interpret=False, **options) -> Choice:
        """What does this call: the named implementation, or for each platform in reach the first that fits.

        Args:
          interpret: that the named kernel will run in Pallas' interpreter, wherever this is.

        Raises:
          ValueError: an unknown name, or a named implementation that cannot do this call here.
        """
        if implementation is None:
            if interpret:
                raise ValueError(f"{self.name}: interpret needs the kernel's name as implementation, got None")
            return self._best(arrays, options)
        one = self.named(implementation)
        if reason := one.refusal(arrays, options, interpret=interpret):
            raise ValueError(
                f'{self.name} with implementation="{one.name}" {reason}; use implementation="{self.names[0]}"'
            )
        return Choice(one)

    def named(self, name: str) -> Implementation:
        """The implementation of this name.

        Raises:
          ValueError: an unknown name.
        """
        for one in self.implementations:
            if one.name == name:
                return one
        choices = ", ".join(repr(known) for known in self.names)
        raise ValueError(f"unknown {self.name} implementation {name!r}; choose one of {choices}, or None")

    def _best(self, arrays, options) -> Choice:
        *kernels, default = self.implementations
        willing = [one for one in kernels if not (one.refusal(arrays, options) or one.reserve(arrays, options))]
        special = []
        for platform in versions.platforms():
            found = next((one for one in willing if one.platform in (None, platform)), default)
            special.append((platform, found))
        if len({one.name for _, one in special}) == 1:
            return Choice(special[0][1])
        return Choice(default, tuple((platform, one) for platform, one in special if one is not default))

    def explain(self, *arrays, **options) -> tuple[Verdict, ...]:
        """A verdict on each implementation for a call with `implementation=None`. Nothing is computed.

        Args:
          arrays, options: as `choose` takes them; shapes and dtypes (`jax.ShapeDtypeStruct`) will do.
        """
        choice = self._best(arrays, options)
        got = {platform: choice.default for platform in versions.platforms()} | dict(choice.special)
        found = []
        for one in self.implementations:
            chosen = tuple(platform for platform, best in got.items() if best is one)
            reason = one.refusal(arrays, options) or one.reserve(arrays, options)
            if chosen:
                reason = f"is chosen on {' and '.join(NAMES.get(p, p) for p in chosen)}"
            found.append(Verdict(one.name, chosen, reason or "comes after one that fits too"))
        return tuple(found)


def explain(op: Op, *arrays, **options) -> tuple[Verdict, ...]:
    """`op.explain`: each implementation of the op, and why this call gets it or not."""
    return op.explain(*arrays, **options)
