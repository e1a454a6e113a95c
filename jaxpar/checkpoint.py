"""Checkpoints of a run: asynchronous, complete or ignored, never of a broken state, readable on any mesh.

Orbax moves the arrays. Added here is what a run needs that may be killed at any moment: a manifest with the checksum
of every file, written inside the temporary folder before the one rename that makes a checkpoint (`jaxpar.manifest`);
falling back to the checkpoint before (`jaxpar.checkpoint_read`); rotation that deletes an old one only after a newer
one was found whole; slots that may come and go; errors as sentences.

All processes of a run call every function; process 0 decides and the others follow. They share the folder.
"""

from __future__ import annotations

import errno
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxpar import manifest
from jaxpar.checkpoint_arrays import (
    Handler,
    Save,
    all_finite,
    describe,
    flatten,
    mesh_of,
    nest,
    size_of,
    to_save,
)
from jaxpar.checkpoint_read import (
    Kept,
    Meta,
    all_agree,
    check_config,
    first_line,
    from_first,
    load,
    newest,
    newest_readable,
    read_state,
    versions,
)
from jaxpar.manifest import CheckpointError, Damaged
from jaxpar.step import TrainState

__all__ = ["FREE", "CheckpointError", "Checkpoints", "Meta", "load", "versions"]

FREE = tuple(
    f"model.{name}"
    for name in ("dtype", "remat", "layer_loop", "loss_chunk", "dropout", "init_std", "attention_implementation")
)
"""Fields of the model that may change between runs: they say how it is computed, not what its parameters mean."""


class Checkpoints:
    """The checkpoints of one run in one folder.

    Args:
      folder: made if it is new; must otherwise be empty or hold jaxpar checkpoints.
      config: the run's configuration as JSON-able nested dicts. A union's member should name its kind in a field.
      fingerprint: JSON-able; says which data `data_position` counts. None: not compared.
      keep: how many complete checkpoints stay on disk.
      fixed: parts of `config` that a checkpoint must share with this run to be restored.
      free: fields of these parts that may differ all the same.
      say: prints one sentence (called on process 0 only).

    Raises:
      CheckpointError: the folder is something else or cannot be written to.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        config: dict,
        fingerprint: Any = None,
        keep: int = 3,
        fixed: tuple[str, ...] = ("model",),
        free: tuple[str, ...] = FREE,
        say: Callable[[str], None] = print,
    ):
        if keep < 1:
            raise CheckpointError(f"the number of checkpoints to keep must be at least 1, got {keep}")
        self.folder = manifest.local(folder)
        self.keep, self.fixed, self.free = keep, fixed, free
        self.config = json.loads(json.dumps(config))  # as it reads back: tuples are lists
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self._say = say if jax.process_index() == 0 else lambda text: None
        if jax.process_index() == 0:
            manifest.own(self.folder, create=True)
        self._handler = Handler()
        self._checkpointer = ocp.AsyncCheckpointer(self._handler)
        self._pending: int | None = None  # the step that is being saved
        self._complete: int | None = None  # the newest one known to be whole
        self._damaged: set[int] = set()
        self._kept: dict[str, Kept] = {}
        self._cleaned = False
        self._deleting: list[threading.Thread] = []

    def save(self, state: TrainState, *, finite: Any) -> bool:
        """Starts saving `state` and returns as soon as it may be donated; waits for a save that still runs before.

        Args:
          state: a concrete state. Its parameters are looked at too: no broken state is saved, whatever `finite` says.
          finite: whether the last step was, as a bool or a scalar array.

        Returns:
          False, with a printed sentence, if the state was not finite. Else True.

        Raises:
          CheckpointError: the save before failed, or the disk has too little space. Older checkpoints are intact.
        """
        self.wait()
        step = int(state.step)
        if not (bool(finite) and bool(all_finite(state.params))):
            self._say(f"step {step} was not finite: no checkpoint is made of it")
            return False
        if step == self._complete:
            return True
        kept = {name: slot for name, slot in self._kept.items() if name not in state.slots}
        flat = flatten(state)
        leaves = {"/".join(path): describe(leaf) for path, leaf in flat.items()}
        for slot in kept.values():
            flat |= slot.arrays
            leaves |= slot.leaves
        self._check_space(sum(map(size_of, flat.values())), step)
        self._make_room(step)
        self._handler.content = {
            "step": step,
            "config": self.config,
            "fingerprint": self.fingerprint,
            "versions": versions(),
            "mesh": mesh_of(state),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "kept_slots": {name: slot.step for name, slot in kept.items()},
            "leaves": leaves,
        }
        tree = nest({path: to_save(leaf) for path, leaf in flat.items()})
        try:
            self._checkpointer.save(self.folder / manifest.name_of(step), args=Save(tree))
        except Exception as error:
            raise self._failed(step, error) from error
        self._pending = step
        return True

    def check(self) -> None:
        """Raises what went wrong in the background; deletes old checkpoints once a newer one is there.

        One look at the file system while a save runs, nothing otherwise: the loop calls it at every step.
        """
        if self._pending is None:
            return
        step = self._pending
        try:
            self._checkpointer.check_for_errors()
        except Exception as error:
            self._pending = None
            raise self._failed(step, error) from error
        if (self.folder / manifest.name_of(step)).is_dir():  # the rename is the last thing a save does
            self._pending, self._complete = None, step
            if jax.process_index() == 0:
                self._rotate(step)

    def wait(self) -> None:
        """Waits for the save in progress and for deletions; raises as `check` does."""
        if self._pending is not None:
            step = self._pending
            try:
                self._checkpointer.wait_until_finished()
            except Exception as error:
                self._pending = None
                raise self._failed(step, error) from error
            self.check()
            if self._pending is not None:
                self._pending = None
                raise self._failed(step, FileNotFoundError("its folder did not appear, or was removed"))
        while self._deleting:
            self._deleting.pop().join()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self.wait()
        self._checkpointer.close()

    def latest(self) -> int | None:
        """The step of the newest whole checkpoint (all of it is read to know), or None."""
        self.wait()
        step = from_first(lambda: newest(self.folder, set(), self._say))
        return step if step >= 0 else None

    def restore(
        self, target: TrainState, *, fresh: Callable[[TrainState], TrainState] | None = None
    ) -> tuple[TrainState, Meta] | None:
        """The newest whole checkpoint, put where `target` says.

        Args:
          target: leaves are `jax.ShapeDtypeStruct` with shardings, or arrays: any mesh, number of devices, processes.
          fresh: gives a new state from the restored one (whose slots may be incomplete), so that a slot which the
            checkpoint lacks starts from the restored parameters: `lambda s: step.init(s.params, s.key)`.

        Returns:
          The state, bitwise as it was saved, and its `Meta`; None if the folder holds no checkpoint.

        Raises:
          CheckpointError: no checkpoint is whole; of another model; of other data; leaves that do not fit.
        """
        self.wait()

        def read(path: Path, content: dict):
            check_config(path, content, self.config, self.fingerprint, self.fixed, self.free)
            return read_state(path, content, target, fresh, self.config)

        found, self._damaged = newest_readable(self.folder, read, self._say)
        if found is None:
            return None
        state, meta, self._kept = found
        self._complete = meta.step
        return state, meta

    # -- keeping the folder -------------------------------------------------------------------------------------------

    def _check_space(self, size: int, step: int) -> None:
        need = size + size // 20 + (1 << 20)
        free = shutil.disk_usage(self.folder).free
        if not all_agree(free >= need):
            raise CheckpointError(
                f"no space for the checkpoint of step {step} in {self.folder}: it needs {need / 1e6:,.0f} MB and "
                f"{free / 1e6:,.0f} MB are free; {self._intact()}; free some space and run the same command again"
            )

    def _failed(self, step: int, error: Exception) -> CheckpointError:
        if jax.process_index() == 0:
            for path in manifest.unfinished(self.folder):
                shutil.rmtree(path, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        reason = "there is no space left on the device" if full else f"{type(error).__name__}: {first_line(error)}"
        return CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.folder}: {reason}; {self._intact()}; mend "
            "the cause and run the same command again"
        )

    def _intact(self) -> str:
        steps = [step for step in manifest.steps(self.folder) if step not in self._damaged]
        return (
            f"older checkpoints (steps {', '.join(map(str, steps))}) are intact" if steps else "there is no older one"
        )

    def _make_room(self, step: int) -> None:
        """Removes what killed saves left, and a damaged checkpoint of the same step."""
        if jax.process_index() == 0:
            if not self._cleaned:
                for path in [*manifest.unfinished(self.folder), *self.folder.glob(manifest.TRASH + "*")]:
                    shutil.rmtree(path, ignore_errors=True)
            if step in self._damaged:
                self._delete(step)
                self._damaged.discard(step)
            elif (self.folder / manifest.name_of(step)).exists():
                raise CheckpointError(
                    f"{self.folder} already holds a checkpoint of step {step} that this run neither made nor restored; "
                    "choose another folder"
                )
        self._cleaned = True

    def _rotate(self, newest: int) -> None:
        """Deletes damaged checkpoints and those beyond `keep`, if the newest one is really there and whole."""
        path = self.folder / manifest.name_of(newest)
        try:
            files = manifest.read(path)["files"]
            whole = all((path / name).stat().st_size == size for name, (size, _) in files.items())
        except (Damaged, OSError):
            whole = False
        if not whole:
            return
        self._damaged.discard(newest)
        steps = manifest.steps(self.folder)
        older = [step for step in steps if step < newest and step not in self._damaged]
        for step in [*(self._damaged & set(steps)), *older[: max(0, len(older) - (self.keep - 1))]]:
            self._delete(step)
        self._damaged.clear()

    def _delete(self, step: int) -> None:
        trash = self.folder / f"{manifest.TRASH}{manifest.name_of(step)}-{time.time_ns()}"
        (self.folder / manifest.name_of(step)).rename(trash)  # one move: nothing half-deleted keeps the name
        thread = threading.Thread(target=shutil.rmtree, args=(trash, True), daemon=True)
        thread.start()
        self._deleting.append(thread)
