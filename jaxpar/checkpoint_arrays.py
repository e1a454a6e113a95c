"""The leaves of a state on their way to Orbax and back: names, random keys, what differs, reading them.

Orbax moves the arrays: any sharding to files, files to any sharding, all processes together. It is given nested dicts
of plain arrays only, so that a file knows nothing of optax's or our own types and outlives changes to them.
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jaxpar import manifest
from jaxpar.manifest import CheckpointError

Tree = Any
Flat = dict[tuple[str, ...], Any]  # leaves by the names on the way to them

# Orbax reports each phase, and a failure with its traceback; ours reach the user once, as a sentence.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Handler(ocp.PyTreeCheckpointHandler):
    """Orbax's tree handler that also writes our manifest, into the still temporary folder (process 0 only)."""

    def __init__(self):
        super().__init__(use_compression=False)  # random floats shrink by 15 %, and compressing took twice as long
        self.content: dict = {}

    def finalize(self, directory):
        super().finalize(directory)
        manifest.write(Path(directory), self.content)


@ocp.args.register_with_handler(Handler, for_save=True)
@dataclasses.dataclass
class Save(ocp.args.PyTreeSave):
    """Registers the handler for saving."""


@ocp.args.register_with_handler(Handler, for_restore=True)
@dataclasses.dataclass
class Restore(ocp.args.PyTreeRestore):
    """Registers the handler for restoring."""


def flatten(tree: Tree) -> Flat:
    """Leaves by path: dataclass fields, dict keys and positions become names."""
    name = lambda p: str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p))))
    return {tuple(map(name, path)): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten(target: Tree, arrays: Flat) -> Tree:
    """The tree of `target`'s structure with leaves from `arrays`."""
    return jax.tree.unflatten(jax.tree.structure(target), [arrays[path] for path in flatten(target)])


def nest(flat: Flat) -> dict:
    """Nested dicts. Raises CheckpointError for names that would collide in the file."""
    nested: dict = {}
    for path, leaf in flat.items():
        if any("/" in name or "." in name for name in path):
            raise CheckpointError(f"a name in the state holds '/' or '.': {path}; choose another for this slot or leaf")
        node = nested
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return nested


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def to_save(x: Any) -> Any:
    """What is written for a leaf: the words of a typed random key, an array for a Python number."""
    if _is_key(x):
        return jax.random.key_data(x)
    return x if isinstance(x, jax.Array | np.ndarray) else np.asarray(x)


def describe(x: Any) -> list:
    """[dtype, shape], and the generator's name for a typed random key."""
    if _is_key(x):
        return [str(x.dtype), list(x.shape), str(jax.random.key_impl(x))]
    x = x if hasattr(x, "dtype") else np.asarray(x)
    return [str(x.dtype), list(x.shape)]


def size_of(x: Any) -> int:
    """Bytes of a leaf, over all devices once."""
    x = jax.eval_shape(jax.random.key_data, x) if _is_key(x) else x if hasattr(x, "dtype") else np.asarray(x)
    return int(np.prod(x.shape, dtype=np.int64)) * x.dtype.itemsize


def mismatch(saved: dict[str, list], wanted: Flat, part: tuple[str, ...]) -> list[str]:
    """How the leaves under `part` differ: `"params/head/norm/scale is float32[8] there and float32[16] here"`."""
    prefix = "/".join(part)
    here = {"/".join(path): leaf for path, leaf in wanted.items() if path[: len(part)] == part}
    there = {name: d for name, d in saved.items() if name == prefix or name.startswith(prefix + "/")}
    text = lambda d: f"{d[0]}{d[1]}"
    out = []
    for name, leaf in here.items():
        mine = [str(leaf.dtype), list(leaf.shape)]
        if name not in there:
            out.append(f"{name} is {text(mine)} here and not in the checkpoint")
        elif there[name][:2] != mine:
            out.append(f"{name} is {text(there[name])} there and {text(mine)} here")
    return out + [f"{name} is {text(there[name])} there and not in this run" for name in there if name not in here]


def read_arrays(folder: Path, content: dict, ask: Flat) -> Flat:
    """Leaves of a checkpoint, each where `ask`'s leaf says; None asks for a NumPy array on the host.

    Random keys asked for with None stay words, as `to_save` made them.
    """

    def argument(leaf):
        if leaf is None:
            return ocp.RestoreArgs(restore_type=np.ndarray)
        shape = jax.eval_shape(jax.random.key_data, leaf).shape if _is_key(leaf) else leaf.shape
        sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return ocp.ArrayRestoreArgs(sharding=sharding, global_shape=shape)

    arguments = nest({path: argument(leaf) for path, leaf in ask.items()})
    item = jax.tree.map(lambda _: 0, arguments)
    checkpointer = ocp.Checkpointer(Handler())
    try:
        read = checkpointer.restore(folder, args=Restore(item, restore_args=arguments, partial_restore=True))
    finally:
        checkpointer.close()
    arrays = flatten(read)
    for path, leaf in ask.items():
        if leaf is not None and _is_key(leaf):
            impl = content["leaves"]["/".join(path)][2]
            arrays[path] = jax.random.wrap_key_data(arrays[path], impl=impl)
    return {path: arrays[path] for path in ask}


@jax.jit
def all_finite(params: Tree) -> jax.Array:
    """Whether no parameter is infinite or not a number. bool []"""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))


def mesh_of(state: Tree) -> dict:
    """The mesh that a state lives on: {"axes": {name: size}, "devices", "kind", "processes"}."""
    shardings = [x.sharding for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    mesh = next((s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)), None)
    return {
        "axes": {} if mesh is None else dict(mesh.shape),
        "devices": 1 if mesh is None else mesh.size,
        "kind": jax.devices()[0].device_kind,
        "processes": jax.process_count(),
    }
