"""Choosing and reading a checkpoint: the newest that is whole, of this model and this data, slots coming and going.

Several processes read together: process 0 chooses, the others follow.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxpar import manifest
from jaxpar.checkpoint_arrays import Flat, Tree, flatten, mismatch, read_arrays, unflatten
from jaxpar.manifest import CheckpointError, Damaged
from jaxpar.step import TrainState

_NONE, _UNREADABLE = -1, -2


class Kept(NamedTuple):
    """A slot of the restored checkpoint that this run does not use.

    Attributes:
      step: when it was last updated.
      arrays: its leaves on the host, by their path in the state; random keys as words.
      leaves: what the manifest says of them.
    """

    step: int
    arrays: Flat
    leaves: dict[str, list]


@dataclass(frozen=True)
class Meta:
    """What stands in a checkpoint beside the arrays, and what restoring it did.

    Attributes:
      step: updates done.
      config: the run's configuration, as it was given.
      fingerprint: of the data.
      versions: of jaxpar, jax, ..., python.
      mesh: {"axes": {name: size}, "devices", "kind", "processes"} that wrote it.
      date: when, ISO 8601 in UTC.
      initialised: slots that it does not hold (or in another shape) and that were initialised.
      kept: slots that it holds and this run does not use; they go into the next checkpoints unchanged.
      notes: sentences worth printing: kept and initialised slots, changed fields, other versions.
    """

    step: int
    config: dict
    fingerprint: Any
    versions: dict[str, str]
    mesh: dict
    date: str
    initialised: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, content: dict, **more) -> Meta:
        names = ("step", "config", "fingerprint", "versions", "mesh", "date")
        return cls(**{n: content[n] for n in names}, **more)


def versions() -> dict[str, str]:
    """The versions that a checkpoint records."""
    found = {}
    for name in ("jaxpar", "jax", "jaxlib", "orbax-checkpoint", "optax", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # a checkout on the path, not installed
            found[name] = "not installed"
    return found | {"python": sys.version.split()[0]}


def load(
    folder: str | Path, part: str, target_of: Callable[[Meta], Tree], *, say: Callable[[str], None] = print
) -> tuple[Tree, Meta]:
    """One part of the newest readable checkpoint, for generating or converting.

    Args:
      folder: of checkpoints; nothing in it is changed, so a run may be writing there.
      part: "params", or as "slots/ema".
      target_of: gives the abstract part (`jax.ShapeDtypeStruct`, with shardings) for the checkpoint's configuration.

    Raises:
      CheckpointError: no checkpoints there, none readable, no such part, or leaves that do not fit.
    """
    folder = manifest.local(folder)
    manifest.own(folder, create=False)
    prefix = tuple(part.split("/"))

    def read(path: Path, content: dict) -> tuple[Tree, Meta]:
        if not any(name.startswith(f"{part}/") for name in content["leaves"]):
            parts = sorted({"/".join(name.split("/")[: len(prefix)]) for name in content["leaves"]})
            raise CheckpointError(f"{path} holds no {part!r}; it has {', '.join(parts)}")
        meta = Meta.of(content)
        target = target_of(meta)
        wanted = {(*prefix, *p): leaf for p, leaf in flatten(target).items()}
        if wrong := mismatch(content["leaves"], wanted, prefix):
            raise CheckpointError(f"{path} does not fit: {some(wrong)}")
        arrays = read_arrays(path, content, wanted)
        return unflatten(target, {p[len(prefix) :]: leaf for p, leaf in arrays.items()}), meta

    found, _ = newest_readable(folder, read, say)
    if found is None:
        raise CheckpointError(f"{folder} holds no checkpoint yet")
    return found


# -- choosing ---------------------------------------------------------------------------------------------------------


def newest_readable(folder: Path, read: Callable[[Path, dict], Any], say) -> tuple[Any, set[int]]:
    """`read(path, manifest)` of the newest whole checkpoint, and the steps of damaged ones that were passed over.

    None instead, if there is no checkpoint at all.

    Raises:
      CheckpointError: there are checkpoints but none is whole; or what `read` raises.
    """
    bad: set[int] = set()
    if jax.process_index() == 0:
        for path in manifest.unfinished(folder):
            say(f"ignoring {path}: the save of this checkpoint did not end")
    while True:
        step = from_first(lambda: newest(folder, bad, say))
        if step == _NONE:
            return None, bad
        if step == _UNREADABLE:
            listed = ", ".join(manifest.name_of(s) for s in manifest.steps(folder))
            raise CheckpointError(
                f"none of the checkpoints in {folder} is readable ({listed}); bring one back from a copy, or delete "
                "the folder to start from the beginning"
            )
        path = folder / manifest.name_of(step)
        result, problem = None, None
        try:
            result = read(path, manifest.read(path))
        except CheckpointError:
            raise
        except Exception as error:
            problem = error
        if all_agree(problem is None):
            return result, bad
        # It was whole a moment ago. A run that writes here may have deleted it since; otherwise this is no damage,
        # and silently going back to an older one would hide it.
        if from_first(lambda path=path: int(_damage(path) is None)):
            raise CheckpointError(
                f"{path} is whole but could not be read: {first_line(problem or 'another process failed')}"
            ) from problem
        bad.add(step)


def newest(folder: Path, bad: set[int], say) -> int:
    """The newest whole checkpoint outside `bad`; tells of the damaged ones passed over and adds them to `bad`."""
    for step in reversed(manifest.steps(folder)):
        path = folder / manifest.name_of(step)
        if step not in bad and (damage := _damage(path)) is None:
            return step
        if step not in bad:
            say(f"ignoring the damaged checkpoint {path}: {damage}")
            bad.add(step)
    return _UNREADABLE if manifest.steps(folder) else _NONE


def _damage(path: Path) -> str | None:
    try:
        manifest.verify(path)
    except Damaged as error:
        return str(error)
    return None


def from_first(value: Callable[[], int]) -> int:
    """`value()` as process 0 computes it."""
    if jax.process_count() == 1:
        return value()
    mine = value() if jax.process_index() == 0 else 0
    return int(multihost_utils.broadcast_one_to_all(np.int32(mine)))


def all_agree(ok: bool) -> bool:
    """Whether it holds on every process."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.int32(ok))))


# -- one checkpoint ---------------------------------------------------------------------------------------------------


def check_config(folder: Path, content: dict, config: dict, fingerprint: Any, fixed, free) -> None:
    """Raises CheckpointError if the checkpoint is of another model (`fixed` parts less `free` ones) or other data."""
    within = lambda text, parts: any(text.startswith((f"{part}.", f"{part} ")) for part in parts)
    changed = manifest.differences(content["config"], config)
    changed = [d for d in changed if within(d, fixed) and not within(d, free)]
    if changed:
        raise CheckpointError(
            f"{folder} is a checkpoint of another configuration: {some(changed)}; go back to its values, or choose "
            "another folder for this run"
        )
    if None not in (content["fingerprint"], fingerprint) and content["fingerprint"] != fingerprint:
        wrap = lambda x: x if isinstance(x, dict) else {"data fingerprint": x}
        changed = manifest.differences(wrap(content["fingerprint"]), wrap(fingerprint))
        raise CheckpointError(
            f"{folder} was made on other data, so its position in the data means nothing here: "
            f"{some(changed) or 'other fields'}; give the same data, or choose another folder for this run"
        )


def read_state(
    folder: Path, content: dict, target: TrainState, fresh, config: dict
) -> tuple[TrainState, Meta, dict[str, Kept]]:
    """The state where `target` says, its `Meta`, and the slots that this run does not use."""
    saved, wanted = content["leaves"], flatten(target)
    wrong = [m for part in ("params", "opt_state", "key") for m in mismatch(saved, wanted, (part,))]
    if wrong:
        raise CheckpointError(f"{folder} does not fit this run: {some(wrong)}")

    there = {name.split("/")[1] for name in saved if name.startswith("slots/")}
    unfit = {name: m for name in target.slots if (m := mismatch(saved, wanted, ("slots", name)))}
    unused = there - target.slots.keys()
    notes = [
        f"slot {name!r} does not fit and is initialised: {some(m)}"
        if name in there
        else f"slot {name!r} is not in the checkpoint and is initialised"
        for name, m in unfit.items()
    ]
    if notes and fresh is None:
        raise CheckpointError(f"{folder}: {some(notes)}, but nothing was given to initialise it with")
    notes += [f"slot {name!r} of the checkpoint is not used by this run and is kept" for name in sorted(unused)]
    for name, since in content["kept_slots"].items():
        if name in target.slots and name not in unfit:
            notes.append(f"slot {name!r} was last updated at step {since}: a run in between did not use it")
    changed = manifest.differences(content["config"], config)
    notes += [f"changed since the checkpoint: {some(changed)}"] if changed else []
    changed = manifest.differences(content["versions"], versions())
    notes += [f"the checkpoint was written with other versions: {some(changed)}"] if changed else []

    of_slots = lambda path, names: path[0] == "slots" and path[1] in names
    ask = {path: leaf for path, leaf in wanted.items() if not of_slots(path, unfit)}
    ask |= {path: None for name in saved if of_slots(path := tuple(name.split("/")), unused)}
    arrays = read_arrays(folder, content, ask)
    kept = {}
    for name in unused:
        own = {path: leaf for path, leaf in arrays.items() if of_slots(path, {name})}
        kept[name] = Kept(
            content["kept_slots"].get(name, content["step"]), own, {n: saved[n] for n in map("/".join, own)}
        )
    partial = target.replace(slots={n: s for n, s in target.slots.items() if n not in unfit})
    state = unflatten(partial, arrays)
    if unfit:
        new = fresh(state).slots
        state = state.replace(slots={n: new[n] if n in unfit else state.slots[n] for n in target.slots})
    return state, Meta.of(content, initialised=tuple(unfit), kept=tuple(sorted(unused)), notes=tuple(notes)), kept


def some(texts: list[str], most: int = 6) -> str:
    return ", ".join(texts[:most]) + (f", and {len(texts) - most} more" if len(texts) > most else "")


def first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
